"""report.html of a training set: thumbnails, captions, buckets, and what was left out."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from lora_training.html_page import write_page
from lora_training.prepare.crops import visible_part

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.data.checks import Finding
    from lora_training.prepare.pictures import Picture
    from lora_training.prepare.preparation import Preparation

MOST_CARDS = 2000  # thumbnails in the file, about 8 KB each
NEARLY_ALL = 0.985  # of a side: a crop that leaves as much is not shown


def write_preparation_page(preparation: Preparation, findings: list[Finding]) -> None:
    """Writes report.html into the output folder, card by card."""
    pictures = sorted(preparation.remaining, key=lambda picture: picture.file)
    left_out = [picture for picture in preparation.pictures if picture.problem]
    settings = preparation.settings
    write_page(
        preparation.output / "report.html",
        "training_set.html",
        title=preparation.output.resolve().name,
        source=settings.data_dir or settings.dataset_name,
        counts=summary_cards(preparation, pictures, len(left_out)),
        findings=findings,
        buckets=used_buckets(preparation, pictures),
        results=preparation.results,
        bucket_names=[bucket_name(preparation, i) for i in sorted({picture.bucket for picture in pictures})],
        caption_sources=sorted({picture.caption_source for picture in pictures if picture.caption_source}),
        has_masks=any(picture.mask_digest for picture in pictures),
        remaining=(card(preparation, picture) for picture in pictures[:MOST_CARDS]),
        omitted=len(pictures) - MOST_CARDS,
        left_out=(card(preparation, picture) for picture in left_out[:MOST_CARDS]),
        has_left_out=bool(left_out),
    )


def summary_cards(preparation: Preparation, pictures: list[Picture], left_out: int) -> list[tuple[int, str]]:
    """The numbers that are asked for first. left_out: how many pictures were."""
    captioned = sum(bool(picture.final_captions) for picture in pictures)
    cards = [(len(pictures), "images"), (left_out, "left out"), (captioned, "with a caption")]
    if preparation.buckets:
        cards.append((len({picture.bucket for picture in pictures}), "buckets in use"))
    return cards


def used_buckets(preparation: Preparation, pictures: list[Picture]) -> list[tuple[int, int, int, str]] | None:
    """(width, height, number of images, no note) of each bucket in use; None without buckets."""
    if not preparation.buckets:
        return None
    counts = Counter(picture.bucket for picture in pictures)
    return [(*size, counts[i], "") for i, size in enumerate(preparation.buckets) if counts[i]]


def bucket_name(preparation: Preparation, number: int) -> str:
    """A bucket's size as text; nothing without buckets."""
    return "{} x {}".format(*preparation.buckets[number]) if preparation.buckets else ""


class Card(NamedTuple):
    """One picture on the page, with its thumbnails as addresses and the crop as CSS."""

    picture: Picture
    facts: list[str]
    bucket: str
    image: str
    mask: str
    crop: str

    @property
    def is_renamed(self) -> bool:
        """Whether its name in the output folder is another than the one it came with."""
        return self.picture.file not in ("", self.picture.name)


def card(preparation: Preparation, picture: Picture) -> Card:
    """A picture with its sizes; what is to be trained on has a sharpness and a bucket, too."""
    facts = ["{} × {}".format(*picture.size)] if picture.size[0] else []
    bucket = crop = ""
    if picture.problem is None:
        size = preparation.training_size(picture) or picture.resized
        if size != picture.size:
            facts[0] += " → {} × {}".format(*size)
        facts.append(f"sharpness {picture.facts['sharpness']:.0f}")
        bucket, crop = bucket_name(preparation, picture.bucket), crop_frame(preparation, picture)
    image = file_address(preparation.thumbnail_file(picture), "jpeg") if picture.digest else ""
    mask = file_address(preparation.mask_thumbnail_file(picture), "png") if picture.mask_digest else ""
    return Card(picture, facts, bucket, image, mask, crop)


def file_address(file: Path, kind: str) -> str:
    """A picture's file as the address of an <img>; empty if there is none."""
    return f"data:image/{kind};base64,{b64encode(file.read_bytes()).decode()}" if file.is_file() else ""


def crop_frame(preparation: Preparation, picture: Picture) -> str:
    """Where the frame around what the crops leave lies; empty where that is nearly all."""
    target = preparation.training_size(picture)
    left, top, right, bottom = visible_part(picture, preparation.steps, target)
    if min(right - left, bottom - top) >= NEARLY_ALL:
        return ""
    sides = {"left": left, "top": top, "right": 1 - right, "bottom": 1 - bottom}
    return ";".join(f"{side}:{100 * share:.1f}%" for side, share in sides.items())
