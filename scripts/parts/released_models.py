"""What the released models look like."""

from __future__ import annotations

import json
from pathlib import Path


def real_denoiser(family: str):
    """The released denoiser's architecture (SD 1.5, SDXL, SD 3.5 medium, FLUX.1-dev), on whatever device is current."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    if family == "sd15":
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    if family == "sdxl":
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    if family == "sd3":
        return SD3Transformer2DModel(
            sample_size=128,
            num_layers=24,
            num_attention_heads=24,
            attention_head_dim=64,
            caption_projection_dim=1536,
            joint_attention_dim=4096,
            pooled_projection_dim=2048,
            out_channels=16,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    return FluxTransformer2DModel(guidance_embeds=True)


def denoiser_config(family: str, base: str | None) -> dict:
    """The denoiser's configuration: of a local diffusers folder, or of the released model."""
    import torch

    if base is not None:
        folder = next(
            (Path(base) / n for n in ("unet", "transformer") if (Path(base) / n / "config.json").is_file()), None
        )
        if folder is None:
            raise ValueError(f"{base}: no unet/config.json or transformer/config.json of a diffusers folder")
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        return dict(real_denoiser(family).config)


def meta_denoiser(family: str, config: dict):
    """The denoiser with this configuration, without weights."""
    import diffusers
    import torch

    kind = {"sd3": "SD3Transformer2DModel", "flux": "FluxTransformer2DModel"}.get(family, "UNet2DConditionModel")
    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config)
