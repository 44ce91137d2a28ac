"""Images in folders, with captions from metadata or text files."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status, printable, summarize_names
from lora_training.data.captions import as_captions, decode_text
from lora_training.errors import UserError, one_line

if TYPE_CHECKING:
    import argparse

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".avif"}

CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass
class Example:
    """One training image. `read()` gives the file's bytes; sizes are (width, height) in pixels, upright."""

    name: str
    captions: list[str]
    read: object
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    bucket: int = 0
    held_out: bool = False
    read_mask: object = None  # as `read`, of the picture that is its mask
    own: argparse.Namespace = None  # the flags of its set
    places: list[int] | None = None  # of the buckets that are its set's; None: all


def folder_examples(
    folder: Path, caption_column: str | None, missing: list[str] | None = None, per_line: bool = False
):
    """Images below a folder with captions from metadata files, or from a .txt or .caption beside each image.

    per_line: each line of a text file is a caption, else the whole is one. Where both are there and differ,
    the text file is taken, for it's what people edit; a named column wins over it. Files that the metadata
    name and that are not there are an error, or are noted in `missing`, if it's given. A picture that is a
    link is read wherever it leads; a folder that is one is not entered, which is said.
    """
    folder = folder.resolve()
    paths = [f for f in sorted(folder.rglob("*")) if "/." not in f"/{f.relative_to(folder).as_posix()}"]
    if lost := [printable(f.name) for f in paths if f.is_symlink() and not f.is_file()]:
        print_status(
            f"warning: {summarize_names(lost)}: a link to a folder, which is not entered, or to nothing"
        )
    files = [f for f in paths if f.is_file()]
    described: dict[Path, list[str]] = {}
    metas, again = [f for f in files if f.name in ("metadata.jsonl", "metadata.csv")], []
    for meta in metas:
        for line, row in read_metadata(meta):
            image = Path(
                os.path.normpath(meta.parent / row["file_name"].replace("\\", "/"))
            )  # as Windows writes it
            if not image.is_relative_to(folder):
                raise UserError(
                    f"{meta} line {line}: file_name {row['file_name']!r} leads out of the data folder"
                )
            captions = caption_of_row(row, caption_column, f"{meta} line {line}")
            if os.path.isfile(image):  # which takes names that are too long, too
                if described.get(image, captions) != captions:
                    again.append(f"{meta.name} line {line}: {row['file_name']}")
                described[image] = captions
            elif missing is not None:
                missing.append(row["file_name"])
            else:
                raise UserError(f"{meta} line {line}: file_name {row['file_name']!r}: there is no such file")
    if again:
        print_status(
            f"warning: described before, with another caption; the later one is taken: {summarize_names(again)}"
        )
    if caption_column and not metas:
        raise UserError(
            f"--caption_column {caption_column} has no effect: {folder} has no metadata.jsonl or .csv"
        )
    examples, strays, edited = [], Counter(), []
    for file in files:
        suffix = file.suffix.lower()
        if suffix not in IMAGE_SUFFIXES and file not in described:
            if suffix not in (".txt", ".caption", ".jsonl", ".csv", ".json", ".md", ".html"):
                strays[printable(file.suffix or file.name)] += 1
            continue
        name, captions = printable(file.relative_to(folder).as_posix()), described.get(file, [])
        if not captions or caption_column is None:
            beside = [b for b in (file.with_suffix(".txt"), file.with_suffix(".caption")) if b.is_file()][:1]
            texts = [decode_text(b.read_bytes(), b) for b in beside]
            written = [c for text in texts for c in as_captions(text.splitlines() if per_line else text)]
            if written and written[0] not in captions:
                edited += [name] if captions else []
                captions = written
        examples.append(Example(name, captions, file.read_bytes))
    if edited:
        print_status(
            f"{summarize_names(edited)}: the text file and the metadata differ; the text file's caption is taken"
        )
    if strays:
        print_status("not images, left alone: " + ", ".join(f"{n} x {what}" for what, n in strays.items()))
    return examples


def read_metadata(file: Path) -> list[tuple[int, dict]]:
    """(line, row) of a metadata.jsonl or metadata.csv; each row has a file_name that can be one.

    Errors: UserError.
    """
    rows, number, is_csv = [], 0, file.suffix == ".csv"
    stream = io.StringIO(decode_text(file.read_bytes(), file), newline=None)  # U+2028 ends no line of JSON
    csv.field_size_limit(2**31 - 1)  # its own limit is 131,072 characters
    try:
        for number, line in enumerate(reader := csv.DictReader(stream) if is_csv else stream, 1):
            number = reader.line_num if is_csv else number
            if is_csv or line.strip():
                rows.append((number, line if is_csv else json.loads(line)))
    except (ValueError, RecursionError, csv.Error) as error:
        kind, number = ("CSV", number + 1) if is_csv else ("JSON", number)
        raise UserError(f"{file} line {number}: not {kind}: {one_line(error)}") from None
    for number, row in rows:
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name.strip() or "\0" in name or printable(name) != name:
            raise UserError(f"{file} line {number}: no file_name" + (f" can be {name!r}" if name else ""))
    return rows


def caption_of_row(row: dict, column: str | None, where: str) -> list[str]:
    """The captions in a row: of the given column, or of the one of text, caption, prompt that exists."""
    if column is not None and column not in row:
        raise UserError(f"--caption_column {column}: {where} has the columns {', '.join(map(str, row))}")
    value = row[column] if column else next((row[c] for c in CAPTION_COLUMNS if row.get(c)), None)
    if not all(
        isinstance(v, str | int | float | None) for v in (value if isinstance(value, list) else [value])
    ):
        raise UserError(f"{where}: a caption is text, or a list of texts, and not {one_line(value)}")
    return as_captions(value)
