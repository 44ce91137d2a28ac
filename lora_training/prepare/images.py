"""Images and masks of the training set, each decoded and encoded once whatever the steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.data.folders import IMAGE_SUFFIXES
from lora_training.data.images import decode_image
from lora_training.prepare.crops import resize_and_crop
from lora_training.prepare.parallel import in_parallel
from lora_training.prepare.pictures import (
    decode_mask,
    encode_image,
    header_facts,
    short_digest,
    write_file,
)
from lora_training.prepare.reading import MASK_ENDING

if TYPE_CHECKING:
    from lora_training.prepare.pictures import Picture
    from lora_training.prepare.preparation import Preparation
    from lora_training.prepare.settings import AspectRatioBucketing, ImageResizing, Steps

SUFFIXES = {  # by Pillow's format
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "GIF": ".gif",
}
FORMATS = {"jpg": "JPEG", "png": "PNG"}  # Pillow's, by the name in the settings
COPY_QUALITY = 95  # of pictures that can't be copied as they are


def write_images(preparation: Preparation) -> None:
    """Writes the images, and the masks of those that have one; what an earlier run has written stays."""
    steps, pictures, workers = preparation.steps, preparation.remaining, preparation.workers

    def write_one(picture: Picture) -> bool:
        return write_image(preparation, picture)

    done = sum(is_new for _, is_new in in_parallel(write_one, pictures, workers, "writing"))
    named = (("resizing", steps.image_resizing), ("bucketing", steps.aspect_ratio_bucketing))
    step = " + ".join(name for name, settings in named if settings) or "copying"
    note = "" if preparation.writing_step else "copied as they are"
    preparation.note_result(step, len(pictures), done, len(pictures) - done, note)
    write_masks(preparation)


def write_masks(preparation: Preparation) -> None:
    """Writes the masks, each beside its picture."""
    pictures = preparation.remaining
    masked = [picture for picture in pictures if picture.mask_digest]
    if not masked:
        return

    def write_one(picture: Picture) -> bool:
        return write_mask(preparation, picture)

    done = sum(is_new for _, is_new in in_parallel(write_one, masked, preparation.workers, "writing masks"))
    note = f"{len(pictures) - len(masked)} images without one"
    preparation.note_result("masks", len(masked), done, len(masked) - done, note)


def write_image(preparation: Preparation, picture: Picture) -> bool:
    """Writes a picture's image, unless an earlier run has, from the same picture in the same way.

    Sets its file. Returns whether it was written. An image that a person has changed since then stays, too.
    """
    steps, writer, target = preparation.steps, preparation.writing_step, preparation.crop_target(picture)
    copied_suffix = suffix_of_copy(picture)
    suffix = f".{writer.format}" if writer else copied_suffix or ".jpg"
    picture.file = f"{picture.stem}{suffix}"
    made_from = (dump(steps.image_resizing), target, dump(writer), picture.file)
    key = short_digest(picture.digest, *made_from)
    if is_written(preparation, picture.stem, picture.file, key):
        return False
    raw = picture.read()
    if writer:
        raw = render_image(raw, steps, target, writer)
    elif copied_suffix is None:
        raw = encode_image(decode_image(raw), "jpg", COPY_QUALITY)
    earlier = preparation.journal.get("image", picture.stem)
    if earlier and earlier["file"] != picture.file:
        preparation.output_file(earlier["file"]).unlink(missing_ok=True)
    write_and_note(preparation, picture.stem, picture.file, key, raw)
    return True


def suffix_of_copy(picture: Picture) -> str | None:
    """The ending of a picture that is copied as it is; None for a format that can't be trained on."""
    suffix, file_format = Path(picture.name).suffix.lower(), picture.facts["format"]
    return suffix if suffix in IMAGE_SUFFIXES and file_format != "HEIF" else SUFFIXES.get(file_format)


def write_mask(preparation: Preparation, picture: Picture) -> bool:
    """Writes a picture's mask, shaped as the picture, unless an earlier run has. Returns whether it did."""
    steps, target = preparation.steps, preparation.crop_target(picture)
    stem = f"{picture.stem}{MASK_ENDING}"
    made_from = (dump(steps.image_resizing), target, dump(steps.aspect_ratio_bucketing))
    key = short_digest(picture.mask_digest, *made_from)
    if is_written(preparation, stem, f"{stem}.png", key):
        return False
    mask = resize_and_crop(decode_mask(picture), steps, target)
    write_and_note(preparation, stem, f"{stem}.png", key, encode_image(mask, "png"))
    return True


def dump(step) -> dict | None:
    """A step's settings as a dict; None for a step that is off."""
    return step.model_dump() if step else None


def is_written(preparation: Preparation, stem: str, name: str, key: str) -> bool:
    """Whether an earlier run has written a file for this key, and it's still there, retouched or not.

    Errors: UserError if a link leads out of the output folder.
    """
    earlier, file = preparation.journal.get("image", stem), preparation.output_file(name)
    return bool(earlier and earlier["key"] == key and file.is_file() and file.stat().st_size)


def write_and_note(preparation: Preparation, stem: str, name: str, key: str, content: bytes) -> None:
    """Writes a file of the output folder and notes it in the journal."""
    write_file(preparation.output_file(name), content)
    preparation.journal.put("image", stem, {"key": key, "file": name, "bytes": len(content)})


def render_image(
    raw: bytes,
    steps: Steps,
    target: tuple[int, int] | None,
    writer: ImageResizing | AspectRatioBucketing,
) -> bytes:
    """The bytes of an image's file: decoded once, resized, cropped to its bucket, encoded once.

    target: the bucket, or None. writer: the step whose format and quality hold. A file that already is what
    would come out (size, RGB, upright, format) is returned as it is.
    """
    source = decode_image(raw)
    image = resize_and_crop(source, steps, target)
    plain = {"format": FORMATS[writer.format], "mode": "RGB", "turned": False, "gps": False}
    if image.size == source.size and header_facts(raw) == plain:
        return raw
    return encode_image(image, writer.format, writer.quality)
