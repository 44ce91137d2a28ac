"""Prompts of validation: those of a file, and those whose pictures should not change."""

from __future__ import annotations

import argparse

import pytest
from conftest import FLUX, SAMPLE, run_here
from PIL import Image
from toy_parts import arguments

from lora_training.errors import UserError
from lora_training.validation.prompts import control_prompts

pytestmark = pytest.mark.unit

PROMPTS = {
    "prompts.yaml": (
        "- a circle\n- {prompt: a star, width: 96, seed: 5, steps: 3, guidance: 2, lora_scale: 0}\n"
    ),
    "prompts.txt": "# two\na circle\na star --w 96 --d 5 --s 3 --l 2 --n a square\n",
}


@pytest.mark.run
@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_have_sizes_seeds_and_scales_of_their_own(name, tmp_path, capsys):
    (tmp_path / name).write_text(PROMPTS[name])
    flags = ("--validation_prompts_file", tmp_path / name, "--num_validation_images", 1)
    flags += ("--validation_inference_steps", 2, "--report_to", "tensorboard")
    flags += ("--learning_rate", 1e-2, "--max_train_steps", 2)
    assert run_here(FLUX, tmp_path / "out", "-d", SAMPLE, *flags) == 0
    noted = "take no account of negative prompts" in capsys.readouterr().out
    assert noted == ("--n " in PROMPTS[name])
    before, after = (tmp_path / "out" / "samples" / f"step-00000{n}" for n in (0, 2))
    with Image.open(after / "00_00_a-circle.png") as first, Image.open(after / "01_00_a-star.png") as second:
        assert (first.size, second.size) == ((64, 64), (96, 64))
        assert second.text["seed"] == "5"
    pixels = [Image.open(f / "01_00_a-star.png").tobytes() for f in (before, after)]
    assert (pixels[0] == pixels[1]) == (name == "prompts.yaml")  # at scale 0 the LoRA changes nothing


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "- {prompt: a, hight: 64}", "prompt 1: unknown key 'hight'"),
        ("b.yaml", "- a\n- {prompt: a, steps: many}", "prompt 2: steps 'many' is no count"),
        ("c.yaml", "prompt: a", "expected a list, found dict"),
        ("d.txt", "a --w 65", "width 65 is not divisible"),
        ("e.txt", "# nothing\n\n", "no prompt in it"),
        ("f.yaml", "- {seed: 1}", "prompt 1: has no prompt"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said(recipe, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        arguments(recipe, "--validation_prompts_file", tmp_path / name)


def test_what_a_class_set_draws_should_not_change():
    texts = {True: "an animal", False: "a dog"}
    sets = [argparse.Namespace(is_class=c, default_caption=text) for c, text in texts.items()]
    args = argparse.Namespace(control_prompt=None, class_prompt=None, sets=sets, triggers=["sks"])
    example = argparse.Namespace(captions=["sks dog"], held_out=False)
    assert control_prompts(args, [example], {}) == ["an animal"]
    args.sets = sets[1:]
    assert control_prompts(args, [example], {}) == ["dog"]
    args.control_prompt = ["a cat"]
    assert control_prompts(args, [example], {}) == ["a cat"]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Sks, two masks", "two masks"),
        ("a TOK in TOKYO", "a in TOKYO"),
        ("s_k_s., desks on tokens", "desks on tokens"),
    ],
)
def test_control_prompts_lose_words_and_no_parts_of_words(caption, expected):
    args = argparse.Namespace(control_prompt=None, class_prompt=None, sets=[], triggers=["sks", "s_k_s."])
    example = argparse.Namespace(captions=[caption], held_out=False)
    assert control_prompts(args, [example], {"TOK": ["<s0>"]}) == [expected]
