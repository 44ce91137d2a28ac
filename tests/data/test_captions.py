"""Captions as they are read and as they are trained."""

from __future__ import annotations

import random

import pytest
from PIL import Image
from toy_parts import arguments

from lora_training.data.captions import clean_caption, prepend_trigger
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


@pytest.mark.parametrize(
    ("caption", "trigger", "has_it"),
    [
        ("a photo (s_k_s.) of a cat", "s_k_s.", True),
        ("portrait of s_k_s.; soft light", "s_k_s.", True),
        ("[@zed] by the sea", "@zed", True),
        ("zorg's hat", "zorg", True),
        ("a hat-zorg!", "Zorg", True),
        ("zorg_hat, sea", "zorg", True),
        ("two zorgs", "zorg", False),
        ("a bizorg", "zorg", False),
        ("zorgé", "zorg", False),  # é is a letter
        ("一个zorg在海边", "zorg", True),  # written without spaces, so that a word has no edge there
        ("一只黑猫在海边", "黑猫", True),
        ("кошки", "кошка", False),
        ("чёрная Кошка", "кошка", True),
        ("zorg9", "zorg", False),
    ],
)
def test_a_trigger_word_is_known_by_its_edges(caption, trigger, has_it):
    """Neither inside of another word, nor missed for the signs that it has or that stand beside it."""
    assert prepend_trigger(caption, trigger) == (caption if has_it else f"{trigger}, {caption}")


@pytest.mark.parametrize("trigger", ["cafe\u0301", "  red   bike "])
def test_a_trigger_word_is_written_as_captions_are(recipe, trigger):
    args = arguments(recipe, "--trigger_word", trigger)
    assert args.trigger_word == clean_caption(trigger) and args.triggers == [args.trigger_word]
    caption = clean_caption(f"a {trigger} in the sun")
    assert recipe.draw_caption([caption], random.Random(0), args) == caption


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
