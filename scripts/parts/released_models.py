"""What the released models look like: the one place in scripts/ with their configurations."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.parts.files import read_json

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
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
VAE_16 = VAE | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 1024}
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
# The other parts, of the families whose tokenizers a package carries: {part: (library, class, configuration)}
OTHER_PARTS = {
    "sd15": {
        "vae": ("diffusers", "AutoencoderKL", VAE | {"sample_size": 512}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "scheduler": ("diffusers", "PNDMScheduler", NOISE | {"skip_prk_steps": True, "set_alpha_to_one": False}),
    },
    "sdxl": {
        "vae": ("diffusers", "AutoencoderKL", VAE | {"sample_size": 1024, "scaling_factor": 0.13025}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G),
        "scheduler": ("diffusers", "EulerDiscreteScheduler", NOISE | {"timestep_spacing": "leading"}),
    },
}
# The same of the others; their schedulers and tokenizers are taken from the toy bases where sizes are all that matters
PARTS_WITHOUT_TOKENIZERS = {
    "sd3": {
        "vae": ("diffusers", "AutoencoderKL", VAE_16 | {"scaling_factor": 1.5305, "shift_factor": 0.0609}),
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", CLIP_L),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G),
        "text_encoder_3": ("transformers", "T5EncoderModel", T5_XXL),
    },
    "flux": {
        "vae": ("diffusers", "AutoencoderKL", VAE_16 | {"scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
        "text_encoder_2": ("transformers", "T5EncoderModel", T5_XXL),
    },
}
INDEXES = {  # of model_index.json, beside the parts
    "sd15": {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": (None, None),
        "requires_safety_checker": False,
        "safety_checker": (None, None),
    },
    "sdxl": {
        "_class_name": "StableDiffusionXLPipeline",
        "feature_extractor": (None, None),
        "force_zeros_for_empty_prompt": True,
        "image_encoder": (None, None),
    },
}


def real_denoiser(family: str):
    """The released denoiser's architecture, on whatever device is current."""
    import diffusers

    kind, config = DENOISERS[family]
    return getattr(diffusers, kind)(**config)


def denoiser_config(family: str, base: str | None) -> dict:
    """The denoiser's configuration: of a local diffusers folder, or of the released model."""
    import torch

    if base is not None:
        folder = next(
            (Path(base) / n for n in ("unet", "transformer") if (Path(base) / n / "config.json").is_file()), None
        )
        if folder is None:
            raise ValueError(f"{base}: no unet/config.json or transformer/config.json of a diffusers folder")
        return read_json(folder / "config.json")
    with torch.device("meta"):
        return dict(real_denoiser(family).config)


def meta_denoiser(family: str, config: dict):
    """The denoiser with this configuration, without weights. Errors: ValueError for one that describes no denoiser."""
    import diffusers
    import torch

    try:
        with torch.device("meta"):
            return getattr(diffusers, DENOISERS[family][0]).from_config(config)
    except Exception as error:  # of a damaged configuration, any kind
        problem = " ".join(str(error).split())[:200]
        raise ValueError(f"the base's config.json is damaged, or not one of {family}: {problem}") from None


def write_layout(family: str, folder: Path, tokenizer) -> None:
    """Writes the released SD 1.5 or SDXL into a folder, without weights: configurations, tokenizers, model_index.json.

    tokenizer: CLIP's, as clip_vocabulary.py makes it.
    """
    import diffusers
    import torch
    import transformers

    index = {"_diffusers_version": diffusers.__version__} | INDEXES[family]
    parts = {"unet": ("diffusers", *DENOISERS[family])} | OTHER_PARTS[family]
    for name, (library, kind, config) in parts.items():
        index[name] = (library, kind)
        if library == "transformers":
            transformers.CLIPTextConfig(**config).save_pretrained(folder / name)
        else:
            with torch.device("cpu" if name == "scheduler" else "meta"):  # a scheduler copies its numbers
                getattr(diffusers, kind)(**config).save_config(folder / name)
    for name in [n for n in parts if n.startswith("text_encoder")]:
        place = name.replace("text_encoder", "tokenizer")
        index[place] = ("transformers", "CLIPTokenizer")
        if place == "tokenizer_2":
            tokenizer.pad_token = "!"  # its padding is token 0
        tokenizer.save_pretrained(folder / place)
    text = json.dumps(dict(sorted(index.items())), indent=2)
    (folder / "model_index.json").write_text(text + "\n", encoding="utf-8")
