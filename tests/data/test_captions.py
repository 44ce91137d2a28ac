"""Captions as they are read and as they are trained."""

from __future__ import annotations

import random

import pytest
from PIL import Image
from toy_parts import arguments

from lora_training.data.captions import prepend_trigger
from lora_training.data.folders import folder_examples

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("caption", "trigger", "expected"),
    [
        ("a dog", "sks", "sks, a dog"),
        ("a sks dog", "sks", "a sks dog"),
        ("Sks, a dog", "sks", "Sks, a dog"),
        ("skstown", "sks", "sks, skstown"),
        ("", "sks", "sks"),
        ("a dog", None, "a dog"),
        ("red bike, a dog", "red bike", "red bike, a dog"),
    ],
)
def test_trigger_word_stands_once(caption, trigger, expected):
    assert prepend_trigger(caption, trigger) == expected


def test_caption_draws(recipe):
    args = arguments(recipe, "--shuffle_tags", "--trigger_word", "sks", "--caption_dropout", 0.25)
    drawn = [recipe.draw_caption(["a, b, c", "d"], random.Random(i), args) for i in range(400)]
    assert 60 < drawn.count("") < 140
    trained = [c for c in drawn if c]
    assert all(c.startswith("sks, ") for c in trained)
    assert {tuple(sorted(c.split(", "))) for c in trained} == {("a", "b", "c", "sks"), ("d", "sks")}
    assert len(set(trained)) == 7


def test_a_trigger_word_in_front_stays_there(recipe):
    args = arguments(recipe, "--shuffle_tags", "--trigger_word", "sks")
    drawn = {recipe.draw_caption(["sks dog, red, round, small"], random.Random(i), args) for i in range(60)}
    assert len(drawn) == 6 and all(caption.startswith("sks dog, ") for caption in drawn)


def captions_drawn(recipe, captions, *flags):
    """What one of these captions is trained as, over 400 draws."""
    args = arguments(recipe, *flags)
    return [recipe.draw_caption(captions, random.Random(k), args) for k in range(400)]


def test_tags_are_dropped_and_the_first_ones_kept(recipe):
    drawn = captions_drawn(recipe, ["1girl, hat, sea, sun"], "--tag_dropout", "0.25", "--keep_tokens", "2")
    assert all(caption.startswith("1girl, hat") for caption in drawn)
    assert sum("sea" in c for c in drawn) / 400 == pytest.approx(0.75, abs=0.06)
    assert sum("sea" in c and "sun" in c for c in drawn) / 400 == pytest.approx(0.5625, abs=0.07)
    assert not any("sun, sea" in c for c in drawn)
    shuffled = captions_drawn(recipe, ["1girl, hat, sea, sun"], "--shuffle_tags", "--keep_tokens", "1")
    assert all(c.startswith("1girl, ") for c in shuffled) and len(set(shuffled)) == 6
    word = captions_drawn(recipe, ["1girl, hat"], "--tag_dropout", "1", "--trigger_word", "sks")
    assert set(word) == {"sks"}


def test_each_line_may_be_a_caption(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog\n\nan animal\nin a field\n")
    captions = [folder_examples(tmp_path, None, None, per_line)[0].captions for per_line in (True, False)]
    assert captions == [["a dog", "an animal", "in a field"], ["a dog an animal in a field"]]
