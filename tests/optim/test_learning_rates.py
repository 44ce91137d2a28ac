"""Rates with which nothing is learned: another default, or a line."""

from __future__ import annotations

import pytest
import torch
import yaml
from conftest import QUICKEST, SAMPLE, metrics, run_here, weights
from safetensors.torch import load_file
from toy_parts import arguments

from lora_training.errors import UserError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("flags", [("--optimizer", "prodigy"), ("--use_prodigy",)])
def test_prodigys_default_is_one(recipe, flags):
    assert arguments(recipe, *flags).learning_rate == 1
    assert arguments(recipe, *flags, "--learning_rate", 0.5).learning_rate == 0.5


def test_other_defaults_stay(recipe):
    for name in ("adamw", "torch.optim.RAdam", "schedulefree"):
        args = arguments(recipe, "--optimizer", name)
        assert args.learning_rate == args.defaults["learning_rate"] == args.settings["learning_rate"] == 1e-4
    for name in ("prodigyopt.Prodigy", "prodigyplus.ProdigyPlusScheduleFree", "dadaptation.DAdaptAdam"):
        assert arguments(recipe, "--optimizer", name).learning_rate == 1


def test_the_default_is_recorded_and_a_low_rate_is_said(tmp_path, capsys):
    flags = ("-d", SAMPLE, "--max_train_steps", 1)
    assert run_here(QUICKEST, tmp_path / "x", *flags, "--optimizer", "prodigy") == 0
    assert "multiplies it" not in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())["learning_rate"] == 1
    (tmp_path / "preset.yaml").write_text("learning_rate: 1e-4\n")
    again = ("--optimizer", "prodigyopt.Prodigy", "--config", tmp_path / "preset.yaml")
    run_here(QUICKEST, tmp_path / "y", *flags, *again)
    printed = capsys.readouterr().out
    assert "prodigyopt.Prodigy finds its own step size for the denoiser, and the learning rate of" in printed


TEXT = ("--train_text_encoder", "--train_text_encoder_frac", 0.5, "--max_train_steps", 4)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--max_train_steps", 2, "--lr_warmup_steps", 9), "the denoiser is trained for 2 steps"),
        ((*TEXT, "--lr_warmup_steps", 3), "the text_encoder is trained for 2 steps"),
    ],
)
def test_a_warm_up_that_is_longer_than_the_training_is_said(tmp_path, capsys, flags, line):
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, *flags) == 0
    lines = [text for text in capsys.readouterr().out.splitlines() if "--lr_warmup_steps" in text]
    assert len(lines) == 1 and line in lines[0] and "never at its full rate" in lines[0]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--train_text_encoder", "--train_text_encoder_frac", 0), "no text encoder is trained"),
        (
            ("--train_text_encoder_ti", "--token_abstraction", "circle", "--train_text_encoder_ti_frac", 0),
            "no new tokens are learned",
        ),
    ],
)
def test_a_share_of_nothing_trains_nothing(tmp_path, capsys, flags, line):
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, *flags, "--max_train_steps", 1) == 0
    assert line in capsys.readouterr().out
    assert all(".transformer" in name for name in weights(tmp_path / "x"))


def test_tokens_alone_are_trained_whatever_their_share(recipe):
    flags = ("--train_text_encoder_ti", "--train_text_encoder_ti_frac", 0, "--train_transformer_frac", 0)
    assert arguments(recipe, *flags).train_text_encoder_ti


def test_a_share_of_the_steps_for_the_lora_lets_the_tokens_train_to_the_end(tmp_path, capsys):
    """--train_transformer_frac 0.5 beside the default --train_text_encoder_ti_frac was refused."""
    tokens = ("--train_text_encoder_ti", "--token_abstraction", "circle", "--text_encoder_lr", 1e-2)
    flags = ("-d", SAMPLE, *tokens, "--train_transformer_frac", 0.5, "--checkpointing_steps", 2)
    assert run_here(QUICKEST, tmp_path / "x", *flags, "--max_train_steps", 4) == 0
    printed = capsys.readouterr().out
    (note,) = [line for line in printed.splitlines() if "--train_text_encoder_ti_frac" in line]
    assert note.startswith("note: ") and "--train_transformer_frac 0.5" in note and "to the end" in note
    rows = metrics(tmp_path / "x")
    assert [("lr_denoiser" in row, "lr_embeddings" in row) for row in rows] == [(True, True)] * 2 + [
        (False, True)
    ] * 2
    files = [file.name for file in tmp_path.glob("x/*.safetensors")]
    halfway = {name: load_file(tmp_path / "x" / "checkpoint-2" / name) for name in files}
    for name, tensors in halfway.items():
        final = load_file(tmp_path / "x" / name)
        same = all(torch.allclose(final[key].float(), value.float()) for key, value in tensors.items())
        assert same == (not name.endswith("_emb.safetensors"))


@pytest.mark.parametrize("flags", [(), ("--train_text_encoder", "--train_text_encoder_frac", 0.5)])
def test_a_share_of_the_steps_is_refused_where_no_tokens_can_take_the_rest(recipe, flags):
    with pytest.raises(UserError, match="--train_transformer_frac below 1 leaves steps in which nothing"):
        arguments(recipe, "--train_transformer_frac", 0.5, *flags)
