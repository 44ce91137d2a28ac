"""What a LoRA file's metadata says of its base and of itself, in kohya's and SAI modelspec's names."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_training.families import Family


def sd15_version(config: dict, schedule: dict) -> tuple[str, str, str]:
    """(version, architecture, implementation) as kohya's files name this base.

    config: the denoiser's; schedule: the scheduler's.
    """
    if config["cross_attention_dim"] != 1024:
        return "sd_v1", "stable-diffusion-v1", "diffusers"
    if schedule.get("prediction_type") == "v_prediction":
        return "sd_v2_v", "stable-diffusion-v2-768-v", "diffusers"
    return "sd_v2", "stable-diffusion-v2-512", "diffusers"


def sdxl_version(config: dict, schedule: dict) -> tuple[str, str, str]:
    """(version, architecture, implementation) as kohya's files name this base."""
    return (
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base",
        "https://github.com/Stability-AI/generative-models",
    )


def sd3_version(config: dict, schedule: dict) -> tuple[str, str, str]:
    """(version, architecture, implementation) as kohya's files name this base; config: the transformer's."""
    size = (
        "5-large"
        if config["num_layers"] == 38
        else "5-medium"
        if config["dual_attention_layers"]
        else "medium"
    )
    return size, f"stable-diffusion-3-{size}", "diffusers"


def flux_version(config: dict, schedule: dict) -> tuple[str, str, str]:
    """(version, architecture, implementation) as kohya's files name this base; config: the transformer's."""
    kind = "dev" if config["guidance_embeds"] else "schnell"
    return "flux1", f"flux-1-{kind}", "https://github.com/black-forest-labs/flux"


BASE_VERSIONS = {"sd15": sd15_version, "sdxl": sdxl_version, "sd3": sd3_version, "flux": flux_version}


def base_versions(family: Family, config: dict, schedule: dict) -> dict[str, str]:
    """What a LoRA's metadata says of its base; AUTOMATIC1111 hides LoRAs by it.

    config: the denoiser's; schedule: the scheduler's.
    """
    version, architecture, implementation = BASE_VERSIONS[family.name](config, schedule)
    spec = {"modelspec.architecture": f"{architecture}/lora", "modelspec.implementation": implementation}
    return spec | {"ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2"))}


def tensor_hashes(tensors: dict) -> dict[str, str]:
    """The hash by which other tools know a file whatever its metadata."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].float().numpy().tobytes())
    return {"sshs_model_hash": digest.hexdigest(), "modelspec.hash_sha256": f"0x{digest.hexdigest()}"}
