"""Captions and prompts whose ends no text encoder reads are named, and no others."""

from __future__ import annotations

import pytest
from conftest import FAMILIES, ROOT, load_script, prompts_of
from photo_folders import photo, prepare
from toy_parts import arguments, components_of

import infer_lora
from lora_training import families, inference
from lora_training.data.checks import find_cut_texts, report_findings
from lora_training.data.folders import Example

pytestmark = pytest.mark.unit
CLIP, T5, LONG_T5 = "77 tokens that clip_l", "77 tokens that t5", "512 tokens that t5"
LONGER_CLIP, LONGER_T5 = "larger --max_token_length, up to 225", "larger --max_sequence_length, up to 512"


def circles(count: int) -> str:
    """A text of at least so many tokens in every toy's vocabulary, and of not many more."""
    return " ".join(["circle"] * count)


def read_findings(script, text: str, *flags) -> list[str]:
    """What a training says of a caption, and of the same as a prompt."""
    args = arguments(script, "--validation_prompt", f"{text} star", "a circle", *flags)
    example = Example("x", [text], None, size=(64, 64), set_args=args)
    prompts = prompts_of(script, args, components_of(script, *flags))
    lines = report_findings([example], [(64, 64)], prompts.tokenizers, args)
    return [line for line in lines if "longer than" in line]


@pytest.mark.parametrize(
    ("name", "count", "flags", "expected", "advice"),
    [
        ("sd15", 70, (), None, None),
        ("sd15", 90, (), CLIP, LONGER_CLIP),
        ("sd15", 90, ("--max_token_length", 150), None, None),
        ("sdxl", 240, ("--max_token_length", 225), "227 tokens that clip_l", "shorten them"),
        ("sd3", 70, (), None, None),
        ("sd3", 90, (), T5, LONGER_T5),
        ("sd3", 90, ("--max_sequence_length", 256), None, None),
        ("sd3", 90, ("--drop_t5",), CLIP, "shorten them"),
        ("flux", 90, (), None, None),
        ("flux", 600, (), LONG_T5, "shorten them"),
    ],
)
def test_texts_are_cut_where_no_encoder_reads_on(name, count, flags, expected, advice):
    lines = read_findings(load_script(FAMILIES[name].script), circles(count), *flags)
    kinds = [line.split()[0] for line in lines if "clip_g" not in line]
    assert kinds == (["captions", "prompts"] if expected else [])
    assert all((expected in line or "clip_g" in line) and line.endswith(advice) for line in lines)
    assert all("1 of 1" in line or "1 of 2" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "count", "values", "expected"),
    [
        ("sd15", 90, {}, CLIP),
        ("sdxl", 90, {"max_token_length": 150}, None),
        ("sd3", 90, {"max_sequence_length": 77}, T5),
        ("sd3", 90, {}, None),  # the pipeline's own number is 256
        ("flux", 90, {"max_sequence_length": None}, None),
        ("flux", 600, {}, LONG_T5),
    ],
)
def test_prompts_that_are_drawn_are_not_cut_in_silence(name, count, values, expected, capsys):
    values = {"prompt": ["a circle", circles(count)], "negative_prompt": circles(count + 1)} | values
    base = str(ROOT / "assets" / f"toy_{name}")
    settings = inference.Settings(paths={"base_model_path": base}, **values)
    pipeline = infer_lora.load_pipeline(settings, base)
    inference.report_cut_prompts(pipeline, settings)
    lines = [line for line in capsys.readouterr().out.splitlines() if "longer than" in line]
    assert [expected in line for line in lines if "clip_g" not in line] == ([True] if expected else [])
    assert all(line.startswith("warning: prompts") and "2 of 3" in line for line in lines)
    assert settings.prompt == values["prompt"]


@pytest.mark.parametrize("base", [None, "sd3", "flux"])
@pytest.mark.parametrize("count", [90, 600])
def test_the_doctor_counts_as_the_familys_training_reads(base, count, tmp_path, capsys):
    for number in range(3):
        photo(256, 256, number).save(tmp_path / f"{number}.jpg")
        (tmp_path / f"{number}.txt").write_text(f"{number} {circles(count if number else 5)}")
    family = base or "flux"
    flags = ("-m", ROOT / "assets" / f"toy_{base}") if base else ()
    prepare("--doctor", "-d", tmp_path, "--family", family, "--resolution", "256", *flags)
    printed = capsys.readouterr().out
    limit = families.FAMILIES[family].t5_tokens
    assert (f"captions longer than the {limit} tokens that t5" in printed) == (count > limit)
    assert "that clip" not in printed


def test_nothing_is_said_where_there_is_no_text():
    assert find_cut_texts("prompts", [], {"clip_l": None}, families.SD15, {}) == []
