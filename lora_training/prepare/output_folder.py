"""The output folder beside the training set: the list of what was left out, and an earlier run's files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.prepare.caption_files import read_caption_file, write_json_lines
from lora_training.prepare.reading import MASK_ENDING

if TYPE_CHECKING:
    from lora_training.prepare.preparation import Preparation


def write_left_out(preparation: Preparation) -> None:
    """Writes left_out.jsonl: each file that isn't in the set, and why."""
    pictures = [picture for picture in preparation.pictures if picture.problem]
    rows = [{"file_name": picture.name, "reason": picture.problem} for picture in pictures]
    write_json_lines(preparation.output / "left_out.jsonl", rows)


def remove_outdated_files(preparation: Preparation) -> None:
    """Removes what an earlier run has written for pictures that are gone or left out now.

    Images and captions that a person has edited stay.
    """
    journal, pictures = preparation.journal, preparation.remaining
    current = {picture.stem for picture in pictures}
    current |= {f"{picture.stem}{MASK_ENDING}" for picture in pictures if picture.mask_digest}
    removed = 0
    for stem, written in journal.items("image"):
        if written is None or stem in current:
            continue
        file, captions = preparation.output_file(written["file"]), journal.get("text", stem)
        caption_file = file.with_suffix(".txt")
        if file.is_file() and file.stat().st_size == written["bytes"]:
            file.unlink()
        if caption_file.is_file() and read_caption_file(caption_file) == (captions or [])[:1]:
            caption_file.unlink()
        journal.put("image", stem, None)
        removed += 1
    if removed:
        what = "are gone from the input, or left out now: removed from the output"
        print_status(f"{removed} images of an earlier run {what}")
