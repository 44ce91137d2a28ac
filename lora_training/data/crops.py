"""Crops and augmentations."""

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
    """Where an image of size `cover` is cropped (anywhere, or in the middle) and whether it is mirrored."""
    u, v, flip = rng.random(), rng.random(), args.random_flip and rng.random() < 0.5
    if args.center_crop:
        u = v = 0.5
    return Crop(round((cover[0] - target[0]) * u), round((cover[1] - target[1]) * v), flip)


def crop_and_augment(
    cover, target: tuple[int, int], crop: Crop, rng: random.Random, args: argparse.Namespace
):
    """The bucket's view of a covering image, with the augmentations that are on; a mask's has no colours to
    change.
    """
    width, height = target
    turned = args.random_rotation and rng.random() < args.random_rotation_prob
    if turned:
        angle = math.radians(rng.uniform(-args.random_rotation, args.random_rotation))
        zoom = abs(math.cos(angle)) + max(width / height, height / width) * abs(
            math.sin(angle)
        )  # no empty corners
        a, b = math.cos(angle) / zoom, math.sin(angle) / zoom
        cx, cy = crop.left + width / 2, crop.top + height / 2
        matrix = (a, -b, cx - a * width / 2 + b * height / 2, b, a, cy - b * width / 2 - a * height / 2)
        image = cover.transform(target, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    else:
        image = cover.crop((crop.left, crop.top, crop.left + width, crop.top + height))
    if crop.flip:
        image = ImageOps.mirror(image)
    if args.color_jitter is not None and image.mode == "RGB":
        brightness, contrast, saturation, hue = args.color_jitter
        for kind, strength in (("Brightness", brightness), ("Contrast", contrast), ("Color", saturation)):
            factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
            image = getattr(ImageEnhance, kind)(image).enhance(factor)
        if hue:
            hsv = np.array(image.convert("HSV"))
            hsv[..., 0] += np.uint8(round(rng.uniform(-hue, hue) * 255) % 256)
            image = Image.fromarray(hsv, "HSV").convert("RGB")
    return image
