"""Buckets, crops and what a sample says of its crop."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from color_profiles import ADOBE_RGB, DISPLAY_P3, profile
from conftest import (
    to_pixels,
    training_data,
)
from PIL import Image, ImageDraw
from toy_parts import arguments, components_of, data_of

from lora_training.data.batches import Slot
from lora_training.data.buckets import nearest_bucket
from lora_training.data.crops import Crop, crop_and_augment, draw_crop
from lora_training.data.folders import Example
from lora_training.data.image_store import ImageStore, prepare_examples
from lora_training.data.images import decode_image
from lora_training.seeds import stable_seed

pytestmark = pytest.mark.unit


def test_nearest_bucket_goes_by_aspect_ratio():
    buckets = [(64, 64), (96, 48), (48, 96), (128, 64)]
    assert nearest_bucket((1000, 1000), buckets) == 0
    assert nearest_bucket((2000, 1000), buckets) == 3  # the larger of two with the same ratio
    assert nearest_bucket((100, 50), buckets) == 1
    assert nearest_bucket((300, 900), buckets) == 2


def test_images_are_covered_and_cropped_never_squashed(recipe, tmp_path):
    image = Image.new("RGB", (400, 200), "white")
    ImageDraw.Draw(image).ellipse((150, 50, 250, 150), fill="black")
    image.save(tmp_path / "x.png")
    example = Example("x", [""], (tmp_path / "x.png").read_bytes)
    store = ImageStore([example], [(64, 64)], "lanczos", 1 << 20)
    cover = store.cover(0, 0)
    assert cover.size == (128, 64)
    args = arguments(recipe, "--center_crop")
    crop = draw_crop(cover.size, (64, 64), random.Random(0), args)
    view = to_pixels(crop_and_augment(cover, (64, 64), crop, random.Random(0), args))
    dark = (view.float().mean(0) < 127.5).nonzero()
    height, width = (dark.max(0).values - dark.min(0).values).tolist()
    assert abs(height - width) <= 1 and 28 <= width <= 34
    assert view.shape == (3, 64, 64) and view.max() == 255


def test_rotation_leaves_no_empty_corner(recipe):
    args = arguments(recipe, "--random_rotation", 30, "--random_rotation_prob", 1)
    for seed in range(20):
        view = crop_and_augment(
            Image.new("RGB", (64, 96), "white"), (64, 64), Crop(0, 16, False), random.Random(seed), args
        )
        assert min(view.convert("L").tobytes()) > 250


@pytest.mark.parametrize("size", [(160, 64), (64, 160)], ids=["wide", "tall"])
@pytest.mark.parametrize("flip", [False, True])
def test_pixels_sizes_and_crops_belong_together(recipe, tmp_path, size, flip):
    """What a sample says of its crop is what its pixels show; numbers are (height, width) and (top, left)."""
    flags = ("--random_flip",) if flip else ()
    data, _ = data_of(recipe, tmp_path, size, (64, 64), *flags)
    tops, lefts, mirrored = set(), set(), set()
    for epoch in range(40):
        item = data[Slot(0, 0, epoch, 0, 1.0)]
        pixels = item["pixels"].int()
        columns, row = pixels[0, 0], pixels[1, 0, 0].item()
        turned = bool(columns[0] > columns[-1])
        left = size[0] - 1 - columns[0].item() if turned else columns[0].item()
        assert item["crop_top_left"].tolist() == [row, left]
        assert item["original_size"].tolist() == [size[1], size[0]]
        assert item["target_size"].tolist() == [64, 64]
        assert pixels.shape == (3, 64, 64) and pixels.min() == 0
        tops.add(row), lefts.add(left), mirrored.add(turned)
    varied, still = (lefts, tops) if size[0] > size[1] else (tops, lefts)
    assert still == {0} and min(varied) < 15 and max(varied) > 80
    assert mirrored == ({True, False} if flip else {False})


def test_crop_coordinates_are_those_of_the_picture_as_it_is_seen(recipe, tmp_path):
    """Of a mirrored picture they are counted in the mirrored one."""
    Image.new("RGB", (160, 64)).save(tmp_path / "x.png")
    example = Example("x", [""], (tmp_path / "x.png").read_bytes)
    args = arguments(recipe, "--random_flip")
    store = prepare_examples([example], [(64, 64)], args)
    base = components_of(recipe)
    data = training_data(recipe, store, None, args, base.config("vae"), base.training_scheduler())
    seen = set()
    for epoch in range(30):
        slot = Slot(0, 0, epoch, 0, 1.0)
        place = (args.seed, epoch, False, "x", 0)
        crop = draw_crop((160, 64), (64, 64), random.Random(stable_seed("image", *place)), args)
        expected = 160 - 64 - crop.left if crop.flip else crop.left
        assert data[slot]["crop_top_left"].tolist() == [0, expected]
        seen.add(crop.flip)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((160, 64), (64, 64)), ((64, 100), (64, 64)), ((200, 96), (64, 96)), ((64, 64), (64, 64))],
)
def test_the_crop_that_is_told_is_the_one_that_is_seen(recipe, tmp_path, size, bucket):
    """Each pixel says where it was in the picture, or in the mirrored picture."""
    rows, columns = np.mgrid[: size[1], : size[0]].astype(np.uint8)
    Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], 2)).save(tmp_path / "x.png")
    args, base = arguments(recipe, "--random_flip"), components_of(recipe)
    example = Example("x", [""], (tmp_path / "x.png").read_bytes)
    store = prepare_examples([example], [bucket], args)
    data = training_data(recipe, store, None, args, base.config("vae"), base.training_scheduler())
    seen = set()
    for epoch in range(12):
        item = data[Slot(0, 0, epoch, 0, 1.0)]
        red, green, _ = item["pixels"][:, 0, 0].tolist()
        mirrored = red > item["pixels"][0, 0, -1].item()
        assert item["crop_top_left"].tolist() == [green, size[0] - 1 - red if mirrored else red]
        seen.add(mirrored)
    assert seen == {True, False}


def test_pictures_are_read_as_people_see_them(tmp_path):
    """Turned as EXIF says, and transparency on white."""
    image = Image.new("RGB", (30, 20), "black")
    image.paste("white", (0, 0, 15, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: its left side is the top
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = to_pixels(decode_image((tmp_path / "turned.png").read_bytes()))
    assert pixels.shape == (3, 30, 20)
    assert pixels[:, 0].eq(255).all() and pixels[:, -1].eq(0).all()
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert to_pixels(decode_image((tmp_path / "clear.png").read_bytes())).eq(255).all()


def saved(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    """The bytes of an image's file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("primaries", [DISPLAY_P3, ADOBE_RGB], ids=["p3", "adobe"])
@pytest.mark.parametrize("kind", ["RGBA", "P", "RGB with a clear colour", "P with a clear colour"])
def test_a_profile_holds_for_every_kind_of_picture(kind, primaries):
    """Palettes and transparent pictures too; what is clear stays clear."""
    options = {"icc_profile": profile("RGB ", 2.2, primaries)}
    image = Image.new("RGB", (8, 8), (200, 60, 40))
    expected = decode_image(saved(image, **options)).getpixel((1, 1))
    image.paste((0, 255, 0), (4, 0, 8, 8))
    if kind == "RGBA":
        alpha = Image.new("L", (8, 8), 255)
        alpha.paste(0, (4, 0, 8, 8))
        image.putalpha(alpha)
    elif kind.startswith("P"):
        image = image.quantize(8)
    if "clear" in kind:
        options["transparency"] = image.getpixel((5, 5))
    decoded = decode_image(saved(image, **options))
    assert np.abs(np.subtract(decoded.getpixel((1, 1)), expected)).max() <= 1
    assert np.abs(np.subtract(expected, (200, 60, 40))).max() > 15
    assert (decoded.getpixel((6, 6)) == (255, 255, 255)) == (kind != "P")


@pytest.mark.parametrize("gamma", [1.0, 1.8])
@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "F"])
def test_a_grey_profile_holds_for_every_depth(mode, gamma):
    value, light = 120, (120 / 255) ** gamma
    srgb = 255 * (1.055 * light ** (1 / 2.4) - 0.055)
    if mode in ("L", "LA"):
        image = Image.new(mode, (8, 8), (value, 255)[: len(mode)] if mode == "LA" else value)
    else:
        scale, dtype = {"I;16": (257, "uint16"), "F": (1 / 255, "float32")}[mode]
        image = Image.fromarray(np.full((8, 8), value * scale, dtype=dtype))
    raw = saved(image, "TIFF" if mode == "F" else "PNG", icc_profile=profile("GRAY", gamma))
    assert np.abs(np.array(decode_image(raw).getpixel((2, 2))) - srgb).max() <= 2


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "float32 to 1", "float32 to 255"])
def test_pictures_of_any_depth_are_scaled(kind):
    dtype, largest = kind.split()[0], {"8": 255, "6": 65535, "2": 65535, "1": 1, "5": 255}[kind[-1]]
    values = np.linspace(0, largest, 64).reshape(8, 8).astype(dtype)
    decoded = np.asarray(decode_image(saved(Image.fromarray(values), "TIFF")).convert("L"))
    assert np.abs(decoded - np.linspace(0, 255, 64).reshape(8, 8)).max() <= 1
