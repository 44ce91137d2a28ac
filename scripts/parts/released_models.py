"""Names of lora_training.base_model.released_models for commands that have not moved to it yet."""

from lora_training.base_model.released_models import (
    CLIP_G,
    CLIP_H,
    CLIP_L,
    DENOISERS,
    OTHER_PARTS,
    T5_XXL,
    VAE,
    VARIANTS,
    denoiser_config,
)
from lora_training.base_model.released_models import NOISE_SCHEDULE as NOISE
from lora_training.base_model.released_models import empty_denoiser as meta_denoiser
from lora_training.base_model.released_models import released_denoiser as real_denoiser

PARTS_WITHOUT_TOKENIZERS = {}

__all__ = [
    "CLIP_G",
    "CLIP_H",
    "CLIP_L",
    "DENOISERS",
    "NOISE",
    "OTHER_PARTS",
    "PARTS_WITHOUT_TOKENIZERS",
    "T5_XXL",
    "VAE",
    "VARIANTS",
    "denoiser_config",
    "meta_denoiser",
    "real_denoiser",
]
