"""Images and masks decoded and scaled to cover their buckets; as many as fit stay in memory."""

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
from lora_training.data.images import decode_image, to_8_bits
from lora_training.errors import UserError, one_line

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example

MEMORY_BUDGET = 2 << 30  # bytes of decoded images


def prepare_examples(
    examples: list[Example], buckets: list[tuple[int, int]], args: argparse.Namespace
) -> ImageStore:
    """Decodes every image once, for sizes, buckets and content hashes; returns a store of the good ones.

    A broken image is left out with a line that names it. Errors: UserError if none is left.
    """
    store = ImageStore(examples, buckets, args.image_interpolation_mode, MEMORY_BUDGET)

    def find_problem(index: int) -> str | None:
        try:
            image = measure_example(examples[index], buckets)
        except (ValueError, OSError) as error:
            return str(error)
        if not store.is_long(index, examples[index].bucket):
            store.cover(index, examples[index].bucket, image)
        return None

    problems = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, progress("images", len(examples)) as bar:
        for problem in pool.map(find_problem, range(len(examples))):
            problems.append(problem)
            bar.update()
    for example, problem in zip(examples, problems, strict=True):
        if problem is not None:
            print_status(f"warning: {example.name} is left out: {problem}")
    store.examples = [e for e, problem in zip(examples, problems, strict=True) if problem is None]
    if not store.examples:
        folder = args.train_data_dir or args.instance_data_dir or args.dataset_name or args.dataset_config
        first = next(filter(None, problems), "")
        raise UserError(f"{folder}: none of the {len(examples)} images can be read ({first})")
    return store


def measure_example(example: Example, buckets: list[tuple[int, int]]):
    """Decodes an image and notes its hash, size and bucket. Errors: ValueError or OSError with the reason."""
    raw = example.read()
    image = decode_image(raw)
    example.digest, example.size = hashlib.sha256(raw).hexdigest(), image.size
    numbers = example.bucket_numbers or range(len(buckets))
    example.bucket = numbers[nearest_bucket(image.size, [buckets[number] for number in numbers])]
    return image


class ImageStore:
    """Decoded images scaled to cover a bucket, as uint8 arrays; as many as fit into the budget stay in
    memory.

    Of a picture so long that its cover were over 16 times the bucket (1 x 4000 pixels: 3 GB) only a window is
    scaled.
    """

    def __init__(
        self, examples: list[Example], buckets: list[tuple[int, int]], interpolation: str, budget: int
    ) -> None:
        """budget: bytes."""
        self.examples, self.buckets = examples, buckets
        self.resample = getattr(Image.Resampling, interpolation.upper())
        self.free_bytes = budget
        self.covers: dict[tuple[Example, int], np.ndarray] = {}  # by image and bucket

    def __getstate__(self) -> dict:  # a spawned worker decodes anew: all pixels would be too much to send
        return vars(self) | {"free_bytes": 0, "covers": {}}

    def is_long(self, index: int, bucket: int) -> bool:
        """Whether only a window of the image is scaled."""
        size, target = self.examples[index].size, self.buckets[bucket]
        return math.prod(cover_size(size, target)) > 16 * math.prod(target)

    def window(self, index: int, bucket: int, crop: Crop) -> tuple[object, Crop]:
        """(the image around a crop, scaled; where the crop lies in it).

        It reaches half the bucket beyond the crop on each side, as turned pictures need it.
        """
        if not self.is_long(index, bucket):
            return self.cover(index, bucket), crop
        image, target = self.decode(index), self.buckets[bucket]
        cover = cover_size(image.size, target)
        left, right = span_around(crop.left, target[0], cover[0])
        top, bottom = span_around(crop.top, target[1], cover[1])
        corners = zip((left, top, right, bottom), cover * 2, image.size * 2, strict=True)
        box = [side / covering * original for side, covering, original in corners]
        part = image.resize((right - left, bottom - top), self.resample, box)
        return part, Crop(crop.left - left, crop.top - top, crop.flip)

    def decode(self, index: int):
        """Image `index` in its own size.

        Errors: UserError if it's no longer there, or has changed to what is no image.
        """
        name = self.examples[index].name
        try:
            return decode_image(self.examples[index].read())
        except (OSError, ValueError) as error:
            raise UserError(f"{name} could be read when the run began, and can't now: {error}") from None

    def cover(self, index: int, bucket: int, image=None):
        """Image `index` scaled so that it just covers `bucket`, as an RGB image. image: the same, decoded."""
        key = (self.examples[index], bucket)
        if key in self.covers:
            return Image.fromarray(self.covers[key])
        image = image or self.decode(index)
        size = cover_size(image.size, self.buckets[bucket])
        image = image if image.size == size else image.resize(size, self.resample)
        array = np.asarray(image)
        if array.nbytes <= self.free_bytes:
            self.free_bytes -= array.nbytes
            self.covers[key] = array
        return image


def span_around(start: int, length: int, limit: int) -> tuple[int, int]:
    """(begin, end) of a stretch with half its length on either side, within 0 to `limit`."""
    return max(0, start - length // 2), min(limit, start + length + length // 2)


class MaskStore(ImageStore):
    """The masks of an ImageStore's images, (H, W), scaled and cropped as the images are.

    255 is what is trained on, 0 what hardly counts.
    """

    def decode(self, index: int):
        """A mask in its image's size. Errors: UserError if it can't be read, or is of another shape."""
        example = self.examples[index]
        if example.read_mask is None:
            return Image.new("L", example.size, 255)
        flag = f"--masked_loss: the mask of {example.name}"
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(example.read_mask())))
            is_alpha = example.read_mask == example.read
            mask = image.convert("RGBA").getchannel("A") if is_alpha else to_8_bits(image).convert("L")
        except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
            raise UserError(f"{flag} can't be read: {one_line(error)}") from None
        if abs(mask.width / mask.height * example.size[1] / example.size[0] - 1) > 0.02:
            raise UserError(f"{flag} has another shape: {mask.size}, {example.size}")
        if not mask.getbbox():
            raise UserError(f"{flag} is black (or the picture clear) all over")
        return mask.resize(example.size)
