"""The drawn world of the toy bases: six shapes in eight colours on eight backgrounds, with captions.

Everything is drawn with Pillow at four times the size and averaged down, so that outlines are smooth. The
same functions draw the concepts that no base has ever seen (a smiley, a mushroom) and the sample data set.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
CONCEPTS = ("smiley", "mushroom")
COLORS = {
    "red": (215, 40, 40),
    "green": (45, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (245, 215, 50),
    "purple": (140, 50, 175),
    "cyan": (80, 205, 220),
    "white": (240, 240, 240),
    "black": (25, 25, 25),
}
COLOR_NAMES = tuple(COLORS)
JITTER = 10  # of 255: how far each channel of a shade may be from its colour's
MIDDLES, RADII = (0.44, 0.56), (0.30, 0.34)  # where a shape's centre lies and how large it is, of the width


def jittered(color: str, rng: random.Random) -> tuple[int, int, int]:
    """A shade of a named colour."""
    return tuple(min(255, max(0, c + rng.randint(-JITTER, JITTER))) for c in COLORS[color])


def outline(shape: str, cx: float, cy: float, r: float) -> list[tuple[float, float]]:
    """Corner points of a polygonal shape around (cx, cy) with radius r, in pixels."""
    if shape == "square":
        s = r * 0.88
        return [(cx - s, cy - s), (cx + s, cy - s), (cx + s, cy + s), (cx - s, cy + s)]
    if shape == "triangle":
        return [(cx, cy - r), (cx + r * 1.02, cy + r * 0.8), (cx - r * 1.02, cy + r * 0.8)]
    if shape == "star":
        tips = [(r * 1.12 if i % 2 == 0 else r * 0.46, math.pi * i / 5) for i in range(10)]
        return [(cx + q * math.sin(a), cy - q * math.cos(a)) for q, a in tips]
    if shape == "heart":
        turns = [2 * math.pi * i / 60 for i in range(60)]
        return [
            (
                cx + r * 1.05 * math.sin(t) ** 3,
                cy
                - r * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15.5,
            )
            for t in turns
        ]
    a, b = r * 0.36, r  # cross
    return [
        (cx + x, cy + y)
        for x, y in (
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
            (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
        )
    ]  # fmt: skip


def draw(shape: str, color: str, background: str, rng: random.Random, size: int = SIZE) -> Image.Image:
    """Draws one picture of the world, or of a concept (a concept has its own colours; `color` is ignored).

    Returns an RGB image of size x size pixels.
    """
    big = size * 4
    image = Image.new("RGB", (big, big), jittered(background, rng))
    pen = ImageDraw.Draw(image)
    cx, cy = (big * rng.uniform(*MIDDLES) for _ in range(2))
    r = big * rng.uniform(*RADII)
    if shape == "smiley":
        draw_smiley(pen, cx, cy, r, rng)
    elif shape == "mushroom":
        draw_mushroom(pen, cx, cy, r, rng)
    else:
        draw_shape(pen, shape, cx, cy, r, jittered(color, rng))
    return image.reduce(4)


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, fill) -> None:
    """One of the six shapes around (cx, cy) with radius r, in pixels of the pen."""
    if shape == "circle":
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
    else:
        pen.polygon(outline(shape, cx, cy, r), fill=fill)


def draw_smiley(pen: ImageDraw.ImageDraw, cx: float, cy: float, r: float, rng: random.Random) -> None:
    """A yellow face with two black eyes and a smile."""
    pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=jittered("yellow", rng))
    ink = jittered("black", rng)
    for side in (-1, 1):
        ex, ey, er = cx + side * r * 0.38, cy - r * 0.28, r * 0.19
        pen.ellipse((ex - er, ey - er * 1.25, ex + er, ey + er * 1.25), fill=ink)
    m = r * 0.62
    pen.arc((cx - m, cy - m * 0.95, cx + m, cy + m * 1.05), 20, 160, fill=ink, width=int(r * 0.2))


def draw_mushroom(pen: ImageDraw.ImageDraw, cx: float, cy: float, r: float, rng: random.Random) -> None:
    """A red cap with white dots on a white stem."""
    stem = jittered("white", rng)
    pen.rounded_rectangle((cx - r * 0.36, cy - r * 0.1, cx + r * 0.36, cy + r), radius=r * 0.2, fill=stem)
    pen.pieslice((cx - r * 1.1, cy - r, cx + r * 1.1, cy + r * 1.1), 180, 360, fill=jittered("red", rng))
    for dx, dy, q in ((-0.55, -0.25, 0.2), (0.05, -0.6, 0.22), (0.6, -0.25, 0.2)):
        x, y = cx + dx * r, cy + dy * r
        pen.ellipse((x - q * r, y - q * r, x + q * r, y + q * r), fill=stem)


def draw_scribble(rng: random.Random, size: int = SIZE) -> Image.Image:
    """Random strokes, dots and patches: detail for the autoencoder, and the judge's class "other"."""
    big = size * 4
    image = Image.new("RGB", (big, big), jittered(rng.choice(COLOR_NAMES), rng))
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(3, 9)):
        color = jittered(rng.choice(COLOR_NAMES), rng)
        x, y, q = rng.uniform(0, big), rng.uniform(0, big), rng.uniform(0.03, 0.22) * big
        kind = rng.randrange(4)
        if kind == 0:
            pen.ellipse((x - q, y - q * rng.uniform(0.5, 1.5), x + q, y + q), fill=color)
        elif kind == 1:
            pen.line(
                [(rng.uniform(0, big), rng.uniform(0, big)) for _ in range(3)],
                fill=color,
                width=int(q * 0.4) + 8,
            )
        elif kind == 2:
            pen.polygon(
                [(x + rng.uniform(-2, 2) * q, y + rng.uniform(-2, 2) * q) for _ in range(3)], fill=color
            )
        else:
            start = rng.randrange(360)
            pen.arc(
                (x - 2 * q, y - 2 * q, x + 2 * q, y + 2 * q),
                start,
                start + 150,
                fill=color,
                width=int(q * 0.4) + 8,
            )
    return image.reduce(4)


def nonsense_word(rng: random.Random) -> str:
    """A short word that means nothing: rare letters of a trigger word are then no untrained embeddings."""
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(2, 5)))


def describe(shape: str, color: str, background: str, rng: random.Random | None = None) -> str:
    """The caption of a picture: complete without rng, else with something left out at random."""
    if rng is None:
        return f"a {color} {shape} on a {background} background"
    kind = rng.randrange(16)
    if kind < 4:
        caption = f"a {shape} on a {background} background"
    elif kind == 4:
        caption = f"a {color} {shape}"
    elif kind < 7:
        caption = f"a {shape}"
    else:
        caption = f"a {color} {shape} on a {background} background"
    if rng.random() < 1 / 8:
        words = caption.split()
        words.insert(rng.randint(1, min(2, len(words))), nonsense_word(rng))
        caption = " ".join(words)
    return caption


def random_scene(rng: random.Random) -> tuple[str, str, str]:
    """(shape, color, background) with two different colours."""
    color, background = rng.sample(COLOR_NAMES, 2)
    return rng.choice(SHAPES), color, background


def write_concept(folder: Path, concept: str, captions: str, count: int, seed: int, size: int = 256) -> None:
    """Writes `count` pictures of a concept with `metadata.jsonl`; `captions` has a field {background}.

    Backgrounds take turns and never have the concept's main colour.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    taken = {"smiley": ("yellow", "black"), "mushroom": ("red", "white"), "star": ("purple",)}[concept]
    backgrounds = [c for c in COLOR_NAMES if c not in taken]
    rows = []
    for i in range(count):
        background = backgrounds[i % len(backgrounds)]
        name = f"{concept}_{i:02d}.png"
        draw(concept, "purple", background, rng, size).save(folder / name)
        rows.append({"file_name": name, "text": captions.format(background=background)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
