"""A base of Stable Diffusion 1.5's architecture at a chosen width, and pictures, for timing on a CPU."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

from lora_training.base_model.released_models import NOISE_SCHEDULE, VAE
from scripts.dev import ROOT
from scripts.dev.toys.parts.toy_world import describe, draw, random_scene

REAL_WIDTH = 320  # of the UNet's first level


def build_base(folder: Path, width: int) -> Path:
    """A diffusers folder with random weights, whose UNet begins at `width`; kept for the next time."""
    if (folder / "model_index.json").is_file():
        return folder
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets" / "toy_sd15" / "tokenizer")
    text_width = max(64, 768 * width // REAL_WIDTH // 64 * 64)
    text_encoder = build_text_encoder(tokenizer, text_width)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        cross_attention_dim=text_width,
        attention_head_dim=8,
        norm_num_groups=min(32, width // 2),
    )
    vae_width = max(32, 128 * width // REAL_WIDTH // 32 * 32)
    vae_channels = (vae_width, 2 * vae_width, 4 * vae_width, 4 * vae_width)
    vae = AutoencoderKL(**VAE | {"block_out_channels": vae_channels})
    scheduler = DDPMScheduler(**NOISE_SCHEDULE, clip_sample=False)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    print(f"base of width {width} in {folder}: UNet with {millions:.0f} million parameters")
    return folder


def build_text_encoder(tokenizer, width: int):
    """A CLIP text encoder of this width, with the released one's twelve layers and vocabulary size."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12,
        num_attention_heads=width // 64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    return CLIPTextModel(config)


def draw_pictures(folder: Path, count: int, size: int) -> Path:
    """A folder of captioned pictures of the toy world, `size` pixels wide and high."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(0), []
    for i in range(count):
        scene = random_scene(rng)
        draw(*scene, rng, size).save(folder / f"{i:03d}.png")
        rows.append({"file_name": f"{i:03d}.png", "text": describe(*scene)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder
