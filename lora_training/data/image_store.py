"""Decoded images and masks, scaled to cover their buckets."""

from __future__ import annotations

import hashlib
import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from lora_training.console import print_status, progress
from lora_training.data.buckets import cover_size, nearest_bucket
from lora_training.data.crops import Crop
from lora_training.data.images import decode_image
from lora_training.errors import UserError, one_line

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example

COVER_BUDGET = 2 << 30  # bytes of decoded images kept in memory


def prepare_examples(
    examples: list[Example], buckets: list[tuple[int, int]], args: argparse.Namespace
) -> ImageStore:
    """Decodes every image once: finds broken ones, sizes, buckets and content hashes. Returns the good ones.

    A broken image is left out with a line that names it; with none left, it's an error.
    """
    store = ImageStore(examples, buckets, args.image_interpolation_mode, COVER_BUDGET)

    def problem_of(index: int) -> str | None:
        try:
            image = measure_example(examples[index], buckets)
        except (ValueError, OSError) as error:
            return str(error)
        if not store.is_long(index, examples[index].bucket):
            store.cover(index, examples[index].bucket, image)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress("images", len(examples)) as bar:
        problems = [(problem, bar.update())[0] for problem in pool.map(problem_of, range(len(examples)))]
    for example, problem in zip(examples, problems, strict=True):
        if problem is not None:
            print_status(f"warning: {example.name} is left out: {problem}")
    store.examples = [e for e, problem in zip(examples, problems, strict=True) if problem is None]
    if not store.examples:
        raise UserError("none of the images can be read; see the lines above")
    return store


def measure_example(example: Example, buckets: list[tuple[int, int]]):
    """Decodes an image and notes its hash, size and bucket. Errors: ValueError or OSError with the reason."""
    raw = example.read()
    image = decode_image(raw)
    example.digest, example.size = hashlib.sha256(raw).hexdigest(), image.size
    places = example.places or range(len(buckets))
    example.bucket = places[nearest_bucket(image.size, [buckets[place] for place in places])]
    return image


class ImageStore:
    """Decoded images scaled to cover a bucket, as uint8 arrays; as many as fit into the budget stay in
    memory.

    Of a picture so long that its cover were over 16 times the bucket (1 x 4000 pixels: 3 GB) only a window is
    scaled.
    """

    def __init__(
        self, examples: list[Example], buckets: list[tuple], interpolation: str, budget: int
    ) -> None:
        self.examples, self.buckets = examples, buckets
        self.resample = getattr(Image.Resampling, interpolation.upper())
        self.left, self.kept = budget, {}  # bytes; by name and bucket

    def __getstate__(self) -> dict:  # a spawned worker decodes anew: all pixels would be too much to send
        return vars(self) | {"left": 0, "kept": {}}

    def is_long(self, index: int, bucket: int) -> bool:
        """Whether only a window of the image is scaled."""
        size, target = self.examples[index].size, self.buckets[bucket]
        return math.prod(cover_size(size, target)) > 16 * math.prod(target)

    def window(self, index: int, bucket: int, crop: Crop) -> tuple[object, Crop]:
        """(what surrounds a crop, half the bucket on each side as turned pictures need it; the crop's place
        in it).
        """
        if not self.is_long(index, bucket):
            return self.cover(index, bucket), crop
        image, target = self.decoded(index), self.buckets[bucket]
        cover, begin = cover_size(image.size, target), (crop.left, crop.top)
        spans = [
            (max(0, b - t // 2), min(c, b + t + t // 2)) for b, t, c in zip(begin, target, cover, strict=True)
        ]
        (left, right), (top, bottom) = spans
        box = [
            side / c * s
            for side, c, s in zip((left, top, right, bottom), cover * 2, image.size * 2, strict=True)
        ]
        part = image.resize((right - left, bottom - top), self.resample, box)
        return part, Crop(crop.left - left, crop.top - top, crop.flip)

    def decoded(self, index: int):
        """Image `index` in its own size.

        Errors: UserError if it's no longer there, or has changed to what is none.
        """
        try:
            return decode_image(self.examples[index].read())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.examples[index].name} could be read when the run began, and can't now: {error}"
            ) from None

    def cover(self, index: int, bucket: int, image=None):
        """Image `index` scaled so that it just covers `bucket`, as an RGB image."""
        example = self.examples[index]
        if (example.name, bucket) in self.kept:
            return Image.fromarray(self.kept[example.name, bucket])
        image = image or self.decoded(index)
        size = cover_size(image.size, self.buckets[bucket])
        image = image if image.size == size else image.resize(size, self.resample)
        array = np.asarray(image)
        if array.nbytes <= self.left:
            self.left -= array.nbytes
            self.kept[example.name, bucket] = array
        return image


class MaskStore(ImageStore):
    """The masks of an ImageStore's images, (H, W) from 0, hardly trained, to 255; scaled and cropped as the
    images are.
    """

    def decoded(self, index: int):
        """A mask in its image's size. Errors: UserError if it can't be read, or is of another shape."""
        example = self.examples[index]
        if example.read_mask is None:
            return Image.new("L", example.size, 255)
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(example.read_mask())))
            own = example.read_mask == example.read
            mask = image.convert("RGBA").getchannel("A") if own else image.convert("L")
        except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
            raise UserError(
                f"--masked_loss: the mask of {example.name} can't be read: {one_line(error)}"
            ) from None
        if abs(mask.width / mask.height * example.size[1] / example.size[0] - 1) > 0.02:
            raise UserError(
                f"--masked_loss: the mask of {example.name} has another shape: {mask.size}, {example.size}"
            )
        if not mask.getbbox():
            raise UserError(
                f"--masked_loss: the mask of {example.name} is black (or the picture clear) all over"
            )
        return mask.resize(example.size)
