"""What SD3 and FLUX.1 alone have: T5, and no fp16."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import FAMILIES, SAMPLE, run_here, same_weights, weights
from safetensors.torch import load_file

pytestmark = pytest.mark.run

TOKENS = ("--train_text_encoder_ti", "--token_abstraction", "circle", "--text_encoder_lr", 1e-2)


@pytest.mark.families("sd3", "flux")
def test_t5_reads_as_many_tokens_as_asked(family, script, tmp_path, monkeypatch):
    lengths, original = [], script.compute_loss

    def recorded(batch, latents, embeds, *rest):
        lengths.append(embeds["prompt_embeds"].shape[1])
        return original(batch, latents, embeds, *rest)

    monkeypatch.setattr(script, "compute_loss", recorded)
    flags = ("-d", SAMPLE, "--max_sequence_length", 120, "--max_train_steps", 1)
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert lengths == [120 + (77 if family.name == "sd3" else 0)]


@pytest.mark.parametrize(("name", "frac"), [("flux", 0.5), ("sd3", 0.8)])
def test_t5_tokens_are_trained_and_resumed(name, frac, tmp_path):
    family, whole, broken = FAMILIES[name], tmp_path / "a" / "x", tmp_path / "b" / "x"
    flags = ("-d", SAMPLE, *TOKENS, "--enable_t5_ti", "--train_text_encoder_ti_frac", frac)
    flags += ("--max_train_steps", 6, "--checkpointing_steps", 3)
    assert run_here(family, whole, *flags) == 0
    table = load_file(whole / "x_emb.safetensors")
    halfway = load_file(whole / "checkpoint-3" / "x_emb.safetensors")
    assert "t5" in table and "clip_l" in table
    still_moves = frac > 0.5
    assert all(torch.equal(table[key], halfway[key]) != still_moves for key in table)
    shutil.copytree(whole / "checkpoint-3", broken / "checkpoint-3")
    assert run_here(family, broken, *flags, "--resume_from_checkpoint", "latest") == 0
    assert same_weights(whole, broken)


@pytest.mark.families("sd3", "flux")
def test_fp16_becomes_bf16_and_says_so(family, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")  # as accelerate's own configuration hands it on
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 1) == 0
    assert "using bf16" in capsys.readouterr().out
    assert {value.dtype for value in weights(tmp_path / "x").values()} == {torch.bfloat16}
