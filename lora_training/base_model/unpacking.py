"""A single-file checkpoint unpacked into a diffusers folder, once, without network.

A checkpoint has neither configurations nor tokenizers: they come from a `layout`, a diffusers folder of the
same model, or for SD 1.5 and SDXL from what is known of the released models and CLIP's vocabulary. Pickled
code is never run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.clip_tokenizer import clip_tokenizer
from lora_training.base_model.family_detection import detect_family, tensor_types
from lora_training.base_model.reading import import_class
from lora_training.base_model.released_layout import MODEL_INDEXES, write_layout
from lora_training.base_model.sources import parts_with_weights, set_prediction
from lora_training.errors import UserError, one_line
from lora_training.families import FAMILIES
from lora_training.files import atomic_write

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def unpack_checkpoint(checkpoint: Path, folder: Path, named_family: str | None, layout: Path | None) -> str:
    """Writes the diffusers folder of a checkpoint, with its precision; it appears only when it is whole.

    named_family: None for what the checkpoint's keys say. layout: a diffusers folder of the family; None for
    the released model's. Returns the family. Errors: UserError.
    """
    family = check_checkpoint(checkpoint, folder, named_family, layout)
    if layout is not None:  # whose parts with weights stand in for what the checkpoint lacks
        parts = parts_with_weights(layout, FAMILIES[family].denoiser)
        pipeline = load_checkpoint_pipeline(checkpoint, family, layout, parts)
    else:
        with tempfile.TemporaryDirectory() as work:
            write_released_layout(checkpoint, family, Path(work))
            pipeline = load_checkpoint_pipeline(checkpoint, family, Path(work), {})
    check_finite(checkpoint, pipeline)
    set_prediction(pipeline, checkpoint)
    with atomic_write(folder) as part:
        pipeline.save_pretrained(part)
    return family


def check_checkpoint(checkpoint: Path, folder: Path, named_family: str | None, layout: Path | None) -> str:
    """The checkpoint's family. Errors: UserError for arguments of `unpack_checkpoint` that can't work."""
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such file")
    if checkpoint.suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"{checkpoint}: only .safetensors and .ckpt files are read")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not an empty folder: name another one")
    family = checkpoint_family(checkpoint, named_family)
    if layout is not None:
        check_layout(layout, family, checkpoint)
    return family


def checkpoint_family(checkpoint: Path, named_family: str | None) -> str:
    """The family of a checkpoint file; `named_family` wins over its keys. Errors: UserError."""
    try:
        detected_family = detect_family(str(checkpoint))
    except Exception as error:  # a checkpoint that holds more than tensors, or is none: many kinds
        raise UserError(f"{checkpoint}: not a checkpoint of tensors alone ({one_line(error)})") from None
    for kind in sorted(matrix_types(checkpoint)):
        if not kind.removeprefix("torch.").lower().startswith(("f", "bf")):
            raise UserError(
                f"{checkpoint}: its weights are {kind}, as of a quantised model, which is not read"
            )
    family = named_family or detected_family
    if family is None:
        known = "a base of Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX.1"
        raise UserError(f"{checkpoint}: not {known}; --family names it")
    return family


def check_layout(layout: Path, family: str, checkpoint: Path) -> None:
    """Errors: UserError for a --layout that is no diffusers folder of the family."""
    if not (layout / "model_index.json").is_file():
        raise UserError(f"--layout {layout}: not a diffusers folder: no model_index.json in it")
    try:
        layout_family = detect_family(str(layout))
    except (ValueError, OSError) as error:
        raise UserError(f"--layout {layout}: {error}") from None
    if layout_family != family:
        raise UserError(f"--layout {layout}: not a diffusers folder of {family}, which {checkpoint} is")


def write_released_layout(checkpoint: Path, family: str, folder: Path) -> None:
    """Writes the released model's layout into a folder. Errors: UserError if its tokenizers are missing."""
    if family not in MODEL_INDEXES:
        raise UserError(f"{checkpoint} is {family}: its tokenizers are in no package; give --layout FOLDER")
    tokenizer = clip_tokenizer()
    if tokenizer is None:
        raise UserError(
            "CLIP's vocabulary is needed: pip install --no-deps open_clip_torch (only its data file is read),"
            " or give --layout FOLDER"
        )
    write_layout(family, folder, tokenizer)


def load_checkpoint_pipeline(
    checkpoint: Path, family: str, layout: Path, parts: dict[str, object]
) -> DiffusionPipeline:
    """The checkpoint as a pipeline with the layout's configurations. parts: those that it lacks."""
    pipeline_class = import_class("diffusers", FAMILIES[family].pipeline_class)
    options = {"config": str(layout), "local_files_only": True, "dtype": checkpoint_dtype(checkpoint)}
    try:
        return pipeline_class.from_single_file(str(checkpoint), **options, **parts)
    except Exception as error:  # conversion fails in many ways, all of them the file's or the layout's
        raise UserError(f"{checkpoint}: can't be read as {family} ({one_line(error)})") from None


def checkpoint_dtype(checkpoint: Path) -> torch.dtype:
    """The half precision of a checkpoint's matrices, bfloat16 for 8-bit floats; float32 if they differ."""
    halves = {
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.bfloat16,
        "F8_E5M2": torch.bfloat16,
    }
    kinds = {halves.get(kind, torch.float32) for kind in matrix_types(checkpoint)}
    return kinds.pop() if len(kinds) == 1 else torch.float32


def matrix_types(checkpoint: Path) -> set[str]:
    """The dtypes of a checkpoint's matrices and convolutions, as safetensors spells them."""
    return {dtype for dtype, shape in tensor_types(checkpoint).values() if len(shape) > 1}


def check_finite(checkpoint: Path, pipeline: DiffusionPipeline) -> None:
    """Errors: UserError if a weight is NaN or infinite."""
    for name, module in pipeline.components.items():
        state = module.state_dict() if isinstance(module, torch.nn.Module) else {}
        for key, value in state.items():
            if not torch.isfinite(value).all():
                raise UserError(f"{checkpoint}: {key} of its {name} holds NaN or infinity: it is damaged")
