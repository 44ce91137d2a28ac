"""The measure of clean shapes, and the command that prints it."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageDraw, ImageFilter

from scripts.toys.parts.toy_outline import cleanness
from scripts.toys.parts.toy_world import SHAPES, draw

COMMAND = [sys.executable, str(ROOT / "scripts" / "toys" / "score_toy_bases.py")]


@pytest.fixture(scope="module")
def drawn() -> list[Image.Image]:
    """Two pictures of each shape as the world draws them."""
    rng = random.Random(3)
    colors = (("red", "blue"), ("white", "green"))
    return [draw(shape, *pair, rng) for shape in SHAPES for pair in colors]


@pytest.mark.unit
def test_the_worlds_own_pictures_are_clean(drawn):
    overlap, smudged = cleanness(drawn)
    assert overlap.min() > 0.94 and overlap.mean() > 0.98
    assert smudged.max() == 0
    large = [image.resize((256, 256), Image.Resampling.BICUBIC) for image in drawn]
    assert np.abs(cleanness(large)[0] - overlap).max() < 0.03


@pytest.mark.unit
def test_spikes_and_tails_lower_the_overlap(drawn):
    def spiked(image):
        image = image.copy()
        ImageDraw.Draw(image).line([(32, 32), (60, 6)], fill=image.getpixel((32, 32)), width=5)
        return image

    before, after = cleanness(drawn)[0], cleanness([spiked(image) for image in drawn])[0]
    assert (after < before - 0.02).all()


@pytest.mark.unit
def test_smears_are_smudged_pixels_though_the_outline_is_right(drawn):
    rng = np.random.default_rng(0)

    def smeared(image):
        patches = Image.fromarray(rng.integers(-70, 70, (16, 16)).astype(np.float32)).resize((64, 64))
        return Image.fromarray(np.clip(np.asarray(image) + np.asarray(patches)[..., None], 0, 255).astype(np.uint8))

    overlap, smudged = cleanness([smeared(image) for image in drawn])
    assert overlap.mean() > 0.9 and smudged.min() > 0.05
    overlap, smudged = cleanness([image.filter(ImageFilter.GaussianBlur(0.7)) for image in drawn])
    assert overlap.mean() > 0.95 and smudged.mean() < 0.02  # soft outlines are no smears


@pytest.mark.run
@pytest.mark.parametrize(
    ("words", "says"),
    [(["nowhere"], "nowhere: not a base's folder, it has no model_index.json"), (["--count", "0"], "1 or more")],
)
def test_scores_say_what_is_wrong(words, says, tmp_path):
    result = subprocess.run([*COMMAND, *words], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.run
def test_scores_are_a_table_with_a_sheet_of_pictures(tmp_path):
    base = ROOT / "assets" / "toy_flux"
    words = [str(base), "--count", "4", "--pictures", "sheets"]
    result = subprocess.run([*COMMAND, *words], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr
    head, rule, row = (line.strip("| ").split(" | ") for line in result.stdout.strip().splitlines())
    assert len(head) == len(rule) == len(row) and row[0] == "toy_flux"
    assert 0.5 < float(row[head.index("overlap")]) <= 1
    assert Image.open(tmp_path / "sheets" / "toy_flux.png").size == (16 * 132, 132)
