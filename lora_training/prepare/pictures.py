"""A picture on its way into a training set: what is known of it, and how that is measured."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image

from lora_training.data.folders import IMAGE_SUFFIXES, Example
from lora_training.data.image_store import MaskStore
from lora_training.data.images import decode_image
from lora_training.files import atomic_write
from lora_training.prepare.duplicates import Fingerprint, fingerprint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

THUMBNAIL_SIDE = 224  # pixels of the longer side
SHARPNESS_SIDE = 1024  # pixels of the longer side at which sharpness is measured


@dataclass
class Picture:
    """One source image. Sizes are (width, height) in pixels, upright."""

    name: str
    read: Callable[[], bytes] | None
    captions: list[str]
    stem: str = ""  # its name in the output folder, without suffix
    digest: str = ""  # SHA-256 of the file
    read_mask: Callable[[], bytes] | None = None  # --masked_loss: as `read`, of the picture that is its mask
    mask_digest: str = ""  # of the picture and its mask
    size: tuple[int, int] = (0, 0)
    fingerprint: Fingerprint = Fingerprint(0, 0, b"")
    facts: dict = field(default_factory=dict)  # sharpness, and what `header_facts` gives
    problem: str | None = None  # why it's left out
    caption_source: str = ""
    tags: str = ""
    final_captions: list[str] = field(default_factory=list)  # with trigger word, or as a person edited them
    resized: tuple[int, int] = (0, 0)  # its size after image_resizing
    bucket: int = 0
    file: str = ""  # in the output folder

    def note_measurement(self, measurement: dict) -> None:
        """Takes over what `measure_picture` gave, or an earlier run's journal."""
        bits, reliable, colors = measurement["look"]
        self.size, self.facts = tuple(measurement["size"]), measurement["facts"]
        self.fingerprint = Fingerprint(bits, reliable, base64.b64decode(colors))


@functools.cache
def phone_suffixes() -> frozenset[str]:
    """The endings of phones' pictures, which Pillow can read from now on; none without pillow-heif."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return frozenset()
    register_heif_opener()
    return frozenset({".heic", ".heif"})


def readable_suffixes() -> set[str]:
    """The endings of pictures that can be prepared: those that can be trained on, and phones'."""
    return IMAGE_SUFFIXES | phone_suffixes()


def measure_picture(raw: bytes, thumbnail: Path) -> dict:
    """Decodes a file, writes its thumbnail, and returns what is known of it, as the journal stores it.

    That is {"size", "look", "facts"}, or {"problem": why the picture can't be used}.
    """
    try:
        image = decode_image(raw)
        facts = header_facts(raw) | {"sharpness": round(sharpness(image), 1)}
    except (ValueError, OSError) as error:
        return {"problem": str(error)}
    bits, reliable, colors = fingerprint(image)
    look = [bits, reliable, base64.b64encode(colors).decode()]
    measurement = {"size": image.size, "look": look, "facts": facts}
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS, reducing_gap=1.0)
    write_file(thumbnail, encode_image(image, "jpg", 75))
    return measurement


def header_facts(raw: bytes) -> dict:
    """What a file tells without being decoded.

    Returns {"format", "mode", "turned": whether EXIF turns it, "gps": whether it holds a position}. Errors:
    OSError or ValueError for what is no image.
    """
    with Image.open(io.BytesIO(raw)) as image:
        turned = gps = False
        with contextlib.suppress(Exception):  # a damaged EXIF block is as good as none
            exif = image.getexif()
            turned = exif.get(ExifTags.Base.Orientation, 1) != 1
            gps = bool(exif.get_ifd(ExifTags.IFD.GPSInfo))
        return {"format": image.format, "mode": image.mode, "turned": turned, "gps": gps}


def sharpness(image: Image.Image) -> float:
    """Variance of the Laplacian of the grey values, at 1024 pixels or less, so that any sizes compare.

    Pech-Pacheco et al. 2000, Diatom autofocusing in brightfield microscopy.
    """
    grey = image.convert("L")
    grey.thumbnail((SHARPNESS_SIDE, SHARPNESS_SIDE), Image.Resampling.BOX)
    g = np.asarray(grey).astype(np.int16)
    if min(g.shape) < 3:
        return 0.0
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1]
    laplacian += g[1:-1, :-2]
    laplacian += g[1:-1, 2:]
    laplacian -= 4 * g[1:-1, 1:-1]
    values = laplacian.ravel().astype(np.float32)
    return float(values @ values / values.size - values.mean(dtype=np.float64) ** 2)


def decode_mask(picture: Picture) -> Image.Image:
    """The mask of a picture, (L) in its size, as training reads it. Errors: UserError."""
    example = Example(picture.name, [], picture.read, size=picture.size, read_mask=picture.read_mask)
    return MaskStore([example], [], "lanczos", 0).decode(0)


def encode_mask_thumbnail(mask: Image.Image) -> bytes:
    """A mask (L) as a PNG file to lie over the picture's thumbnail: red where it hardly counts."""
    mask.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    red = Image.new("RGB", mask.size, "red")
    red.putalpha(mask.point(lambda value: round(0.6 * (255 - value))))
    return encode_image(red, "png")


def encode_image(image: Image.Image, file_format: str, quality: int = 0) -> bytes:
    """An image as the bytes of a "jpg" (colour at full resolution) or "png" file, without metadata."""
    out = io.BytesIO()
    if file_format == "jpg":
        image.save(out, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(out, "PNG", compress_level=4)
    return out.getvalue()


def write_file(file: Path, content: bytes) -> None:
    """Writes a file, and the folders that it lies in, so that it's there as a whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as part:
        part.write_bytes(content)


def short_digest(*parts: object) -> str:
    """A short name for a content that is made from `parts`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]
