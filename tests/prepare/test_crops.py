"""Resizing, cropping and buckets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from photo_folders import photo
from PIL import Image

from lora_training.data.buckets import bucket_sizes
from lora_training.families import SD15
from lora_training.prepare import crops
from lora_training.prepare.buckets import make_buckets
from lora_training.prepare.settings import AspectRatioBucketing, ImageResizing

pytestmark = pytest.mark.unit


def halves(width: int, height: int) -> Image.Image:
    """Left red, right blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


@pytest.mark.unit
@pytest.mark.parametrize(
    ("settings", "size", "pixels"),
    [
        ({}, (64, 64), {(4, 32): "red", (60, 32): "blue"}),
        ({"crop_position": "left"}, (64, 64), {(4, 32): "red", (58, 32): "red"}),
        ({"crop_position": "right"}, (64, 64), {(4, 32): "blue", (60, 32): "blue"}),
        ({"crop_position": "none"}, (128, 64), {(4, 32): "red", (120, 32): "blue"}),
        (
            {"mode": "contain", "fill": "#00ff00"},
            (64, 64),
            {(4, 32): "red", (60, 32): "blue", (32, 4): "lime"},
        ),
        ({"mode": "contain", "fill": "none"}, (64, 32), {(4, 16): "red", (60, 16): "blue"}),
        ({"target_resolution": "96x32"}, (96, 32), {(4, 16): "red", (90, 16): "blue"}),
    ],
)
def test_resizing_covers_or_contains(settings, size, pixels):
    step = ImageResizing(**{"target_resolution": 64, "crop_position": "center"} | settings)
    result = crops.resize_image(halves(200, 100), step)
    assert result.size == size == crops.resized_size((200, 100), step)
    for place, colour in pixels.items():
        expected = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert np.abs(np.array(result.getpixel(place)) - expected).max() < 8


@pytest.mark.unit
def test_crop_and_scale_at_once_is_scale_and_crop():
    image = photo(301, 217, 1)
    size = crops.scaled_size(image.size, (96, 128), "cover")
    apart = image.resize(size, Image.Resampling.LANCZOS).crop(crops.crop_box(size, (96, 128), "top"))
    at_once = crops.scale_and_crop(image, (96, 128), "lanczos", "top")
    assert np.abs(np.asarray(apart).astype(int) - np.asarray(at_once)).max() <= 1


def test_the_buckets_are_those_that_training_makes(tmp_path):
    args = SimpleNamespace(resolution=[512], aspect_ratio_buckets="auto", family=SD15)
    made = make_buckets(AspectRatioBucketing(base_resolution=512))
    assert sorted(made) == sorted(bucket_sizes(args))
    wider = make_buckets(AspectRatioBucketing(base_resolution=512, max_aspect_ratio=3))
    assert max(w / h for w, h in wider) > 2.5 and set(made) < set(wider)
    narrow = make_buckets(AspectRatioBucketing(base_resolution=512, max_aspect_ratio=1.3, divisibility=64))
    assert all(w % 64 == h % 64 == 0 and 0.7 < w / h < 1.4 for w, h in narrow)
    custom = AspectRatioBucketing(custom_buckets="512,256;256,512")
    assert make_buckets(custom) == [(256, 512), (512, 256)]
