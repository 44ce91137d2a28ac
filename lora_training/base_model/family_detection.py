"""Which of the four model families a base belongs to, found out without reading its weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.errors import UserError, one_line
from lora_training.families import FAMILIES
from lora_training.files import read_safetensors_header

if TYPE_CHECKING:
    import torch

FAMILY_OF_PIPELINE = {family.pipeline_class: name for name, family in FAMILIES.items()}
# the first of these that a single-file checkpoint's keys contain decides
FAMILY_OF_KEYS = (
    ("double_blocks.", "flux"),
    ("joint_blocks.", "sd3"),
    ("conditioner.embedders.1.", "sdxl"),
    ("input_blocks.", "sd15"),
)


def detect_family(base: str) -> str | None:
    """The family of a diffusers folder, a checkpoint file or a hub id; None if it is none of the four.

    Errors: ValueError for a damaged one, OSError for one that isn't there; for a .ckpt file those of torch,
    too.
    """
    path = Path(base)
    if path.is_dir():
        return family_of_index((path / "model_index.json").read_text(encoding="utf-8"))
    if path.is_file():
        names = "\n".join(tensor_types(path))
        return next((family for part, family in FAMILY_OF_KEYS if part in names), None)
    from huggingface_hub import hf_hub_download

    return family_of_index(Path(hf_hub_download(base, "model_index.json")).read_text(encoding="utf-8"))


def require_family(base: str) -> str:
    """The family of a base. Errors: UserError that names a base that can't be read, or is of none of them."""
    try:
        family = detect_family(base)
    except Exception as error:  # the hub's client and torch's reader of pickles raise many kinds
        if Path(base).exists():
            problem = "damaged, or no base"
        else:
            problem = "neither a folder nor a file, nor to be had from the hub"
        raise UserError(f"{base}: {problem} ({one_line(error)})") from None
    if family is None:
        raise UserError(f"{base}: not a base of Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX.1")
    return family


def family_of_index(text: str) -> str | None:
    """The family whose pipeline a model_index.json names. Errors: ValueError for a damaged one."""
    try:
        return FAMILY_OF_PIPELINE.get(str(json.loads(text).get("_class_name")))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"model_index.json is damaged ({error})") from None


def tensor_types(checkpoint: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype, shape)} of a checkpoint's tensors.

    The dtype is as safetensors spells it: "F32", "BF16". Errors: those of safetensors or torch, for what is
    no checkpoint or holds more than tensors.
    """
    if checkpoint.suffix == ".safetensors":
        return read_safetensors_header(checkpoint)[1]
    import torch

    spelling = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    tensors = read_pickled_tensors(checkpoint, "meta")
    return {name: (spelling.get(t.dtype, str(t.dtype)), tuple(t.shape)) for name, t in tensors.items()}


def read_pickled_tensors(checkpoint: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The tensors of a .ckpt checkpoint; no code in it is run. Errors: those of torch, or ValueError."""
    import torch

    with warnings.catch_warnings(action="ignore"):  # of a pickle's age; one that holds more is an error
        state = torch.load(checkpoint, map_location=device, weights_only=True)
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict):
        raise ValueError("no table of tensors in it")
    return {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}
