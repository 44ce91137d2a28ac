"""What tests of LoRA files share: a short training, and pictures that are drawn with its files."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import FAMILIES, SAMPLE, Family, run_here

import lora


def train_with_text_encoder(family: Family, shelf: Path) -> Path:
    """The folder of a short run with text encoder and alpha half the rank, made when it is first asked
    for.
    """
    output = shelf / "exports" / family.name
    if not (output / "README.md").exists():
        flags = ("-d", SAMPLE, "--train_text_encoder", "--rank", 4, "--lora_alpha", 2)
        flags += ("--learning_rate", 2e-2, "--trigger_word", "sks", "--max_train_steps", 4)
        assert run_here(family, output, *flags, "--lora_layers", *family.lora_layers) == 0
    return output


def draw(kind, folder, family: Family, file: Path | None = None, scale: float = 1.0):
    """One image (1, H, W, 3) between 0 and 1 by the pipeline class `kind`, with or without a LoRA file."""
    pipeline = kind.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if file is not None:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="x")
        pipeline.set_adapters(["x"], [scale])
    return pipeline(
        "a sks circle on a blue background",
        width=64,
        height=64,
        num_inference_steps=3,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **dict(family.extra),
    ).images


def save_small_lora(folder: Path) -> Path:
    """A LoRA for the toy of SD 1.5 that is not zero, in a folder."""
    base = FAMILIES["sd15"].base
    model = lora.apply_lora_to_model(lora.load_models(base, apply_to_diffusion=False)["unet"], 2)
    torch.manual_seed(0)
    for parameter in lora.get_lora_parameters(model):
        parameter.data.normal_(0, 0.1)
    return lora.save_lora(model, folder / "pytorch_lora_weights.safetensors")
