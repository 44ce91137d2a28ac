"""Captions as they are read and as they are trained."""

from __future__ import annotations

import random

import pytest
from PIL import Image
from toy_parts import arguments, captioned_folder, data_of

from lora_training.data.batches import Slot
from lora_training.data.captions import clean_caption, prepend_trigger
from lora_training.data.checks import unsplit_captions
from lora_training.data.examples import load_examples
from lora_training.data.folders import Example, folder_examples
from lora_training.errors import UserError

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


@pytest.mark.parametrize(
    ("caption", "separator", "tags"),
    [
        ("hat,sea,sun", ", ", {"hat", "sea", "sun"}),
        ("hat , sea,  sun,", ", ", {"hat", "sea", "sun"}),
        ("hat;sea ;sun", ";", {"hat", "sea", "sun"}),
        ("hat sea sun", " ", {"hat", "sea", "sun"}),
    ],
)
def test_tags_are_told_apart_with_and_without_spaces(recipe, caption, separator, tags):
    drawn = captions_drawn(recipe, [caption], "--shuffle_tags", "--tag_separator", separator)
    assert len(set(drawn)) == 6 and all(set(c.split(separator)) == tags for c in drawn)
    some = captions_drawn(recipe, [caption], "--tag_dropout", 0.5, "--tag_separator", separator)
    assert len(set(some)) == 8 and 20 < some.count("") < 90


@pytest.mark.parametrize(
    ("caption", "front", "tags", "behind"),
    [
        ("1girl, zorg ||| sea, sun", "1girl, zorg, ", {"sea", "sun"}, ""),
        ("1girl,zorg|||sea,sun|||masterpiece,best", "1girl, zorg, ", {"sea", "sun"}, ", masterpiece, best"),
        ("||| sea, sun ||| best", "", {"sea", "sun"}, ", best"),
    ],
)
def test_tags_before_kohyas_bars_stay_in_front(recipe, tmp_path, caption, front, tags, behind):
    """And those after a second pair behind; the bars themselves are never trained."""
    captioned_folder(tmp_path / "data", [caption])
    plain = front + ", ".join(sorted(tags)) + behind
    (example,) = load_examples(arguments(recipe, "-d", tmp_path / "data"))
    assert example.captions == [plain] and not example.marked_captions
    args = arguments(recipe, "-d", tmp_path / "data", "--shuffle_tags", "--keep_tokens", 0)
    (example,) = load_examples(args)
    assert example.captions == [plain]
    drawn = {recipe.draw_caption(example.marked_captions, random.Random(k), args) for k in range(60)}
    assert drawn == {plain, front + ", ".join(sorted(tags, reverse=True)) + behind}


def test_drawn_captions_are_those_with_bars(recipe, tmp_path):
    flags = ("--shuffle_tags", "--tag_dropout", 0.5)
    data, _ = data_of(recipe, tmp_path, (64, 64), (64, 64), *flags, captions=["a, b ||| c, d"])
    drawn = [data[Slot(0, 0, epoch, 0, 1.0)]["caption"] for epoch in range(60)]
    assert {"a, b", "a, b, d, c"} < set(drawn) and all(caption.startswith("a, b") for caption in drawn)


@pytest.mark.parametrize(
    ("captions", "trigger", "expected"),
    [
        (["a [trigger] by the sea", "[trigger], a hat"], "zorg", ["a zorg by the sea", "zorg, a hat"]),
        (["[trigger]'s hat", "a hat"], "s_k_s.", ["s_k_s.'s hat", "s_k_s., a hat"]),
    ],
)
def test_a_trigger_word_takes_its_mark(recipe, tmp_path, captions, trigger, expected):
    """ai-toolkit's [trigger], in captions, in prompts, and in what prepare_dataset.py writes."""
    folder = captioned_folder(tmp_path / "data", captions)
    prompts = ("--validation_prompt", "[trigger] in a garden", "a dog")
    args = arguments(recipe, "-d", folder, "--trigger_word", trigger, *prompts)
    assert args.validation_prompt == [f"{trigger} in a garden", "a dog"]
    examples = load_examples(args)
    drawn = [recipe.draw_caption(example.captions, random.Random(0), args) for example in examples]
    assert drawn == expected == [prepend_trigger(caption, trigger) for caption in captions]
    with pytest.raises(UserError, match=r"the caption of 0.png: \[trigger\] in .*: give --trigger_word"):
        load_examples(arguments(recipe, "-d", folder))
    with pytest.raises(UserError, match=r"--validation_prompt: \[trigger\] in .*: give --trigger_word"):
        arguments(recipe, "-d", folder, *prompts)


@pytest.mark.parametrize(
    ("captions", "flags", "finding"),
    [
        (["a dog", "a cat."], ("--shuffle_tags",), "no caption has two tags with --tag_separator ', '"),
        (["a;b", "c;d"], ("--tag_dropout", "0.1"), "no caption has two tags with --tag_separator ', '"),
        (["a,b", "c"], ("--tag_dropout", "0.1"), "captions of one tag: 1 of 2 (c)"),
        (["a,b", "c"], ("--tag_dropout", "0.1", "--keep_tokens", "1"), None),
        (["a,b", "c"], ("--shuffle_tags",), None),
    ],
)
def test_captions_without_tags_are_said(recipe, captions, flags, finding):
    examples = [Example(str(number), [caption], None) for number, caption in enumerate(captions)]
    findings = [found.what for found in unsplit_captions(examples, arguments(recipe, *flags))]
    assert [what[: len(finding or "")] for what in findings] == ([finding] if finding else [])


def test_each_line_may_be_a_caption(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a dog\n\nan animal\nin a field\n")
    captions = [folder_examples(tmp_path, None, None, per_line)[0].captions for per_line in (True, False)]
    assert captions == [["a dog", "an animal", "in a field"], ["a dog an animal in a field"]]
