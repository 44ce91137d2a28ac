"""What prepare_dataset.py does to pictures: measuring, leaving out, scaling, cropping and assigning buckets."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from scripts.dataset.parts.looks import look_of, near_duplicates
from scripts.parts.files import replace

try:  # pictures of phones; Pillow alone doesn't read them
    from pillow_heif import register_heif_opener

    register_heif_opener()
    PHONE_SUFFIXES = {".heic", ".heif"}
except ImportError:
    PHONE_SUFFIXES = set()

THUMBNAIL = 224  # pixels of the longer side
POSITIONS = {"center": (0.5, 0.5), "top": (0.5, 0.0), "bottom": (0.5, 1.0), "left": (0.0, 0.5), "right": (1.0, 0.5)}
RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 5 / 2, 3, 4)  # sides of buckets, both ways


@dataclass
class Picture:
    """One source image on its way. Sizes are (width, height) in pixels, upright; `stem` is its name in the output."""

    name: str
    read: object
    captions: list[str]
    stem: str = ""
    digest: str = ""
    read_mask: object = None  # --masked_loss: as `read`, of the picture that is its mask
    mask: str = ""  # a digest of the picture and its mask
    size: tuple[int, int] = (0, 0)
    look: tuple[int, int, bytes] = (0, 0, b"")
    facts: dict = field(default_factory=dict)  # sharpness, mode, format, turned, gps
    problem: str | None = None  # why it's left out
    caption_source: str = ""
    tags: str = ""
    final: list[str] = field(default_factory=list)
    resized: tuple[int, int] = (0, 0)  # after image_resizing
    bucket: int = 0
    file: str = ""  # in the output folder


def sharpness(image) -> float:
    """Variance of the Laplacian of the grey values at no more than 1024 pixels, so that large and small compare.

    Source: Pech-Pacheco et al. 2000, Diatom autofocusing in brightfield microscopy.
    """
    grey = image.convert("L")
    grey.thumbnail((1024, 1024), Image.Resampling.BOX)
    g = np.asarray(grey).astype(np.int16)
    if min(g.shape) < 3:
        return 0.0
    laplacian = g[:-2, 1:-1] + g[2:, 1:-1]
    laplacian += g[1:-1, :-2]
    laplacian += g[1:-1, 2:]
    laplacian -= 4 * g[1:-1, 1:-1]
    values = laplacian.ravel().astype(np.float32)
    return float(values @ values / values.size - values.mean(dtype=np.float64) ** 2)


def header_facts(raw: bytes) -> dict:
    """What a file says without being decoded: format, colour mode, whether EXIF turns it or holds a GPS position."""
    with Image.open(io.BytesIO(raw)) as image:
        turned = gps = False
        with contextlib.suppress(Exception):  # a damaged EXIF block is as good as none
            exif = image.getexif()
            turned = exif.get(ExifTags.Base.Orientation, 1) != 1
            gps = bool(exif.get_ifd(ExifTags.IFD.GPSInfo))
        return {"format": image.format, "mode": image.mode, "turned": turned, "gps": gps}


def measure(raw: bytes, script, thumbnail: Path) -> dict:
    """Decodes a file, writes its thumbnail, and returns what is known of it, or {"problem": why it can't be used}."""
    with contextlib.suppress(Exception), Image.open(io.BytesIO(raw)) as opened:  # what else is wrong, decode_image says
        if opened.mode == "F" and not np.isfinite(np.asarray(opened)).all():
            return {"problem": "damaged (values that are no numbers)"}
    try:
        image = script.decode_image(raw)
        facts = header_facts(raw) | {"sharpness": round(sharpness(image), 1)}
    except (ValueError, OSError) as error:
        return {"problem": str(error)}
    bits, sure, colours = look_of(image)
    known = {"size": image.size, "look": [bits, sure, base64.b64encode(colours).decode()], "facts": facts}
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=1.0)
    write_whole(thumbnail, encode(image, "jpg", 75))
    return known


def mask_thumbnail(mask) -> bytes:
    """A mask (L) as a PNG file to be laid over the picture's thumbnail: red where it hardly counts."""
    mask.thumbnail((THUMBNAIL, THUMBNAIL))
    red = Image.new("RGB", mask.size, "red")
    red.putalpha(mask.point(lambda value: round(0.6 * (255 - value))))
    return encode(red, "png", 0)


def encode(image, form: str, quality: int) -> bytes:
    """An image as the bytes of a JPEG (colour at full resolution) or PNG file, without metadata."""
    out = io.BytesIO()
    if form == "jpg":
        image.save(out, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(out, "PNG", compress_level=4)
    return out.getvalue()


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file so that it's there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{threading.get_ident()}.partial")  # copies of a picture share a thumbnail
    partial.write_bytes(content)
    replace(partial, file)


def leave_out(pictures: list[Picture], step) -> None:
    """image_filtering: sets `problem` of pictures that are too small, too long, blurred or copies of others."""
    for p in pictures:
        ratio = p.size[0] / p.size[1]
        if min(p.size) < step.min_size:
            p.problem = f"too small: {p.size[0]} x {p.size[1]}, min_size {step.min_size}"
        elif not step.min_aspect_ratio <= ratio <= step.max_aspect_ratio:
            p.problem = (
                f"too long: {p.size[0]} x {p.size[1]} is {ratio:.2f}, allowed {step.min_aspect_ratio:g} to"
                f" {step.max_aspect_ratio:g}"
            )
        elif step.blur_threshold is not None and p.facts["sharpness"] < step.blur_threshold:
            p.problem = f"blurred: sharpness {p.facts['sharpness']:g}, blur_threshold {step.blur_threshold:g}"
    if step.remove_duplicates:
        # the largest stays; among equals one with a caption
        rest = sorted(
            (p for p in pictures if p.problem is None), key=lambda p: (-p.size[0] * p.size[1], not p.captions, p.name)
        )
        for i, j in near_duplicates([p.look for p in rest], step.duplicate_distance):
            if rest[i].problem is None and rest[j].problem is None:
                rest[j].problem = f"duplicate of {rest[i].name}"


def keeps_shape(step) -> bool:
    """Whether image_resizing scales a picture alone, without a crop or a border."""
    return (step.crop_position if step.mode == "cover" else step.fill) == "none"


def resized_size(size: tuple[int, int], step) -> tuple[int, int]:
    """The (width, height) of a picture after image_resizing."""
    return scaled_size(size, step.target_resolution, step.mode) if keeps_shape(step) else step.target_resolution


def scaled_size(size: tuple[int, int], box: tuple[int, int], mode: str) -> tuple[int, int]:
    """`size` scaled, shape kept, so that it just covers the box or is just contained in it."""
    scales = box[0] / size[0], box[1] / size[1]
    if mode == "cover":
        scale = max(scales)
        return max(box[0], round(size[0] * scale)), max(box[1], round(size[1] * scale))
    scale = min(scales)
    return max(1, min(box[0], round(size[0] * scale))), max(1, min(box[1], round(size[1] * scale)))


def scaled(image, size: tuple[int, int], interpolation: str):
    """The image at `size`; unchanged if it has it."""
    if image.size == size:
        return image
    return image.resize(size, getattr(Image.Resampling, interpolation.upper()))


def crop_box(size: tuple[int, int], target: tuple[int, int], position: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of `size` that is kept."""
    u, v = POSITIONS[position]
    left, top = round((size[0] - target[0]) * u), round((size[1] - target[1]) * v)
    return left, top, left + target[0], top + target[1]


def cover(image, target: tuple[int, int], interpolation: str, position: str):
    """The image scaled to cover `target` and cropped to it; only what is kept is computed."""
    size = scaled_size(image.size, target, "cover")
    box = crop_box(size, target, position)
    if size == image.size:
        return image.crop(box) if target != size else image
    x, y = image.width / size[0], image.height / size[1]
    part = box[0] * x, box[1] * y, box[2] * x, box[3] * y
    return image.resize(target, getattr(Image.Resampling, interpolation.upper()), box=part)


def resize(image, step):
    """image_resizing of one picture."""
    if step.mode == "cover" and not keeps_shape(step):
        return cover(image, step.target_resolution, step.interpolation, step.crop_position)
    image = scaled(image, scaled_size(image.size, step.target_resolution, step.mode), step.interpolation)
    if keeps_shape(step):
        return image
    width, height = step.target_resolution
    canvas = Image.new(image.mode, (width, height), step.fill if image.mode == "RGB" else 0)  # a border is not trained
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas


def make_buckets(step) -> list[tuple[int, int]]:
    """The (width, height) of aspect_ratio_bucketing: custom_buckets, or sizes of about base_resolution squared pixels."""
    if step.custom_buckets is not None:
        return step.custom_buckets
    from diffusers.training_utils import generate_aspect_ratio_buckets

    ratios = [r for r in RATIOS if r <= step.max_aspect_ratio + 1e-6]
    shapes = [pair for r in ratios for pair in ((1000, round(1000 * r)), (round(1000 * r), 1000))]
    pairs = generate_aspect_ratio_buckets(step.base_resolution, step.divisibility, base_resolutions=shapes)
    return [(w, h) for h, w in pairs]


def kept_part(p: Picture, resizing, bucketing, target: tuple[int, int] | None) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what is left of a picture after both crops, as shares of its sides."""
    left, top, right, bottom = 0.0, 0.0, 1.0, 1.0
    if resizing and resizing.mode == "cover" and not keeps_shape(resizing):
        size = scaled_size(p.size, resizing.target_resolution, "cover")
        box = crop_box(size, resizing.target_resolution, resizing.crop_position)
        left, top, right, bottom = box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]
    if target is not None:
        size = scaled_size(p.resized, target, "cover")
        box = crop_box(size, target, bucketing.crop_position)
        width, height = right - left, bottom - top
        right, bottom = left + width * box[2] / size[0], top + height * box[3] / size[1]
        left, top = left + width * box[0] / size[0], top + height * box[1] / size[1]
    return left, top, right, bottom


def is_on_the_way(size: tuple[int, int], resizing, target: tuple[int, int]) -> bool:
    """Whether image_resizing keeps the whole picture, at no less than the bucket's size: cropping the source to the bucket
    gives the same picture, scaled once."""
    return keeps_shape(resizing) and all(t <= a for t, a in zip(target, resized_size(size, resizing), strict=True))


def shaped(image, resizing, target: tuple[int, int] | None, bucketing):
    """A picture or its mask, resized and cropped to its bucket."""
    if resizing is not None and not (target and is_on_the_way(image.size, resizing, target)):
        image = resize(image, resizing)
    if target is not None:
        image = cover(image, target, bucketing.interpolation, bucketing.crop_position)
    return image


def render(raw: bytes, script, resizing, target: tuple[int, int] | None, bucketing, form: str, quality: int) -> bytes:
    """The bytes of the output file: decoded once, resized, cropped to its bucket, encoded once.

    A file that already is what would come out (size, RGB, upright, format) is returned as it is.
    """
    whole = script.decode_image(raw)
    image = shaped(whole, resizing, target, bucketing)
    facts = header_facts(raw)
    plain = {"format": {"jpg": "JPEG", "png": "PNG"}[form], "mode": "RGB", "turned": False, "gps": False}
    return raw if image.size == whole.size and facts == plain else encode(image, form, quality)


def digest_of(*parts: object) -> str:
    """A short name for a content made from `parts`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def in_parallel(work, items: list, workers: int, title: str):
    """Yields (item, work(item)) in order, computed by threads a few items ahead, with a progress bar."""
    from tqdm import tqdm

    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(items), desc=title, unit=" images", disable=not items) as bar,
    ):
        waiting = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 2 * workers:
                    done, result = waiting.popleft()
                    yield done, result.result()
                    bar.update()
            while waiting:
                done, result = waiting.popleft()
                yield done, result.result()
                bar.update()
        finally:
            for _, result in waiting:
                result.cancel()
