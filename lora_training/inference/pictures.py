"""Pictures as files: each with its settings in the PNG text, a folder for each run, and a labelled grid."""

from __future__ import annotations

import hashlib
import io
import time
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from lora_training.errors import UserError, one_line
from lora_training.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Hashable

MARGIN, HEADING_HEIGHT = 10, 34  # pixels of the grid
SMALLEST_TILE, LARGEST_TILE = 224, 384  # the longer side of a picture in the grid


def new_run_folder(settings) -> Path:
    """A new folder for this run: date, time and a hash of the settings. Errors: UserError."""
    digest = hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:6]
    folder = Path(settings.paths.infer_path) / f"{time.strftime('%Y%m%d-%H%M%S')}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"paths.infer_path: {folder} can't be made: {error.strerror}") from None
    return folder


def save_settings(settings, folder: Path) -> None:
    """Writes config.yaml, which draws the same with --config. Errors: UserError."""
    import yaml

    values = settings.model_dump(mode="json")
    write_bytes(folder / "config.yaml", yaml.safe_dump(values, sort_keys=False).encode())


def save_picture(image: Image.Image, file: Path, about: dict[str, object] | None = None) -> None:
    """Writes a PNG file with `about` in its text. Errors: UserError, such as for a full disk."""
    text, stream = PngInfo(), io.BytesIO()
    for key, value in (about or {}).items():
        text.add_text(key, str(value))
    image.save(stream, "PNG", pnginfo=text)
    write_bytes(file, stream.getvalue())


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a file that is there whole or not at all. Errors: UserError."""
    try:
        with atomic_write(file) as part:
            part.write_bytes(content)
    except OSError as error:
        raise UserError(f"paths.infer_path: {file} can't be written: {error.strerror}") from None


def draw_grid(images: dict[tuple[int, Hashable, int], Image.Image], prompts: list[str]) -> Image.Image:
    """A labelled sheet: the rows of each prompt under each other, a column per seed.

    images: {(prompt's number, row, image's number): image}; a row's `label` is written before it.
    """
    rows: dict[int, list] = {}
    for p, row, _ in images:
        if row not in rows.setdefault(p, []):
            rows[p].append(row)
    columns = sorted({number for _, _, number in images})
    tile, resample = tile_size(next(iter(images.values())).size)
    large, small = ImageFont.load_default(20), ImageFont.load_default(16)
    label_width = max(small.getlength(row.label) for group in rows.values() for row in group)
    left = max(110, round(label_width) + 2 * MARGIN)
    row_height, row_count = tile[1] + MARGIN, sum(len(group) for group in rows.values())
    width = max(480, left + len(columns) * (tile[0] + MARGIN))
    height = len(rows) * HEADING_HEIGHT + row_count * row_height + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), MARGIN
    for p in sorted(rows):
        heading = fit_text(pen, one_line(prompts[p], 400), large, width - 2 * MARGIN)
        pen.text((MARGIN, y), heading, fill="black", font=large)
        y += HEADING_HEIGHT
        for row in rows[p]:
            pen.text((MARGIN, y + tile[1] // 2 - 10), row.label, fill="#444", font=small)
            for column, number in enumerate(columns):
                x = left + column * (tile[0] + MARGIN)
                sheet.paste(images[p, row, number].resize(tile, resample), (x, y))
            y += row_height
    return sheet


def tile_size(size: tuple[int, int]) -> tuple[tuple[int, int], Image.Resampling]:
    """(width, height) of a picture -> that in the grid, and the filter; small ones grow by whole numbers."""
    longest = max(size)
    if longest < SMALLEST_TILE:
        factor = max(1, round(SMALLEST_TILE / longest))
    else:
        factor = min(1.0, LARGEST_TILE / longest)
    resample = Image.Resampling.NEAREST if factor >= 2 else Image.Resampling.LANCZOS
    return (round(size[0] * factor), round(size[1] * factor)), resample


def fit_text(pen: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    """The text, cut at its end so that it is no wider than `width` pixels."""
    while pen.textlength(text, font=font) > width:
        text = text.rstrip("…")[:-3].rstrip() + "…"
    return text
