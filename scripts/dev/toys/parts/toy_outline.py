"""How clean a drawn shape is beside the nearest ideal one of the toy world, and what it should have been."""

from __future__ import annotations

import functools
from itertools import product

import numpy as np
from PIL import Image, ImageDraw

from scripts.dev.toys.parts.toy_world import COLORS, JITTER, MIDDLES, RADII, SHAPES, SIZE, draw_shape

GRID = 1 / 128  # of the width: half a pixel between one ideal centre and the next, a quarter between radii
MARGIN = 2  # pixels on either side of an outline where colours may mix
TOLERANCE = 25  # of 255, in any channel; colours of the world differ by more
NEAR = 0.7  # overlap from which on a drawing is taken for an attempt at the shape


def shape_pixels(pixels: np.ndarray) -> np.ndarray:
    """RGB pixels (64, 64, 3) -> bool (64, 64), true where nearer to the middle's colour than the edge's."""
    edge = np.ones((SIZE, SIZE), dtype=bool)
    edge[3:-3, 3:-3] = False  # no ideal shape comes nearer to the edge
    middle = slice(SIZE // 2 - 6, SIZE // 2 + 6)
    background, color = (
        np.median(pixels[edge], axis=0),
        np.median(pixels[middle, middle].reshape(-1, 3), axis=0),
    )
    return ((pixels - color) ** 2).sum(-1) < ((pixels - background) ** 2).sum(-1)


@functools.cache
def places(shape: str) -> list[tuple[str, float, float, float]]:
    """A shape at every place and size of the world: (shape, x, y, radius), of the width."""
    middles = np.arange(MIDDLES[0], MIDDLES[1] + GRID / 2, GRID)
    radii = np.arange(RADII[0], RADII[1] + GRID / 4, GRID / 2)
    return list(product([shape], middles, middles, radii))


@functools.cache
def ideal_shapes(shape: str) -> np.ndarray:
    """The shape at its `places`, float32 (N, 64 * 64) of zeros and ones."""
    images = (picture(place, "white", "black").convert("L") for place in places(shape))
    return np.stack([np.asarray(image).ravel() > 127 for image in images]).astype(np.float32)


def picture(place: tuple[str, float, float, float], color, background) -> Image.Image:
    """A shape of `places` in its colours, 64 x 64, drawn as the world draws it."""
    image = Image.new("RGB", (4 * SIZE, 4 * SIZE), background)
    shape, *numbers = place
    draw_shape(ImageDraw.Draw(image), shape, *(4 * SIZE * number for number in numbers), fill=color)
    return image.reduce(4)


def nearest(pixels: np.ndarray, shapes: tuple[str, ...]) -> tuple[float, tuple, np.ndarray]:
    """The ideal shape that is nearest to the drawn one in RGB pixels (64, 64, 3).

    Returns its overlap (intersection over union), its place, and its pixels, bool (64, 64).
    """
    drawn, matches = shape_pixels(pixels).ravel().astype(np.float32), []
    for shape in shapes:
        ideal = ideal_shapes(shape)
        common = ideal @ drawn
        overlap = common / (drawn.sum() + ideal.sum(1) - common)
        best = overlap.argmax()
        matches.append((overlap[best].item(), places(shape)[best], ideal[best].reshape(SIZE, SIZE) > 0))
    return max(matches, key=lambda of_shape: of_shape[0])


def sides(ideal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An outline's (bool (64, 64)) pixels well inside and well outside."""
    padded = np.pad(ideal, MARGIN, mode="edge")
    around = np.lib.stride_tricks.sliding_window_view(padded, (2 * MARGIN + 1, 2 * MARGIN + 1))
    return around.all((-1, -2)), ~around.any((-1, -2))


def smudged_share(pixels: np.ndarray, ideal: np.ndarray) -> float:
    """The share of pixels off the ideal outline (bool (64, 64)) whose colour isn't their side's median."""
    off = [
        np.abs(pixels[side] - np.median(pixels[side], axis=0)).max(-1) > TOLERANCE for side in sides(ideal)
    ]
    return np.concatenate(off).mean().item()


def cleanness(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    """How clean the shape of each image is.

    Returns its overlap (intersection over union) with the nearest ideal one, (N,), 1 at best; and the share
    of smudged pixels beside that one's outline, (N,), 0 at best.
    """
    pixels = [np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) for image in images]
    matches = [nearest(p, SHAPES) for p in pixels]
    smudged = [smudged_share(p, ideal) for p, (_, _, ideal) in zip(pixels, matches, strict=True)]
    return np.array([overlap for overlap, _, _ in matches]), np.array(smudged)


def nearest_picture(image: Image.Image, caption: str) -> Image.Image | None:
    """The ideal picture nearest to a drawing (64, 64) that its caption allows; None where none is near."""
    pixels = np.asarray(image, dtype=np.float32)
    thing, _, ground = (words.split() for words in caption.partition(" on a "))  # a nonsense word may be "on"
    overlap, place, ideal = nearest(pixels, tuple(shape for shape in SHAPES if shape in thing))
    (color, shade), (background, other) = (
        nearest_shade(np.median(pixels[side], axis=0), [word for word in words if word in COLORS])
        for side, words in zip(sides(ideal), (thing, ground), strict=True)
    )
    return picture(place, shade, other) if overlap > NEAR and color != background else None


def nearest_shade(seen: np.ndarray, names: list[str]) -> tuple[str, tuple[int, ...]]:
    """The name of the colour nearest to RGB `seen`, and its shade nearest to that.

    names: the colours that are looked at; none: all.
    """
    name = min(names or COLORS, key=lambda name: np.abs(seen - COLORS[name]).sum())
    middle = np.array(COLORS[name])
    return name, tuple(np.clip(seen, middle - JITTER, middle + JITTER).clip(0, 255).astype(int).tolist())
