"""How clean a drawn shape is, beside the nearest ideal one of the toy world."""

from __future__ import annotations

import functools
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from scripts.toys.parts.toy_world import MIDDLES, RADII, SHAPES, SIZE, draw_shape

GRID = 1 / 128  # of the width: half a pixel between one ideal centre and the next, a quarter between radii
MARGIN = 2  # pixels on either side of an outline where colours may mix
TOLERANCE = 25  # of 255, in any channel; colours of the world differ by more


def shape_pixels(pixels: np.ndarray) -> np.ndarray:
    """RGB pixels (64, 64, 3) -> bool (64, 64), true where nearer to the colour of the middle than to that of the edge."""
    edge = np.ones((SIZE, SIZE), dtype=bool)
    edge[3:-3, 3:-3] = False  # no ideal shape comes nearer to the edge
    middle = slice(SIZE // 2 - 6, SIZE // 2 + 6)
    background, color = np.median(pixels[edge], axis=0), np.median(pixels[middle, middle].reshape(-1, 3), axis=0)
    return ((pixels - color) ** 2).sum(-1) < ((pixels - background) ** 2).sum(-1)


@functools.cache
def ideal_shapes() -> np.ndarray:
    """Every shape at every place and size of the world, float32 (N, 64 * 64) of zeros and ones."""
    middles = np.arange(MIDDLES[0], MIDDLES[1] + GRID / 2, GRID)
    radii = np.arange(RADII[0], RADII[1] + GRID / 4, GRID / 2)
    masks = []
    for shape, x, y, r in product(SHAPES, middles, middles, radii):
        image = Image.new("L", (4 * SIZE, 4 * SIZE))
        draw_shape(ImageDraw.Draw(image), shape, *(4 * SIZE * v for v in (x, y, r)), fill=255)
        masks.append(np.asarray(image.reduce(4)).ravel() > 127)
    return np.stack(masks).astype(np.float32)


def smudged_share(pixels: np.ndarray, ideal: np.ndarray) -> float:
    """The share of pixels off the ideal outline (bool (64, 64)) whose colour isn't their side's median."""
    padded = np.pad(ideal, MARGIN, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (2 * MARGIN + 1, 2 * MARGIN + 1))
    sides = around.all((-1, -2)), ~around.any((-1, -2))
    off = [np.abs(pixels[side] - np.median(pixels[side], axis=0)).max(-1) > TOLERANCE for side in sides]
    return np.concatenate(off).mean().item()


def cleanness(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """For each image the overlap (intersection over union) of its shape with the nearest ideal one, (N,), 1 at best; and
    the share of smudged pixels beside that one's outline, (N,), 0 at best.
    """
    pixels = np.stack([np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) for image in images])
    drawn = np.stack([shape_pixels(p).ravel() for p in pixels]).astype(np.float32)
    ideal = ideal_shapes()
    common = drawn @ ideal.T
    overlap = common / (drawn.sum(1)[:, None] + ideal.sum(1) - common)
    nearest = ideal[overlap.argmax(1)].reshape(-1, SIZE, SIZE) > 0
    return overlap.max(1), np.array([smudged_share(p, n) for p, n in zip(pixels, nearest, strict=True)])
