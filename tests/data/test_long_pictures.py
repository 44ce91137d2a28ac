"""Of a picture far longer than its bucket only a window is scaled, which shows what the whole would."""

from __future__ import annotations

import io
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lora_training.data.buckets import cover_size
from lora_training.data.crops import crop_and_augment, draw_crop
from lora_training.data.folders import Example
from lora_training.data.image_store import ImageStore

pytestmark = pytest.mark.faults

BUCKET = (64, 96)
UNCHANGED = SimpleNamespace(center_crop=False, random_flip=False, random_rotation=None, color_jitter=None)


def store_of(size: tuple[int, int]) -> tuple[ImageStore, Image.Image]:
    """A store with one soft picture of a size, and the picture."""
    shape = (size[1] // 2 + 1, size[0] // 2 + 1, 3)
    small = np.random.default_rng(0).integers(90, 160, shape, dtype=np.uint8)
    image, buffer = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC), io.BytesIO()
    image.save(buffer, "PNG")
    example = Example("a.png", ["a"], buffer.getvalue, size=size)
    return ImageStore([example], [BUCKET], "lanczos", 0), image


@pytest.mark.parametrize("size", [(1, 3000), (9000, 2), (3, 20000), (16000, 7)])
def test_of_a_long_picture_only_a_window_is_scaled(size):
    store, _ = store_of(size)
    cover, rng = cover_size(size, BUCKET), random.Random(0)
    for _ in range(5):
        crop = draw_crop(cover, BUCKET, rng, UNCHANGED)
        part, inner = store.window(0, 0, crop)
        assert math.prod(part.size) <= 4 * math.prod(BUCKET)
        assert crop_and_augment(part, BUCKET, inner, rng, UNCHANGED).size == BUCKET


@pytest.mark.parametrize("size", [(20, 700), (900, 30), (10, 333)])
def test_the_window_shows_what_the_whole_picture_would(size):
    store, image = store_of(size)
    cover, rng = cover_size(size, BUCKET), random.Random(1)
    whole = np.asarray(image.resize(cover, Image.Resampling.LANCZOS), dtype=float)
    assert store.is_long(0, 0)
    for _ in range(5):
        crop = draw_crop(cover, BUCKET, rng, UNCHANGED)
        part, inner = store.window(0, 0, crop)
        shown = np.asarray(crop_and_augment(part, BUCKET, inner, rng, UNCHANGED), dtype=float)
        expected = whole[crop.top : crop.top + 96, crop.left : crop.left + 64]
        assert np.abs(shown - expected).max() <= 2  # of 255: rounding
