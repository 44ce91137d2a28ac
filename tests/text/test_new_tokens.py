"""New tokens: their rows in the embedding tables, where they stand in prompts, how long they are trained."""

from __future__ import annotations

import argparse

import pytest
import torch
from conftest import (
    ROOT,
)
from toy_parts import components_of

from lora_training.text.tokens import TokenRows
from lora_training.text.words import abstraction_tokens, class_caption, insert_tokens
from lora_training.training.run import Run

pytestmark = pytest.mark.unit


@pytest.fixture
def encoders(recipe):
    """[(tokenizer, encoder)] of SDXL's toy base: CLIP without a projection, and with one."""
    base = components_of(recipe)
    return [tuple(map(base.get, names)) for names in recipe.FAMILY.text_encoders.values()]


def test_token_rows_change_nothing_else(encoders):
    for tokenizer, encoder in encoders:
        before = encoder.get_input_embeddings().weight.detach().clone()
        row = TokenRows(tokenizer, encoder, ["<s0>", "<s1>"], None, 0)
        assert row.initial.std() == pytest.approx(before.std().item(), rel=0.3)
        ids = tokenizer(["a <s0><s1> b"], return_tensors="pt").input_ids
        encoder(ids)[0][..., 0].sum().backward()
        assert row.weight.grad.abs().sum() > 0
        table = encoder.get_input_embeddings().weight
        assert torch.equal(table[: len(before)], before) and table.grad is None
        started = TokenRows(tokenizer, encoder, ["<s2>"], "star", 0)
        assert torch.equal(started.initial, before[tokenizer("star", add_special_tokens=False).input_ids])


def test_rows_reach_a_table_that_has_room_already():
    """T5's released table is longer than its vocabulary, so nothing is resized.

    Its encoder reads a second layer.
    """
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(ROOT / "assets" / "toy_flux" / "tokenizer_2")
    config = T5Config(vocab_size=len(tokenizer) + 28, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    row = TokenRows(tokenizer, encoder, ["<s0>", "<s1>"], None, 0)
    assert encoder.get_input_embeddings().num_embeddings == len(tokenizer) + 26
    encoder(tokenizer(["a <s0><s1>"], return_tensors="pt").input_ids)[0][..., 0].sum().backward()
    assert (row.weight.grad.abs().sum(1) > 0).all()


def test_new_tokens_are_as_large_as_the_table(encoders):
    for tokenizer, encoder in encoders:
        size = encoder.get_input_embeddings().weight.std().item()
        rows = TokenRows(tokenizer, encoder, [f"<s{i}>" for i in range(8)], None, 3)
        assert rows.weight.std().item() == pytest.approx(size, rel=0.2)


def test_insert_tokens():
    args = argparse.Namespace(train_text_encoder_ti=True, num_new_tokens_per_abstraction=2)
    args.initializer_concept, args.token_abstraction = None, "TOK, TOKEN"
    words = abstraction_tokens(args, None)
    assert words == {"TOK": ["<s0>", "<s1>"], "TOKEN": ["<s2>", "<s3>"]}
    assert insert_tokens("a TOKEN and TOK", words) == "a <s2><s3> and <s0><s1>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("TOKYO at night", "TOKYO at night"),
        ("a STOK, TOK's hat", "a STOK, <s0><s1>'s hat"),
        ("in the style of TOK.", "in the style of <s0><s1>."),
        ("TOKs and TOK2", "TOKs and TOK2"),
        ("(TOK) TOKÉ", "(<s0><s1>) TOKÉ"),
        ("p.x.", "<s2><s3>"),
    ],
)
def test_new_tokens_stand_for_no_part_of_a_word(text, expected):
    assert insert_tokens(text, {"TOK": ["<s0>", "<s1>"], "p.x.": ["<s2>", "<s3>"]}) == expected


def test_text_moves_up_to_the_pivot():
    parts = [argparse.Namespace(name=n, last_step=s) for n, s in (("embeddings", 3), ("denoiser", 9))]
    run = argparse.Namespace(parts=parts)
    assert [Run.trains_text_at(run, step) for step in (0, 2, 3, 8)] == [True, True, False, False]


def test_the_class_takes_the_place_of_the_word():
    captions = {
        "a photo of sks dog": "a photo of dog",
        "sks, on a beach": "dog, on a beach",
        "a TOK dog": "a dog",
    }
    for caption, expected in captions.items():
        assert class_caption(caption, "dog", ["sks", "TOK"]) == expected


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("two masks, sks", "two masks, cat"),
        ("Sks cats at TOKYO, a TOK", "cats at TOKYO, a cat"),
        ("an s_k_s. by desks", "an cat by desks"),
        ("SKS CAT", "CAT"),
    ],
)
def test_the_class_takes_the_place_of_no_part_of_a_word(caption, expected):
    assert class_caption(caption, "cat", ["sks", "TOK", "s_k_s."]) == expected
