"""Finds out which of the four model families a base belongs to, without reading its weights."""

from __future__ import annotations

import json
import struct
import warnings
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
    """The family that a model_index.json names. Errors: ValueError for a damaged one."""
    try:
        return CLASSES.get(str(json.loads(text).get("_class_name")))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"model_index.json is damaged ({error})") from None


def tensors_of(path: Path) -> dict[str, tuple[str, int]]:
    """{name: (dtype, number of dimensions)} of a checkpoint's tensors.

    The dtype is "F32", "F16", "BF16", … as safetensors says it. Errors: those of json, struct or torch, for what is no
    checkpoint or holds more than tensors.
    """
    if path.suffix == ".safetensors":
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        return {name: (t["dtype"], len(t["shape"])) for name, t in header.items() if name != "__metadata__"}
    import torch

    short = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    return {name: (short.get(t.dtype, str(t.dtype)), t.dim()) for name, t in pickled_tensors(path, "meta").items()}


def pickled_tensors(path: Path, device: str = "cpu") -> dict:
    """The tensors of a .ckpt checkpoint, by name; no code in it is run. Errors: those of torch, or ValueError."""
    import torch

    with warnings.catch_warnings(action="ignore"):  # of a pickle's age; one that holds more than tensors is an error
        state = torch.load(path, map_location=device, weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise ValueError("no table of tensors in it")
    return {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}


def detect(base: str) -> str | None:
    """The family of a base, or None if it is none of the four. Errors: OSError if it is not to be had."""
    path = Path(base)
    if path.is_dir():
        return of_index((path / "model_index.json").read_text(encoding="utf-8"))
    if path.is_file():
        names = "\n".join(tensors_of(path))
        return next((family for part, family in KEYS if part in names), None)
    from huggingface_hub import hf_hub_download

    return of_index(Path(hf_hub_download(base, "model_index.json")).read_text(encoding="utf-8"))


class BaseError(Exception):
    """Why a base's family can't be told, as one line."""


def family_of(base: str) -> str:
    """The family of a base. Errors: BaseError that names the base."""
    try:
        family = detect(base)
    except Exception as error:  # the hub's client and torch's reader of pickles raise many kinds
        reason = " ".join(str(error).split())[:200]
        there = (
            "damaged, or no base" if Path(base).exists() else "neither a folder nor a file, nor to be had from the hub"
        )
        raise BaseError(f"{base}: {there} ({reason})") from None
    if family is None:
        raise BaseError(f"{base}: not a base of Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX.1")
    return family
