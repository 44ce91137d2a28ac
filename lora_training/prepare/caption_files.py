"""Captions of the training set: a .txt beside each image, and metadata.jsonl.

What a person has changed there since the last run stays.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_training.data.captions import as_captions, decode_text, prepend_trigger
from lora_training.data.metadata_files import read_metadata
from lora_training.prepare.pictures import write_file

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.prepare.pictures import Picture
    from lora_training.prepare.preparation import Preparation

BY_HAND = "by hand"  # the source of captions that a person has edited


def write_captions(preparation: Preparation) -> None:
    """Writes the .txt files and metadata.jsonl."""
    pictures, trigger = preparation.remaining, preparation.settings.trigger_word
    listed_before = read_listed_captions(preparation.output / "metadata.jsonl")
    fresh, edited = 0, 0
    for picture in sorted(pictures, key=lambda picture: picture.file):
        captions = picture.captions or ([""] if trigger else [])
        picture.final_captions = [prepend_trigger(caption, trigger) for caption in captions]
        last = preparation.journal.get("text", picture.stem)
        fresh += last != picture.final_captions
        file = preparation.output_file(picture.file).with_suffix(".txt")
        by_hand = edited_captions(picture, file, last, listed_before.get(picture.file, last))
        if by_hand is not None:
            picture.final_captions, picture.caption_source = by_hand, BY_HAND
            edited += 1
        write_caption_file(file, picture.final_captions, is_edited=by_hand is not None)
    write_metadata(preparation)
    for picture in pictures:  # at last, so that an interruption isn't taken for an edit
        if picture.caption_source != BY_HAND:
            preparation.journal.put("text", picture.stem, picture.final_captions)
    note = f"{sum(not picture.final_captions for picture in pictures)} without"
    note += f", {edited} edited by hand kept" if edited else ""
    preparation.note_result("captions", len(pictures), fresh, len(pictures) - fresh, note)


def read_listed_captions(file: Path) -> dict[str, object]:
    """{file name: caption or list of captions} of an earlier run's metadata.jsonl."""
    if not file.is_file():
        return {}
    return {str(row["file_name"]): row.get("text", "") for _, row in read_metadata(file)}


def read_caption_file(file: Path) -> list[str]:
    """The caption in a .txt file of the output folder, as a list of none or one."""
    return as_captions(decode_text(file.read_bytes(), file))


def edited_captions(picture: Picture, file: Path, last: list[str] | None, listed: object) -> list[str] | None:
    """The captions that a person has written into the .txt file or into metadata.jsonl; None without an edit.

    last: the captions that the last run has written, or None. listed: those in its metadata.jsonl by now.
    """
    if last is None or not file.is_file():
        return None
    text = read_caption_file(file)
    if text not in (last[:1], picture.final_captions[:1]):
        return text
    listed = as_captions(listed)
    return listed if listed not in (last, picture.final_captions) else None


def write_caption_file(file: Path, captions: list[str], is_edited: bool) -> None:
    """Writes the first caption beside its image.

    Without a caption there is no file, unless a person has emptied it.
    """
    content = (captions[0] + "\n").encode() if captions else b""
    if not captions and not is_edited:
        file.unlink(missing_ok=True)
    elif not file.is_file() or file.read_bytes() != content:
        write_file(file, content)


def write_metadata(preparation: Preparation) -> None:
    """Writes metadata.jsonl: name, captions, size and bucket of each image, in the order of their names."""
    rows = []
    for picture in sorted(preparation.remaining, key=lambda picture: picture.file):
        width, height = preparation.crop_target(picture) or picture.resized
        row = {"file_name": picture.file, "text": picture.final_captions, "width": width, "height": height}
        if preparation.buckets:
            row["bucket"] = "{} x {}".format(*preparation.buckets[picture.bucket])
        rows.append(row)
    # a column of lists or one of texts, for readers that want one type
    if all(len(row["text"]) < 2 for row in rows):
        rows = [row | {"text": "".join(row["text"])} for row in rows]
    write_json_lines(preparation.output / "metadata.jsonl", rows)


def write_json_lines(file: Path, rows: list[dict]) -> None:
    """Writes a file of JSON lines."""
    write_file(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
