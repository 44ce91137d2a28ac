"""Pictures inside a page: each made small enough that all of them together stay below a budget."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from PIL import Image

from lora_training.report.run_folder import DAMAGED_PICTURE

if TYPE_CHECKING:
    from pathlib import Path

BUDGET = 4_500_000  # bytes of all pictures of a page before base64, which adds a third
LEAST_SHARE = 1500  # bytes that a picture may have, however many there are
SMALLEST_SIDE = 64  # pixels of the longer side
LOSSLESS_SIDE = 128  # pictures up to this side stay as they are: the toys'


class EncodedPicture(NamedTuple):
    """A picture as the bytes of a PNG or JPEG file, and its (width, height)."""

    format: str
    data: bytes
    size: tuple[int, int]

    @property
    def is_small(self) -> bool:
        """Whether each pixel is to be seen."""
        return max(self.size) <= LOSSLESS_SIDE

    @property
    def address(self) -> str:
        """The picture as the address of an <img>."""
        return f"data:image/{self.format};base64,{base64.b64encode(self.data).decode()}"


class LinkedPicture(NamedTuple):
    """A picture that a page's server has, and its (width, height) there."""

    address: str
    size: tuple[int, int]

    @property
    def is_small(self) -> bool:
        """Whether each pixel is to be seen."""
        return max(self.size) <= LOSSLESS_SIDE


class Tile(NamedTuple):
    """A picture of a page, None if it can't be read; what it shows in words; and what stands below it."""

    picture: EncodedPicture | LinkedPicture | None
    alt: str
    title: str = ""


def encode_within(file: Path, limit: int, largest: int) -> EncodedPicture | None:
    """A picture at the largest size below `limit` bytes and `largest` pixels; None if it can't be read."""
    try:
        with Image.open(file) as source:
            source.draft("RGB", (2 * largest, 2 * largest))
            image = source.convert("RGB")
    except DAMAGED_PICTURE:
        return None
    if max(image.size) <= LOSSLESS_SIDE:
        data = file_bytes(image, "PNG", optimize=True)
        if len(data) <= limit:
            return EncodedPicture("png", data, image.size)
    side = min(largest, max(image.size))
    while True:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        data = file_bytes(small, "JPEG", quality=85, optimize=True)
        if len(data) <= limit or side <= SMALLEST_SIDE:
            break
        image, side = small, max(SMALLEST_SIDE, int(side * min(0.9, (limit / len(data)) ** 0.5)))
    return EncodedPicture("jpeg", data, small.size)


def file_bytes(image: Image.Image, file_format: str, **options) -> bytes:
    """What a picture's file would hold."""
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return out.getvalue()


class PagePictures:
    """Encodes the pictures of a page. count: how many there are at most, which share the budget."""

    def __init__(self, count: int, budget: int = BUDGET) -> None:
        self.limit = max(budget // max(count, 1), LEAST_SHARE)
        self.encoded: dict[tuple[Path, int], EncodedPicture | None] = {}

    def encode(self, file: Path, largest: int = 512, limit: int | None = None) -> EncodedPicture | None:
        """A picture as small as it must be; None if it can't be read.

        largest: pixels of the longer side. limit: bytes, where not each picture's share.
        """
        key = file, largest
        if key not in self.encoded:
            self.encoded[key] = encode_within(file, limit or self.limit, largest)
        return self.encoded[key]


class LinkedPictures:
    """The pictures of a page that a server has, which makes each small when it is asked for.

    folder: the run's; addresses are relative to its page.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def encode(self, file: Path, largest: int = 512, limit: int | None = None) -> LinkedPicture | None:
        """The link to a picture; None if it can't be read. largest: pixels of the longer side."""
        try:
            written = file.stat().st_mtime_ns
            with Image.open(file) as image:
                width, height = image.size
        except DAMAGED_PICTURE:
            return None
        scale = min(1.0, largest / max(width, height))
        name = quote(file.relative_to(self.folder).as_posix())
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return LinkedPicture(f"picture/{name}?side={largest}&written={written}", size)
