"""Numbers that aren't finite never reach what is saved, and a training that learns nothing is an error."""

from __future__ import annotations

import json
import math

import pytest
from conftest import QUICKEST, SAMPLE, load_script, metrics, run_here, weights

from lora_training.optim.parts import TrainedPart

pytestmark = pytest.mark.faults


def test_nan_never_reaches_the_weights(tmp_path, monkeypatch, capsys):
    recipe, calls = load_script(QUICKEST.script), []
    original = recipe.compute_loss

    def nan_once(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(recipe, "compute_loss", nan_once)
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 4) == 0
    assert "step 2: the loss is nan; the step is left out" in capsys.readouterr().out
    assert all(w.isfinite().all() for w in weights(tmp_path / "x").values())
    assert metrics(tmp_path / "x")[-1]["skipped_steps"] == 1
    monkeypatch.setattr(recipe, "compute_loss", lambda *arguments: original(*arguments) * math.nan)
    assert run_here(QUICKEST, tmp_path / "y", "-d", SAMPLE, "--max_train_steps", 30) == 2
    assert "has not been finite for 10 steps" in capsys.readouterr().err


def test_constant_loss_is_an_error(tmp_path, monkeypatch, capsys):
    recipe = load_script(QUICKEST.script)
    original = recipe.compute_loss
    monkeypatch.setattr(recipe, "compute_loss", lambda *arguments: original(*arguments) * 0.0)
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 8) == 2
    assert "no gradient reaches the denoiser" in capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_never_saved(tmp_path, monkeypatch, capsys, value):
    original, calls, output = TrainedPart.step, [], tmp_path / "x"

    def spoil_third_step(self):
        original(self)
        calls.append(1)
        if len(calls) == 3:
            self.weights.data[7] = value
            self.update_shadow()

    monkeypatch.setattr(TrainedPart, "step", spoil_third_step)
    flags = ("-d", SAMPLE, "--checkpointing_steps", 1 if value > 0 else 2, "--max_train_steps", 3)
    assert run_here(QUICKEST, output, *flags) == 2
    error = capsys.readouterr().err
    assert "weights are no longer finite" in error and "the last good checkpoint is checkpoint-2" in error
    assert not list(output.glob("*.safetensors"))
    assert sorted(path.name for path in output.glob("*checkpoint*"))[-1] == "checkpoint-2"


def test_half_a_line_of_metrics_blocks_no_resume(tmp_path):
    flags = ("-d", SAMPLE, "--checkpointing_steps", 2, "--max_train_steps", 4)
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 0
    file = tmp_path / "x" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]) + '\n{"step": 4, "lo')
    assert run_here(QUICKEST, tmp_path / "x", *flags, "--resume_from_checkpoint", "checkpoint-2") == 0
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2, 3, 4]
