"""Pictures inside a page: each once made small enough, so that all of them together stay below a budget."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from scripts.reports.parts.run_folder import BROKEN_PICTURE

BUDGET = 4_500_000  # bytes of all pictures of a page before base64, which adds a third
SMALLEST = 64  # edge
LOSSLESS = 128  # pictures up to this edge stay as they are: the toys'


def encoded(file: Path, limit: int, largest: int) -> tuple[str, bytes, tuple[int, int]] | None:
    """(kind, bytes, size) of the picture at the largest edge that stays below `limit` bytes; None if it can't be read."""
    try:
        with Image.open(file) as source:
            source.draft("RGB", (2 * largest, 2 * largest))
            image = source.convert("RGB")
    except BROKEN_PICTURE:
        return None
    if max(image.size) <= LOSSLESS:
        data = saved(image, "PNG", optimize=True)
        if len(data) <= limit:
            return "png", data, image.size
    edge = min(largest, max(image.size))
    while True:
        small = image.copy()
        small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        data = saved(small, "JPEG", quality=85, optimize=True)
        if len(data) <= limit or edge <= SMALLEST:
            break
        image, edge = small, max(SMALLEST, int(edge * min(0.9, (limit / len(data)) ** 0.5)))
    return "jpeg", data, small.size


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


class Pictures:
    """Makes the <img> of a page's pictures. `count`: how many there will be at most, which share the budget."""

    def __init__(self, count: int, budget: int = BUDGET) -> None:
        self.limit = max(budget // max(count, 1), 1500)
        self.made: dict[tuple[Path, int], tuple | None] = {}

    def img(self, file: Path, alt: str, largest: int = 512, most: int | None = None) -> str:
        """An <img> with its size, so that nothing moves while it appears. `most`: bytes, other than each one's share."""
        key = file, largest
        if key not in self.made:
            self.made[key] = encoded(file, most or self.limit, largest)
        if self.made[key] is None:
            return '<span class="gone">no picture</span>'
        kind, data, (width, height) = self.made[key]
        small = ' class="px"' if max(width, height) <= LOSSLESS else ""
        return (
            f'<img{small} alt="{escape(alt)}" width="{width}" height="{height}" decoding="async"'
            f' src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
        )
