"""diffusers' example script as a measured program: run as it is."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock, patch

import numpy as np
import torch

from scripts.dev.benchmarks.cases import example_flags, flags_to_argv
from scripts.dev.benchmarks.programs import fresh_process

EXAMPLES = {  # those that train the same layers and can cache latents
    "sd15": "advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py",
    "sdxl": "advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py",
    "sd3": "dreambooth/train_dreambooth_lora_sd3.py",
    "flux": "dreambooth/train_dreambooth_lora_flux.py",
}


def run_example(script: Path, argv: list[str], flags: list[str]) -> None:
    """Runs an example script to the clock's last tick. flags: those of a case."""
    import diffusers
    from PIL import Image  # noqa: F401  (before a stand-in for torchvision is there)

    learning_rate = ["--learning_rate", "1"] if "optimizer=prodigy" in flags else []
    argv = [*argv, *flags_to_argv(example_flags(flags)), *learning_rate]
    encode = diffusers.AutoencoderKL.encode

    # SD3's script with --cache_latents and bf16 gives a float32 VAE bfloat16 pixels
    def encode_in_own_dtype(vae, pixels, *rest, **options):
        return encode(vae, pixels.to(vae.dtype), *rest, **options)

    stand_ins = {} if importlib.util.find_spec("torchvision") else torchvision_stand_ins()
    with (
        patch.object(diffusers.utils, "check_min_version"),  # it may be of a later day than the library
        patch.object(diffusers.AutoencoderKL, "encode", encode_in_own_dtype),
        patch.object(sys, "argv", [str(script), *argv]),
        patch.dict(os.environ),
        fresh_process(),
    ):
        sys.modules.update(stand_ins)
        try:
            runpy.run_path(str(script), run_name="__main__")
        finally:
            for name in stand_ins:  # these alone: other libraries, once imported, can't be imported again
                del sys.modules[name]


def torchvision_stand_ins() -> dict[str, object]:
    """Modules for where torchvision isn't installed; pictures need no crop here."""
    unchanged, transforms = MagicMock(side_effect=lambda image, *_: image), MagicMock()
    unchanged.get_params.return_value = (0, 0, 1, 1)
    for name in ("Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip"):
        getattr(transforms, name).return_value = unchanged
    transforms.functional.crop = transforms.functional.hflip = unchanged
    transforms.Compose.return_value = to_pixels
    modules = {
        "torchvision.transforms": transforms,
        "torchvision.transforms.functional": transforms.functional,
    }
    return {"torchvision": types.SimpleNamespace(transforms=transforms)} | modules


def to_pixels(image) -> torch.Tensor:
    """A Pillow image as (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image, "f4")).permute(2, 0, 1) / 127.5 - 1
