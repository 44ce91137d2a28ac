"""Finds out which of the four model families a base belongs to, without reading its weights."""

from __future__ import annotations

import json
import struct
from pathlib import Path

CLASSES = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
# the first of these that a checkpoint's keys contain decides
KEYS = (
    ("double_blocks.", "flux"),
    ("joint_blocks.", "sd3"),
    ("conditioner.embedders.1.", "sdxl"),
    ("input_blocks.", "sd15"),
)


def of_index(text: str) -> str | None:
    """The family that a model_index.json names."""
    return CLASSES.get(json.loads(text).get("_class_name"))


def keys_of(path: Path) -> list[str]:
    """The tensor names of a checkpoint."""
    if path.suffix == ".safetensors":
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            return list(json.loads(stream.read(length)))
    import torch

    state = torch.load(path, map_location="meta", weights_only=True)
    return list(state.get("state_dict", state))


def detect(base: str) -> str | None:
    """The family of a base, or None if it is none of the four. Errors: OSError if it is not to be had."""
    path = Path(base)
    if path.is_dir():
        return of_index((path / "model_index.json").read_text(encoding="utf-8"))
    if path.is_file():
        names = "\n".join(keys_of(path))
        return next((family for part, family in KEYS if part in names), None)
    from huggingface_hub import hf_hub_download

    return of_index(Path(hf_hub_download(base, "model_index.json")).read_text(encoding="utf-8"))
