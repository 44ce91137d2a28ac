"""Images in folders, with captions from metadata files or from text files beside them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status, printable, summarize_names
from lora_training.data.captions import as_captions, decode_text
from lora_training.data.metadata_files import caption_of_row, read_metadata
from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".avif"}
TEXT_SUFFIXES = (".txt", ".caption", ".jsonl", ".csv", ".json", ".md", ".html")  # which no line needs to name


@dataclass(eq=False)  # an image is itself, and not what has its name: two sets may have images of one name
class Example:
    """One training image. `read()` gives the file's bytes; sizes are (width, height) in pixels, upright."""

    name: str  # for people
    captions: list[str]
    read: object
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    bucket: int = 0
    held_out: bool = False
    read_mask: object = None  # as `read`, of the picture that is its mask
    set_args: argparse.Namespace = None  # the flags of its set
    bucket_numbers: list[int] | None = None  # the buckets of its set; None: all
    marked_captions: list[str] = ()  # with |||, which says what tags stay in front; as they are drawn
    draw_key: str = ""  # what its draws depend on, of no other image


def folder_examples(
    folder: Path,
    caption_column: str | None,
    missing: list[str] | None = None,
    per_line: bool = False,
    suffixes: set[str] = IMAGE_SUFFIXES,
    extension: str | None = None,
) -> list[Example]:
    """Images below a folder with captions from metadata files, or from a .txt or .caption beside each image.

    per_line: each line of a text file is a caption, else the whole is one. suffixes: of image files.
    extension: how the names of text files end, None for .txt, else .caption. Where
    both are there and differ, the text file is taken, for it's what people edit; a named column wins over it.
    Files that the metadata name and that are not there are an error, or are noted in `missing`, if it's
    given. A picture that is a link is read wherever it leads; a folder that is one is not entered, which is
    said.
    """
    folder = folder.resolve()
    files = files_below(folder)
    described = described_captions(folder, files, caption_column, missing)
    endings = [".txt", ".caption"]
    if extension:
        endings = [f".{extension}" if extension.isalnum() else extension]
    texts_beside = {(file.parent, file.name.lower()): file for file in reversed(files)}
    examples, edited, others = [], [], Counter()
    for file in files:
        suffix = file.suffix.lower()
        if suffix not in suffixes and file not in described:
            if not file.name.lower().endswith((*TEXT_SUFFIXES, *map(str.lower, endings))):
                others[printable(file.suffix or file.name)] += 1
            continue
        name, captions = printable(file.relative_to(folder).as_posix()), described.get(file, [])
        if not captions or caption_column is None:
            texts = text_captions(file, texts_beside, endings, per_line)
            if texts and texts[0] not in captions:
                edited += [name] if captions else []
                captions = texts
        examples.append(Example(name, captions, file.read_bytes))
    if edited:
        what = "the text file and the metadata differ; the text file's caption is taken"
        print_status(f"{summarize_names(edited)}: {what}")
    if others:
        counts = ", ".join(f"{number} x {suffix}" for suffix, number in others.items())
        print_status(f"not images, left alone: {counts}")
    return examples


def files_below(folder: Path) -> list[Path]:
    """The files in a folder and the folders inside it, in order, without hidden ones."""
    paths = sorted(folder.rglob("*"))
    paths = [path for path in paths if "/." not in f"/{path.relative_to(folder).as_posix()}"]
    if links := [printable(path.name) for path in paths if path.is_symlink() and not path.is_file()]:
        names = summarize_names(links)
        print_status(f"warning: {names}: a link to a folder, which is not entered, or to nothing")
    return [path for path in paths if path.is_file()]


def text_captions(
    image: Path, texts_beside: dict[tuple[Path, str], Path], endings: list[str], per_line: bool
) -> list[str]:
    """The captions in the text file beside an image: x.txt, or x.jpg.txt, for x.jpg.

    texts_beside: files by folder and name in small letters. endings: of such files' names, the first one
    first.
    """
    for ending in endings:
        exact = [image.with_suffix(""), image]
        for beside in (image.with_name(f"{each.name}{ending}") for each in exact):
            file = beside if beside.is_file() else texts_beside.get((beside.parent, beside.name.lower()))
            if file:
                text = decode_text(file.read_bytes(), file)
                return as_captions(text.splitlines() if per_line else text)
    return []


def described_captions(
    folder: Path, files: list[Path], caption_column: str | None, missing: list[str] | None
) -> dict[Path, list[str]]:
    """{image: captions} as the metadata files among `files` say. missing: as `folder_examples` takes it."""
    described, repeated = {}, []
    metadata_files = [file for file in files if file.name in ("metadata.jsonl", "metadata.csv")]
    for metadata in metadata_files:
        for line, row in read_metadata(metadata):
            where, name = f"{metadata} line {line}", row["file_name"]
            image = Path(os.path.normpath(metadata.parent / name.replace("\\", "/")))  # as Windows writes it
            if not image.is_relative_to(folder):
                raise UserError(f"{where}: file_name {name!r} leads out of the data folder")
            captions = caption_of_row(row, caption_column, where)
            if os.path.isfile(image):  # which takes names that are too long, too
                if described.get(image, captions) != captions:
                    repeated.append(f"{metadata.name} line {line}: {name}")
                described[image] = captions
            elif missing is not None:
                missing.append(name)
            else:
                raise UserError(f"{where}: file_name {name!r}: there is no such file")
    if repeated:
        what = "described before, with another caption; the later one is taken"
        print_status(f"warning: {what}: {summarize_names(repeated)}")
    if caption_column and not metadata_files:
        flag = f"--caption_column {caption_column}"
        raise UserError(f"{flag} has no effect: {folder} has no metadata.jsonl or .csv")
    return described
