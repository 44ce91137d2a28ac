"""Properties that hold for any caption, trigger word and new token, by hypothesis.

The examples are the same in every run.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from properties import often

from lora_training.data.captions import clean_caption, prepend_trigger
from lora_training.text.words import insert_tokens

pytestmark = pytest.mark.faults


@often
@given(caption=st.text(max_size=20), trigger=st.text(min_size=1, max_size=6))
def test_a_trigger_word_is_put_in_front_once(caption, trigger):
    caption, trigger = clean_caption(caption), clean_caption(trigger)
    once = prepend_trigger(caption, trigger)
    assert once.endswith(caption) and (not trigger or trigger.lower() in once.lower())


@often
@given(
    tags=st.lists(st.text("abc", min_size=1, max_size=3), max_size=6),
    keep=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_shuffled_tags_are_the_same_tags_and_the_trigger_stays_in_front(recipe, tags, keep, seed):
    args = SimpleNamespace(
        tag_separator=", ", trigger_word="sks", keep_tokens=keep, tag_dropout=0.0, caption_dropout=0.0
    )
    args.captions_vary = args.shuffle_tags = True
    drawn = recipe.draw_caption([", ".join(["sks", *tags])], random.Random(seed), args).split(", ")
    assert drawn[0] == "sks" and sorted(drawn[1:]) == sorted(tags)
    assert drawn[: max(1, keep)] == ["sks", *tags][: max(1, keep)]


@often
@given(
    words=st.lists(st.text("as<>0", min_size=1, max_size=3), min_size=1, max_size=3, unique=True),
    text=st.text("as <>01", max_size=12),
)
@example(words=["a", "s"], text="a s")
def test_new_tokens_stand_for_words_and_not_for_parts_of_tokens(words, text):
    tokens = {word: [f"[{n}]"] if n % 2 else [f"<s{n}>"] for n, word in enumerate(words)}
    marks = {word: [chr(0x4E00 + n)] for n, word in enumerate(words)}  # characters that no word has
    expected = insert_tokens(text, marks)
    for word in words:
        expected = expected.replace(marks[word][0], tokens[word][0])
    assert insert_tokens(text, tokens) == expected
