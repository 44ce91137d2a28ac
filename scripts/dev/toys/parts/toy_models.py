"""The denoisers, schedulers and pipelines of the toy bases: of the classes that the real bases have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.dev.toys.parts.toy_families import LATENT_CHANNELS, TOY_FAMILIES, UNETS, ToyFamily
from scripts.dev.toys.parts.toy_text import make_text_encoders


@dataclass
class ToyBase:
    """What of a base is trained. Tokenizers and text encoders: CLIPs first, T5 last."""

    name: str  # of its family
    tokenizers: list
    text_encoders: list
    denoiser: torch.nn.Module

    @property
    def is_unet(self) -> bool:
        return self.name in UNETS


def make_base(name: str) -> ToyBase:
    """A base with random weights."""
    tokenizers, encoders = make_text_encoders(TOY_FAMILIES[name])
    return ToyBase(name, tokenizers, encoders, make_denoiser(name, TOY_FAMILIES[name]))


def load_base(name: str, folder: Path) -> ToyBase:
    """The base in `folder`, in float32."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    numbers = ("", "_2", "_3")[: len(TOY_FAMILIES[name].clips) + (TOY_FAMILIES[name].t5 > 0)]
    tokenizers = [getattr(pipeline, f"tokenizer{n}") for n in numbers]
    encoders = [getattr(pipeline, f"text_encoder{n}") for n in numbers]
    return ToyBase(name, tokenizers, encoders, pipeline.unet if name in UNETS else pipeline.transformer)


def make_denoiser(name: str, family: ToyFamily) -> torch.nn.Module:
    """The denoiser with random weights, of the class that the real pipeline uses."""
    make = {"sd15": make_sd15_unet, "sdxl": make_sdxl_unet, "sd3": make_sd3_transformer}
    return make.get(name, make_flux_transformer)(family)


def make_sd15_unet(family: ToyFamily) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=family.clips[0][0],
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_sdxl_unet(family: ToyFamily) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=sum(width for width, _ in family.clips),
        attention_head_dim=(3, 6),
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + family.clips[1][1],
    )


def make_sd3_transformer(family: ToyFamily) -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=family.t5,
        caption_projection_dim=128,
        pooled_projection_dim=sum(pooled for _, pooled in family.clips),
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )


def make_flux_transformer(family: ToyFamily) -> torch.nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=family.t5,
        pooled_projection_dim=family.clips[0][1],
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def make_scheduler(name: str):
    """The scheduler that is saved with the base."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if name in UNETS:
        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        return DDPMScheduler(**schedule, clip_sample=False, steps_offset=1)
    if name == "sd3":
        return FlowMatchEulerDiscreteScheduler(shift=1.5)
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_pipeline(base: ToyBase, vae):
    """The diffusers pipeline of the base's family."""
    import diffusers

    scheduler = make_scheduler(base.name)
    tokenizers, encoders, denoiser = base.tokenizers, base.text_encoders, base.denoiser
    if base.name == "sd15":
        return diffusers.StableDiffusionPipeline(
            vae, encoders[0], tokenizers[0], denoiser, scheduler, None, None, requires_safety_checker=False
        )
    if base.name == "sdxl":
        return diffusers.StableDiffusionXLPipeline(vae, *encoders, *tokenizers, denoiser, scheduler)
    text_parts = [part for pair in zip(encoders, tokenizers, strict=True) for part in pair]
    if base.name == "sd3":
        return diffusers.StableDiffusion3Pipeline(denoiser, scheduler, vae, *text_parts)
    return diffusers.FluxPipeline(scheduler, vae, *text_parts, denoiser)


def save_base(base: ToyBase, folder: Path, vae) -> None:
    """Writes the pipeline; denoiser and autoencoder in float16."""
    if base.is_unet:
        vae.register_to_config(shift_factor=None)
    pipeline = make_pipeline(base, vae)
    base.denoiser.half()
    # the text encoders stay float32: transformers would load half-precision files in half precision
    vae.half()
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/config.json"):  # where the parts lay on this machine is nobody's business
        config = {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"}
        file.write_text(json.dumps(config, indent=2) + "\n")
