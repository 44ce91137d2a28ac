"""The first steps of a preparation: the pictures are listed, and each is decoded once."""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status, summarize_names
from lora_training.data.examples import source_examples
from lora_training.errors import UserError
from lora_training.prepare.file_names import portable_path, readable_name
from lora_training.prepare.parallel import in_parallel
from lora_training.prepare.pictures import (
    Picture,
    decode_mask,
    encode_mask_thumbnail,
    measure_picture,
    readable_suffixes,
    short_digest,
    write_file,
)

if TYPE_CHECKING:
    from lora_training.prepare.preparation import Preparation
    from lora_training.prepare.settings import Settings

MASK_ENDING = "-mask"  # of a mask's name, as --masked_loss=-mask of the training scripts takes it
MISSING = "named in the metadata, but there is no such file"


def source_args(settings: Settings) -> argparse.Namespace:
    """The settings as the flags of a training that say where pictures and captions come from."""
    return argparse.Namespace(
        dataset_name=settings.dataset_name,
        dataset_config_name=settings.dataset_config_name,
        dataset_split=settings.dataset_split,
        train_data_dir=settings.data_dir,
        instance_data_dir=None,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        caption_per_line=False,
        caption_extension=None,
        masked_loss=settings.masked_loss,
        cache_dir=settings.cache_dir,
    )


def list_pictures(preparation: Preparation) -> None:
    """Lists the pictures and gives each its name in the output folder.

    A picture keeps that name in later runs, whatever is added. Errors: UserError for a name that is a mask's.
    """
    settings, journal = preparation.settings, preparation.journal
    missing: list[str] = []
    examples = source_examples(source_args(settings), missing, readable_suffixes())
    if settings.data_dir is not None:
        report_links(Path(settings.data_dir).resolve())
    used_stems = {str(stem).lower() for _, stem in journal.items("name")}
    for example in examples:
        name = readable_name(example.name)
        stem = journal.get("name", name)
        if stem is None:
            stem = free_stem(name, used_stems)
            used_stems.add(stem.lower())
            journal.put("name", name, stem)
        if (settings.masked_loss or settings.masks) and stem.endswith(MASK_ENDING):
            way_out = (
                "rename it" if settings.masked_loss else f"rename it, or give --masked_loss={MASK_ENDING}"
            )
            what = f"a picture's name that ends with {MASK_ENDING} is a mask's"
            raise UserError(f"{name}: {what}: {way_out}")
        source = "kept" if example.captions else ""
        picture = Picture(name, example.read, example.captions, stem, caption_source=source)
        picture.read_mask = example.read_mask
        preparation.pictures.append(picture)
    preparation.pictures += [Picture(name, None, [], problem=MISSING) for name in missing]


def free_stem(name: str, used_stems: set[str]) -> str:
    """The name of a picture in the output folder, with a number if another has it, in any case of letters."""
    path = Path(re.sub(r"^row (\d+)$", r"row_\1", name)).with_suffix("").as_posix()  # rows of a data set
    stem = portable_path(path)
    numbered = (f"{stem}_{number}" for number in itertools.count(2))
    return next(s for s in itertools.chain([stem], numbered) if s.lower() not in used_stems)


def report_links(folder: Path) -> None:
    """Names the symbolic links that lead out of the input folder.

    A file is read and copied as if it lay there, a folder is not entered.
    """
    links = [
        path
        for path in folder.rglob("*")
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(folder)
    ]
    kinds = (
        (Path.is_file, "files outside it: read as if they lay there"),
        (Path.is_dir, "folders: left alone"),
    )
    for is_kind, what in kinds:
        names = [readable_name(str(path.relative_to(folder))) for path in links if is_kind(path)]
        if names:
            count = f"{len(names)} symbolic links to {what}"
            print_status(f"note: in {folder}, {count} ({summarize_names(names)})")


def read_pictures(preparation: Preparation) -> None:
    """Decodes each picture once: size, fingerprint, sharpness, thumbnail, mask; or why it can't be used."""
    fresh = 0

    def read(picture: Picture) -> tuple[dict, bool]:
        return read_picture(preparation, picture)

    for picture, (measurement, is_fresh) in in_parallel(
        read, preparation.remaining, preparation.workers, "reading"
    ):
        picture.problem = measurement.get("problem")
        if picture.problem is None:
            fresh += is_fresh
            picture.note_measurement(measurement)
    pictures = preparation.pictures
    reasons = preparation.count_problems(pictures)
    preparation.note_result("reading", len(pictures), fresh, len(preparation.remaining) - fresh, reasons)


def read_picture(preparation: Preparation, picture: Picture) -> tuple[dict, bool]:
    """(what is known of a picture, whether it had to be measured). Sets its digests.

    What is known is a dict as `measure_picture` gives it; {"problem": reason} if the picture can't be used.
    """
    try:
        raw = picture.read()
    except OSError as error:
        return {"problem": error.strerror}, False
    picture.digest = hashlib.sha256(raw).hexdigest()
    measurement = preparation.journal.get("look", picture.digest)
    is_fresh = measurement is None
    if is_fresh:
        measurement = measure_picture(raw, preparation.thumbnail_file(picture))
        if "problem" not in measurement:  # what can't be read now may be readable with another library
            preparation.journal.put("look", picture.digest, measurement)
    if picture.read_mask is not None and "problem" not in measurement:
        picture.size = tuple(measurement["size"])
        if problem := read_mask(preparation, picture):
            return {"problem": problem}, is_fresh
    return measurement, is_fresh


def read_mask(preparation: Preparation, picture: Picture) -> str | None:
    """Sets the digest of a picture's mask and writes its thumbnail. Returns why the mask can't be used."""
    try:
        picture.mask_digest = short_digest(picture.digest, picture.read_mask())
        thumbnail = preparation.mask_thumbnail_file(picture)
        if not thumbnail.is_file():
            write_file(thumbnail, encode_mask_thumbnail(decode_mask(picture)))
    except (OSError, UserError) as error:
        return str(error).removeprefix("--masked_loss: ")
    return None
