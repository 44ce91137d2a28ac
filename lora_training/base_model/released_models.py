"""What the released models look like: configurations of their parts, and their denoisers without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.base_model.reading import import_class
from lora_training.errors import UserError, one_line
from lora_training.files import read_json_file

if TYPE_CHECKING:
    import torch

NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE_16_CHANNELS = VAE | {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 1024,
}
CLIP = {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
CLIP_L = CLIP | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
CLIP_G = CLIP | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
T5_XXL = {  # version 1.1
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
CLIP_H = CLIP | {  # of Stable Diffusion 2.x, whose pipelines leave its last layer out
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
# Stable Diffusion 1.5, SDXL, SD 3.5 medium, FLUX.1-dev: (class of diffusers, what differs from its defaults)
DENOISERS = {
    "sd15": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 2048,
            "out_channels": 16,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    ),
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
}
# Released models of the same families with other layers: {title: what differs from the above}
VARIANTS: dict[str, dict[str, dict]] = {
    "sd15": {
        "Stable Diffusion 2.x": {
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        }
    },
    "sdxl": {},
    "sd3": {
        "SD 3.5 large": {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "dual_attention_layers": (),
        }
    },
    "flux": {},
}
# Parts beside the denoiser and the tokenizers: {part: (library, class, configuration)}; a scheduler only for
# the bases that released_layout.py writes
OTHER_PARTS = {
    "sd15": {
        "vae": ("diffusers", "AutoencoderKL", VAE | {"sample_size": 512}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "scheduler": (
            "diffusers",
            "PNDMScheduler",
            NOISE_SCHEDULE | {"skip_prk_steps": True, "set_alpha_to_one": False},
        ),
    },
    "sdxl": {
        "vae": ("diffusers", "AutoencoderKL", VAE | {"sample_size": 1024, "scaling_factor": 0.13025}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G),
        "scheduler": (
            "diffusers",
            "EulerDiscreteScheduler",
            NOISE_SCHEDULE | {"timestep_spacing": "leading"},
        ),
    },
    "sd3": {
        "vae": (
            "diffusers",
            "AutoencoderKL",
            VAE_16_CHANNELS | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        ),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G),
        "text_encoder_3": ("transformers", "T5EncoderModel", T5_XXL),
    },
    "flux": {
        "vae": (
            "diffusers",
            "AutoencoderKL",
            VAE_16_CHANNELS | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        ),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "T5EncoderModel", T5_XXL),
    },
}


def released_denoiser(family: str) -> torch.nn.Module:
    """The released denoiser's architecture, on whatever device is current."""
    kind, config = DENOISERS[family]
    return import_class("diffusers", kind)(**config)


def denoiser_config(family: str, folder: str | None) -> dict:
    """The denoiser's configuration: of a local diffusers folder, or with None of the released model.

    Errors: UserError that names the folder or its damaged file.
    """
    import torch

    if folder is None:
        with torch.device("meta"):
            return dict(released_denoiser(family).config)
    for name in ("unet", "transformer"):
        file = Path(folder) / name / "config.json"
        if file.is_file():
            return read_json_file(file)
    raise UserError(f"{folder}: no unet/config.json or transformer/config.json of a diffusers folder")


def empty_denoiser(family: str, config: dict) -> torch.nn.Module:
    """The denoiser with this configuration, without weights. Errors: UserError if it describes none."""
    import torch

    try:
        with torch.device("meta"):
            return import_class("diffusers", DENOISERS[family][0]).from_config(config)
    except Exception as error:  # of a damaged configuration, any kind
        problem = f"the base's config.json is damaged, or not one of {family}"
        raise UserError(f"{problem}: {one_line(error)}") from None
