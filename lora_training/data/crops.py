"""Where an image is cropped, and how it is augmented."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

if TYPE_CHECKING:
    import argparse
    import random


@dataclass
class Crop:
    """How an image covers its bucket: offsets in the scaled image, and whether it is mirrored."""

    left: int
    top: int
    flip: bool


def draw_crop(
    cover: tuple[int, int], target: tuple[int, int], rng: random.Random, args: argparse.Namespace
) -> Crop:
    """Where an image of size `cover` is cropped to `target` (anywhere, or in the middle), and whether it is
    mirrored.
    """
    u, v, flip = rng.random(), rng.random(), args.random_flip and rng.random() < 0.5
    if args.center_crop:
        u = v = 0.5
    return Crop(round((cover[0] - target[0]) * u), round((cover[1] - target[1]) * v), flip)


def crop_and_augment(
    cover, target: tuple[int, int], crop: Crop, rng: random.Random, args: argparse.Namespace
):
    """A covering image -> the bucket's view of it, with the augmentations that are on.

    The colours of a mask stay as they are.
    """
    if args.random_rotation and rng.random() < args.random_rotation_prob:
        degrees = rng.uniform(-args.random_rotation, args.random_rotation)
        image = rotated_crop(cover, target, crop, degrees)
    else:
        image = cover.crop((crop.left, crop.top, crop.left + target[0], crop.top + target[1]))
    if crop.flip:
        image = ImageOps.mirror(image)
    if args.color_jitter is not None and image.mode == "RGB":
        image = jitter_colors(image, args.color_jitter, rng)
    return image


def rotated_crop(cover, target: tuple[int, int], crop: Crop, degrees: float):
    """A crop turned around its centre, and enlarged so far that no corner is empty."""
    width, height = target
    angle = math.radians(degrees)
    longer_side = max(width / height, height / width)
    zoom = abs(math.cos(angle)) + longer_side * abs(math.sin(angle))
    a, b = math.cos(angle) / zoom, math.sin(angle) / zoom
    cx, cy = crop.left + width / 2, crop.top + height / 2
    matrix = (a, -b, cx - a * width / 2 + b * height / 2, b, a, cy - b * width / 2 - a * height / 2)
    return cover.transform(target, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def jitter_colors(image, strengths: list[float], rng: random.Random):
    """An RGB image with brightness, contrast, saturation and hue changed, each by up to its strength."""
    brightness, contrast, saturation, hue = strengths
    for kind, strength in (("Brightness", brightness), ("Contrast", contrast), ("Color", saturation)):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        image = getattr(ImageEnhance, kind)(image).enhance(factor)
    if hue:
        hsv = np.array(image.convert("HSV"))
        hsv[..., 0] += np.uint8(round(rng.uniform(-hue, hue) * 255) % 256)
        image = Image.fromarray(hsv, "HSV").convert("RGB")
    return image
