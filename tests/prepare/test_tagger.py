"""Tags of WD14 taggers: thresholds, order, input, and where they go in a caption."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
from photo_folders import prepare, read_captions
from PIL import Image

from lora_training.prepare.settings import AutoTagging
from lora_training.prepare.tagger import Tagger

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


def tagger(models, **changes):
    step = AutoTagging(model_name=str(models["tagger"]), **changes)
    return Tagger(step)


def test_tags_thresholds_and_their_order(models):
    (red,) = tiny_models.colour_pictures("red")
    assert tagger(models)([red]) == ["hatsune miku, red background, o_o"]
    assert tagger(models, character_threshold=0.9)([red]) == ["red background, o_o"]
    assert tagger(models, general_threshold=0.8)([red]) == ["hatsune miku, red background"]
    assert "o_o, never, " in tagger(models, threshold=0)([red])[0]
    assert tagger(models, max_tags=1)([red]) == ["red background"]
    assert tagger(models, replace_underscore=False, exclude_tags="o o")([red]) == [
        "hatsune_miku, red_background"
    ]


def test_tagger_input_is_white_padded_bgr(models):
    made = tagger(models)
    tall = made.prepare(Image.new("RGB", (20, 400), (10, 20, 30)))
    assert tall.shape == (448, 448, 3) and tall.dtype == np.float32
    assert tall[200, 224].tolist() == [30, 20, 10] and tall[200, 10].tolist() == [255, 255, 255]
    assert made([Image.new("RGB", (20, 400)), Image.new("RGB", (20, 20))]) == [
        "hatsune miku, white border, o_o",
        "hatsune miku, o_o",
    ]


def test_a_tagger_with_a_fixed_batch(tmp_path):
    folder = tiny_models.make_tagger(tmp_path / "fixed", batch=3)
    made = Tagger(AutoTagging(model_name=str(folder)))
    assert made.batch_size == 3
    assert [t.split(", ")[1] for t in made(tiny_models.colour_pictures("blue", "red"))] == [
        "blue background",
        "red background",
    ]


@pytest.mark.parametrize(
    ("mode", "expected"), [("append", "red thing, o_o"), ("missing", "red thing"), ("replace", "o_o")]
)
def test_where_tags_go(models, tmp_path, mode, expected):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    Image.new("RGB", (300, 300), (90, 90, 90)).save(folder / "a.png")
    Image.new("RGB", (300, 300), (60, 90, 90)).save(folder / "b.png")
    (folder / "a.txt").write_text("red thing")
    arguments = [f"model_name={models['tagger']}", "character_threshold=1", f"captions={mode}"]
    assert prepare("-d", folder, "-o", out, "--auto_tagging", *arguments) == 0
    assert read_captions(out)["a.png"] == expected
    assert read_captions(out)["b.png"] != ""
