"""Brackets, BREAK and braces in captions mean what they mean in the WebUIs, and nothing unless asked for."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
from conftest import FAMILIES, SD15, losses, run_here, same_weights, write_pictures
from toy_parts import arguments, captioned_folder, components_of
from transformers import CLIPTokenizer

import infer_lora
from lora_training.data.checks import find_cut_texts
from lora_training.data.emphasis import all_variants, caption_variants, parse_weights
from lora_training.data.examples import load_examples
from lora_training.errors import UserError
from lora_training.text.chunks import chunk_ids

pytestmark = pytest.mark.unit

PARSED = {  # as AUTOMATIC1111's WebUI reads them
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        *(("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55)),
        *((", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)),
    ],
    "[[dim]": [("dim", 1 / 1.21)],
    "at 12:30) :) x]": [("at 12:30) :) x]", 1.0)],
    "(a: 1.5 ) (b:1.2.3)": [("a", 1.5), (" ", 1.0), ("b:1.2.3)", 1.1)],
    "a\\b": [("ab", 1.0)],
    "": [],
}


@pytest.mark.parametrize("prompt", PARSED)
def test_weights_are_those_of_the_webui(prompt):
    (stretch,) = parse_weights(prompt)
    assert [text for text, _ in stretch] == [text for text, _ in PARSED[prompt]]
    assert [weight for _, weight in stretch] == pytest.approx([weight for _, weight in PARSED[prompt]])


def test_break_begins_the_next_chunk():
    tokenizer = CLIPTokenizer.from_pretrained(f"{SD15.base}/tokenizer")
    first, second = chunk_ids(tokenizer, ["a circle", "red star"], 1)[0]
    for prompt in (
        "a circle BREAK red star",
        "(a circle:1.0)BREAK\tred star BREAK",
        "a circle BREAK (red) star",
    ):
        ids, weights = chunk_ids(tokenizer, [prompt], 3, weighted=True)
        assert torch.equal(ids[:2], torch.stack([first, second]))
        assert torch.equal(ids[2], chunk_ids(tokenizer, [""], 1)[0][0])
        assert (weights is None) == ("(red)" not in prompt)
    assert weights[1, 1] == 1.1 and weights.sum() == pytest.approx(3 * 77 + 0.1)
    assert len(parse_weights("BREAKFAST at a BREAKER")) == 1


def test_texts_without_marks_are_read_as_before():
    tokenizer = CLIPTokenizer.from_pretrained(f"{SD15.base}/tokenizer")
    prompts = ["", "a red circle, 3:4", "a circle " * 90]
    for chunks in (1, 3):
        usual, weighted = (chunk_ids(tokenizer, prompts, chunks, flag) for flag in (False, True))
        assert torch.equal(usual[0], weighted[0]) and usual[1] is weighted[1] is None


@pytest.mark.families("sd15", "sdxl")
def test_hidden_states_are_weighed_and_keep_their_mean(script, family):
    """Against the formula, on what the same words give without brackets; the pooled vector stays."""
    base = components_of(script, "--prompt_weighting", "--max_token_length", 150)
    for key, names in script.FAMILY.text_encoders.items():
        tokenizer, encoder = (base.get(name) for name in names)
        plain, weighted = (
            script.encode_prompts(key, [text, "a star"], tokenizer, encoder, base.args)
            for text in ("a red circle BREAK star", "a (red:1.5) [circle] BREAK star")
        )
        factors = torch.ones(77, dtype=torch.float64)
        factors[2], factors[3] = 1.5, 1 / 1.1
        ids = tokenizer("a red circle", add_special_tokens=False).input_ids
        assert len(ids) == 3
        output = encoder(chunk_ids(tokenizer, ["a red circle"], 1)[0], output_hidden_states=True)
        states = output.last_hidden_state if family.name == "sd15" else output.hidden_states[-2]
        states = states.double()
        expected = states[0] * factors[:, None]
        expected *= states.mean() / expected.mean()
        first = weighted["hidden"][0].double()
        torch.testing.assert_close(first[1:76], expected[1:76], rtol=1e-4, atol=1e-5)
        assert torch.equal(weighted["hidden"][0, 76:], plain["hidden"][0, 76:])  # the second chunk has none
        assert torch.equal(weighted["hidden"][1], plain["hidden"][1])
        assert key != "clip_g" or torch.equal(weighted["pooled"], plain["pooled"])


@pytest.mark.families("sd3", "flux")
def test_families_with_t5_say_that_they_have_no_weights(script):
    with pytest.raises(UserError, match="--prompt_weighting: "):
        arguments(script, "--prompt_weighting")


def test_tags_in_brackets_stay_together(recipe):
    """Shuffled apart, a bracket would weigh what stands behind it."""
    flags = ("--shuffle_tags", "--tag_dropout", 0.3, "--prompt_weighting", "--trigger_word", "sks")
    args, caption = arguments(recipe, *flags), r"(a, b:1.3), c, [d, (e, f)], g \(h, i"
    parts = {"(a,b:1.3)", "c", "[d,(e,f)]", r"g \(h", "i", "sks"}
    drawn = set()
    for seed in range(60):
        text = recipe.draw_caption([caption], random.Random(seed), args)
        depth, tags = 0, [""]
        for sign in text.replace(", ", ","):
            depth += (sign in "([") - (sign in ")]") if not tags[-1].endswith("\\") else 0
            tags = [*tags, ""] if sign == "," and not depth else [*tags[:-1], tags[-1] + sign]
        drawn |= set(tags)
    assert drawn == parts


def test_what_follows_a_break_beyond_the_last_chunk_is_said(recipe):
    tokenizers = {"clip_l": CLIPTokenizer.from_pretrained(f"{SD15.base}/tokenizer")}
    texts = ["a circle BREAK a star", "a (circle)"]
    for length, count in ((75, 1), (150, 0)):
        settings = {"max_token_length": length, "prompt_weighting": True}
        assert len(find_cut_texts("captions", texts, tokenizers, recipe.FAMILY, settings)) == count


VARIANTS = {
    "a {red|blue} dog": ["a red dog", "a blue dog"],
    "{a|b} {c|d}": ["a c", "a d", "b c", "b d"],
    "{red |}dog": ["red dog", "dog"],
    "{a|{b|c}}": ["a", "b", "a", "c"],
    r"\{a|b\} {x\|y|z}": ["{a|b} x|y", "{a|b} z"],
    "a|b (c:1.2) {d}": ["a|b (c:1.2) d"],
}


@pytest.mark.parametrize("caption", VARIANTS)
def test_braces_are_each_of_their_words(caption):
    assert caption_variants(caption, "x") == VARIANTS[caption]


def test_braces_that_make_too_many_captions_are_refused():
    with pytest.raises(UserError, match=r"the caption of x\.png: its braces make more than 1000 captions"):
        caption_variants("{a|b|c|d} " * 6, "the caption of x.png")


def test_lines_whose_shares_no_short_list_has_are_refused():
    lines = ["{" + "|".join("abcdefghijklmnopqrstuvwxyz"[:count]) + "}" for count in (25, 23, 19)]
    with pytest.raises(UserError, match="x: its lines' braces have as different numbers of words"):
        all_variants(lines, "x")


def test_each_caption_of_a_picture_is_drawn_as_often_as_another(recipe, tmp_path):
    data = captioned_folder(tmp_path / "data", ["{a|b|c} {d|e}\nf\n{g|h}"])
    flags = ("--train_data_dir", data, "--caption_per_line")
    (example,) = load_examples(arguments(recipe, *flags, "--caption_wildcards"))
    shares = {text: example.captions.count(text) / len(example.captions) for text in example.captions}
    assert shares["f"] == pytest.approx(1 / 3) and shares["g"] == shares["h"] == pytest.approx(1 / 6)
    assert sorted(shares) == sorted(["a d", "a e", "b d", "b e", "c d", "c e", "f", "g", "h"])
    (example,) = load_examples(arguments(recipe, *flags))
    assert example.captions == ["{a|b|c} {d|e}", "f", "{g|h}"]


def test_kohyas_enable_wildcard_is_understood(recipe, tmp_path):
    data = write_pictures(tmp_path / "pictures")
    (tmp_path / "set.json").write_text(
        f'{{"datasets": [{{"subsets": [{{"image_dir": "{data}", "enable_wildcard": true}}]}}]}}'
    )
    args = recipe.parse_args(["-m", "base", "--dataset_config", str(tmp_path / "set.json")])
    assert [own.caption_wildcards for own in args.sets] == [True]


def test_prompts_are_not_cut_where_the_webuis_read_on(monkeypatch):
    """Two BREAKs are three chunks in infer_lora.py, and the negative prompt has as many."""
    seen = []
    monkeypatch.setattr(infer_lora, "encode_prompt", lambda *given: seen.append(given[1:]) or {})
    tokenizer = CLIPTokenizer.from_pretrained(f"{SD15.base}/tokenizer")
    pipeline = type("Pipeline", (), {"tokenizer": tokenizer, "config": {}})
    settings = type("Settings", (), {"clip_skip": 0, "max_token_length": None, "prompt_weighting": True})
    infer_lora.text_arguments(pipeline, "a BREAK b BREAK c", "bad", settings)
    assert seen == [("a BREAK b BREAK c", 0, 3, True), ("bad", 0, 3, True)]


@pytest.mark.resume
def test_a_run_with_weights_and_wildcards_goes_on_where_it_was_broken_off(tmp_path):
    """With caches and buckets; and other weights, or none, are another training."""
    data = tmp_path / "pictures"
    write_pictures(data)
    for number, file in enumerate(sorted(data.glob("*.txt"))):
        file.write_text(f"a ({{red|blue}}:1.4) circle BREAK [{{star|heart}} {number}]")
    usual = ("-d", data, "--cache_latents", "--aspect_ratio_buckets", "auto", "--max_token_length", 150)
    usual += ("--max_train_steps", 4, "--checkpointing_steps", 2, "--cache_folder", tmp_path / "cache")
    flags = (*usual, "--prompt_weighting", "--caption_wildcards")
    whole, broken, plain = (tmp_path / name / "x" for name in ("a", "b", "c"))
    family = FAMILIES["sd15"]
    assert run_here(family, whole, *flags) == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")
    for file in broken.glob("*.safetensors"):
        file.unlink()
    assert run_here(family, broken, *flags, "--resume_from_checkpoint", "latest") == 0
    assert same_weights(whole, broken) and losses(whole) == losses(broken)
    assert run_here(family, plain, *usual, "--caption_wildcards") == 0  # of the same cache
    assert losses(plain) != losses(whole)


def test_without_marks_the_flags_change_no_bit(pictures, tmp_path):
    flags = ("-d", pictures, "--max_train_steps", 2)
    assert run_here(FAMILIES["sdxl"], tmp_path / "a" / "x", *flags) == 0
    marked = (*flags, "--prompt_weighting", "--caption_wildcards")
    assert run_here(FAMILIES["sdxl"], tmp_path / "b" / "x", *marked) == 0
    assert same_weights(tmp_path / "a" / "x", tmp_path / "b" / "x")
