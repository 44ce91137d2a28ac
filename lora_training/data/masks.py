"""--masked_loss: which file is the mask of which picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status, summarize_names
from lora_training.data.folders import IMAGE_SUFFIXES
from lora_training.errors import UserError

if TYPE_CHECKING:
    from lora_training.data.folders import Example


def attach_masks(
    examples: list[Example], folder: Path, where: str | None, suffixes: set[str] = IMAGE_SUFFIXES
) -> list[Example]:
    """The examples that aren't masks themselves, each with its mask.

    where: "alpha" (each picture's own channel), a folder with pictures of the same names, or how the names of
    masks in the same folder end, beginning with "-" or "_". suffixes: of image files. Errors: UserError if no
    picture has a mask.
    """
    if where is None:
        return examples
    if where == "alpha":
        masks = {example.name: example.read for example in examples}
    else:
        examples, masks = match_masks(examples, folder, where, suffixes)
    for example in examples:
        example.read_mask = masks.get(example.name)
    if not masks:
        raise UserError(f"--masked_loss {where}: no mask for any of {len(examples)} images")
    if without := [example.name for example in examples if example.name not in masks]:
        names = summarize_names(without)
        print_status(f"warning: {len(without)} images have no mask, and count as a whole ({names})")
    return examples


def match_masks(
    examples: list[Example], folder: Path, where: str, suffixes: set[str]
) -> tuple[list[Example], dict]:
    """(the examples that aren't masks, {name of an example: reads its mask})."""
    ending, mask_folder = (where, folder) if where[0] in "-_" else ("", Path(where))
    mask_folder = mask_folder.resolve()
    files = [file for file in mask_folder.rglob("*") if file.suffix.lower() in suffixes]
    files = [file for file in files if file.stem.endswith(ending)]
    by_name = {file.relative_to(mask_folder).with_suffix("").as_posix(): file for file in files}
    examples = [example for example in examples if Path(folder, example.name).resolve() not in set(files)]
    masks = {}
    for example in examples:
        name = Path(example.name).with_suffix("").as_posix() + ending
        if name in by_name:
            masks[example.name] = by_name[name].read_bytes
    return examples, masks
