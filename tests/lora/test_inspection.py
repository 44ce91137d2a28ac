"""What is in a LoRA file, and why it has no effect."""

from __future__ import annotations

import pytest
from conftest import FAMILIES, SAMPLE, run_here
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trained_loras import train_with_text_encoder

from scripts.lora import inspect_lora, merge_lora

pytestmark = pytest.mark.run


@pytest.fixture
def trained(family, shelf):
    """A short run with text encoder and alpha half the rank, shared by the tests of a family."""
    return train_with_text_encoder(family, shelf)


def edited(source, target, change) -> None:
    """A copy of a LoRA file with its tensors changed."""
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    save_file(
        {k: change(k, v.clone()).contiguous() for k, v in load_file(source).items()},
        target,
        metadata=metadata,
    )


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda k, v: v, 0, "sound"),
        (lambda k, v: v * 0 if "up" in k or "lora_B" in k else v, 1, "ZERO"),
        (lambda k, v: v * 1e-9 if "up" in k or "lora_B" in k else v, 1, "TOO FAINT"),
        (lambda k, v: v * 1e4 if "up" in k or "lora_B" in k else v, 1, "OUT OF SCALE"),
        (lambda k, v: v * float("nan") if "mid_block" in k and ("up" in k) else v, 1, "NOT FINITE"),
    ],
    ids=["sound", "zero", "faint", "huge", "nan"],
)
def test_inspect_says_why_a_lora_has_no_effect(shelf, tmp_path, capsys, change, code, words):
    family = FAMILIES["sd15"]
    output = shelf / "inspected"
    if not output.exists():
        assert run_here(family, output, "-d", SAMPLE, "--learning_rate", 1e-3, "--trigger_word", "sks") == 0
    file = tmp_path / "pytorch_lora_weights.safetensors"
    edited(output / "pytorch_lora_weights.safetensors", file, change)
    capsys.readouterr()
    plot = tmp_path / "plot.png"
    assert inspect_lora.main([str(file), "--plot", str(plot), "--base", family.base]) == code
    said = capsys.readouterr().out
    assert words in said and "family          sd15" in said and "rank            4" in said
    assert plot.exists() and Image.open(plot).width == 900
    if words == "NOT FINITE":
        assert merge_lora.main([family.base, str(tmp_path / "m"), "--lora", str(file)]) == 2
        assert "not finite" in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_inspect_names_trigger_words_and_text_encoders(family, trained, capsys):
    assert inspect_lora.main([str(trained / f"{family.name}.safetensors"), "--base", family.base]) in (0, 1)
    said = capsys.readouterr().out
    assert "trigger words   sks" in said and "text_encoder" in said and "alpha / rank    0.5" in said
