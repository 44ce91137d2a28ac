"""--max_train_steps auto: the number of steps follows from the number of pictures."""

from __future__ import annotations

import argparse
import json
import shutil

import pytest
import yaml
from conftest import QUICKEST, SAMPLE, metrics, run_here
from toy_parts import arguments

from lora_training.inference.training_files import select_checkpoints
from lora_training.training import schedule

LATEST = ("--resume_from_checkpoint", "latest")


def run_of(digests: str, batch: int = 1, accumulated: int = 1, held_out: int = 0) -> argparse.Namespace:
    """What is known of a run when its length is decided. digests: a letter for each picture."""
    examples = [argparse.Namespace(digest=digest) for digest in digests]
    plan = argparse.Namespace(buckets=dict.fromkeys(range(len(examples) - held_out), 0), size=batch)
    args = argparse.Namespace(gradient_accumulation_steps=accumulated)
    return argparse.Namespace(args=args, plan=plan, data=argparse.Namespace(examples=examples))


LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTHS = {  # number of steps: the run
    1200: run_of(LETTERS[:12]),
    1300: run_of(LETTERS, batch=2),
    867: run_of(LETTERS, batch=3),
    1000: run_of(LETTERS[:12], held_out=2),
    900: run_of("abcdefghi" * 3),
    800: run_of("abc"),
    3000: run_of([str(number) for number in range(500)]),
    2500: run_of([str(number) for number in range(400)], batch=4, accumulated=4),
}


@pytest.mark.unit
@pytest.mark.parametrize("steps", LENGTHS)
def test_steps_follow_the_pictures_within_bounds(steps, capsys):
    """500 epochs of 12 pictures were 6,000 steps, and of 500 pictures 250,000."""
    assert schedule.steps_by_pictures(LENGTHS[steps]) == steps
    line = capsys.readouterr().out
    assert f"--max_train_steps auto: {steps} steps" in line and "give a number" in line


@pytest.mark.unit
def test_epochs_that_are_asked_for_win_over_auto(recipe):
    assert arguments(recipe, "--max_train_steps", "auto").max_train_steps == "auto"
    args = arguments(recipe, "--max_train_steps", "auto", "--num_train_epochs", 3)
    assert (args.max_train_steps, args.num_train_epochs) == (None, 3)
    assert arguments(recipe, "--max_train_steps", 0).max_train_steps == 1000
    with pytest.raises(SystemExit):
        arguments(recipe, "--max_train_steps", "automatic")


@pytest.mark.resume
def test_an_auto_run_is_as_long_everywhere_and_longer_with_more_pictures(
    pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(schedule, "STEPS_PER_PICTURE", 1)
    monkeypatch.setattr(schedule, "AUTO_STEPS", (2, 20))
    output, steps = tmp_path / "x", len(list(pictures.glob("*.png")))
    flags = ("-d", pictures, "--max_train_steps", "auto", "--lr_scheduler", "cosine")
    flags += ("--gradient_accumulation_steps", 2, "--checkpointing_steps", 2)
    steps = -(-steps // 2)
    assert run_here(QUICKEST, output, *flags) == 0
    assert [row["step"] for row in metrics(output)] == list(range(1, steps + 1))
    assert yaml.safe_load((output / "config.yaml").read_text())["max_train_steps"] == "auto"
    assert json.loads((output / "data.json").read_text())["steps"] == steps
    assert f"# finished: step {steps}" in (output / "config.yaml").read_text()
    assert list(select_checkpoints(str(output), "all")) == ["step 2", "step 4"]  # and no row for the result
    capsys.readouterr()
    assert run_here(QUICKEST, output, *flags, *LATEST) == 0
    assert f"this run is finished, at step {steps}" in capsys.readouterr().out
    for file in output.glob("*.safetensors"):  # as if it had been killed before its end
        file.unlink()
    for number in range(2):
        shutil.copy(SAMPLE / f"smiley_{number:02d}.png", pictures / f"more{number}.png")
        (pictures / f"more{number}.txt").write_text("a red circle")
    assert run_here(QUICKEST, output, *flags, *LATEST) == 2
    assert "--resume_anyway" in capsys.readouterr().err
    assert run_here(QUICKEST, output, *flags, *LATEST, "--resume_anyway") == 0
    assert metrics(output)[-1]["step"] == steps + 1
    assert f"# finished: step {steps + 1}" in (output / "config.yaml").read_text()
