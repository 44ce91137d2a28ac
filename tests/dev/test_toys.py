"""The measure of clean shapes, and the command that prints it."""

from __future__ import annotations

import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw, ImageFilter

from scripts.dev.toys import score_toy_bases
from scripts.dev.toys.parts import toy_drawings, toy_loss
from scripts.dev.toys.parts.toy_models import load_base, make_pipeline, make_scheduler
from scripts.dev.toys.parts.toy_outline import cleanness, nearest_picture
from scripts.dev.toys.parts.toy_world import SHAPES, draw

COMMAND = [sys.executable, str(ROOT / "scripts" / "dev" / "toys" / "score_toy_bases.py")]


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


def spiked(image: Image.Image) -> Image.Image:
    """A picture whose shape has a tail to the upper right."""
    image = image.copy()
    ImageDraw.Draw(image).line([(32, 32), (60, 6)], fill=image.getpixel((32, 32)), width=5)
    return image


@pytest.mark.unit
def test_spikes_and_tails_lower_the_overlap(drawn):
    before, after = cleanness(drawn)[0], cleanness([spiked(image) for image in drawn])[0]
    assert (after < before - 0.02).all()


@pytest.mark.unit
def test_smears_are_smudged_pixels_though_the_outline_is_right(drawn):
    rng = np.random.default_rng(0)

    def smeared(image):
        patches = Image.fromarray(rng.integers(-70, 70, (16, 16)).astype(np.float32)).resize((64, 64))
        return Image.fromarray(
            np.clip(np.asarray(image) + np.asarray(patches)[..., None], 0, 255).astype(np.uint8)
        )

    overlap, smudged = cleanness([smeared(image) for image in drawn])
    assert overlap.mean() > 0.9 and smudged.min() > 0.05
    overlap, smudged = cleanness([image.filter(ImageFilter.GaussianBlur(0.7)) for image in drawn])
    assert overlap.mean() > 0.95 and smudged.mean() < 0.02  # soft outlines are no smears


@pytest.mark.run
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere: not a base's folder, it has no model_index.json"),
        (["--count", "0"], "1 or more"),
    ],
)
def test_scores_say_what_is_wrong(words, says, tmp_path):
    result = subprocess.run([*COMMAND, *words], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.run
def test_scores_are_a_table_with_a_sheet_of_pictures(tmp_path, monkeypatch, capsys):
    base = ROOT / "assets" / "toy_flux"
    monkeypatch.chdir(tmp_path)
    assert score_toy_bases.main([str(base), "--count", "4", "--pictures", "sheets"]) == 0
    head, rule, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines())
    assert len(head) == len(rule) == len(row) and row[0] == "toy_flux"
    assert 0.5 < float(row[head.index("overlap")]) <= 1
    assert Image.open(tmp_path / "sheets" / "toy_flux.png").size == (16 * 132, 132)


@pytest.mark.unit
def test_what_a_drawing_should_have_been(drawn):
    """The ideal picture under a drawing: of the shape and in the colours that its caption names."""
    captions = [f"a {color} {shape}" for shape in SHAPES for color in ("red", "white")]
    right = [nearest_picture(spiked(image), caption) for image, caption in zip(drawn, captions, strict=True)]
    apart = [
        np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(drawn, right, strict=True)
    ]
    assert max(apart) < 8 and cleanness(right)[0].min() > 0.98
    for open_colour in ("a vkx circle", "a on circle on a white background"):
        assert nearest_picture(drawn[0], open_colour).getpixel((32, 32)) == drawn[0].getpixel((32, 32))
    recoloured = nearest_picture(drawn[0], "a green circle on a blue background")
    assert recoloured.getpixel((32, 32)) != drawn[0].getpixel((32, 32))
    assert nearest_picture(drawn[0], "a star on a blue background") is None  # nothing like a star there
    assert nearest_picture(Image.new("RGB", (64, 64), "red"), "a circle") is None


@pytest.mark.unit
@pytest.mark.parametrize("name", ["flux", "sd15", "sd3", "sdxl"])
def test_a_base_is_shown_its_own_drawings(name, monkeypatch):
    """Late states are nearly the drawing; one that went straight to the ideal picture would have no loss."""
    monkeypatch.setattr(toy_drawings, "DRAWINGS", 32)
    folder = ROOT / "assets" / f"toy_{name}"
    base = load_base(name, folder)
    base.denoiser.eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    pipeline = make_pipeline(base, vae)
    drawings = toy_drawings.draw_with_base(base, pipeline, seed=0)
    assert len(drawings.captions) == len(drawings.states) == len(drawings.ideals) >= 32
    apart = (drawings.states - drawings.ideals[:, None]).square().mean((0, 2, 3, 4))
    assert len(apart) == len(drawings.times) and (drawings.times.diff() < 0).all()
    assert (apart[:15].diff() < 0).all() and apart[-1] < 0.45 < 0.8 < apart[0]
    captions, (states, times, ideals) = drawings.sample(16, random.Random(0))
    assert len(captions) == 16 and states.shape == ideals.shape == (16, 16, 8, 8)
    assert (
        set(times.tolist()) <= set(drawings.times[drawings.shown].tolist()) and drawings.times[0] not in times
    )

    scheduler = make_scheduler(name)

    def straight(noisy, times) -> torch.Tensor:
        """What a transformer, or a UNet, would predict."""
        if not hasattr(scheduler, "alphas_cumprod"):
            return (noisy - ideals) / times.view(-1, 1, 1, 1)
        clear = scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
        return (noisy - clear.sqrt() * ideals) / (1 - clear).sqrt()

    def predict_velocity(base, noisy, times, *conditions):
        return straight(noisy, times)

    def unet(noisy, times, *conditions, **added):
        return SimpleNamespace(sample=straight(noisy, times))

    monkeypatch.setattr(toy_loss, "predict_velocity", predict_velocity)
    base.denoiser = unet
    nothing, embeds, pooled = torch.zeros(0, 16, 8, 8), torch.zeros(16, 1, 1), torch.zeros(16, 1)
    dropped = torch.zeros(0, dtype=torch.bool)
    batch = (base, scheduler, nothing, embeds, pooled, dropped, torch.Generator())
    assert toy_loss.compute_loss(*batch, (states, times, ideals)) < 1e-8
    assert toy_loss.compute_loss(*batch, (states, times, ideals.flip(0))) > 0.1
    if name == "flux":
        monkeypatch.setattr(toy_drawings, "nearest_picture", lambda image, caption: None)
        with pytest.raises(SystemExit, match="only 0 of 128 drawings"):
            toy_drawings.draw_with_base(base, pipeline, seed=0)
