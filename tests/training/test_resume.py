"""An interrupted run, gone on with, ends with the very weights of an unbroken one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import FAMILIES, QUICKEST, ROOT, losses, metrics, quick_flags, run_here, same_weights

from lora_training.training.metrics import MetricsLogger

pytestmark = pytest.mark.resume

LATEST = ("--resume_from_checkpoint", "latest")
TOKENS = ("--train_text_encoder_ti", "--token_abstraction", "red", "--text_encoder_lr", 1e-2)
EMA = ("--use_ema", "--ema_decay", 0.9)
CASES = {
    "mid-epoch, cached latents, flips": ("--cache_latents", "--random_flip", "--train_batch_size", 2),
    "mid-accumulation, augmentations": (
        *("--gradient_accumulation_steps", 3, "--color_jitter", "--random_rotation"),
    ),
    "prodigy": ("--optimizer", "prodigy", "--learning_rate", 1, "--lr_scheduler", "cosine"),
    "ema, text encoder, dropout": (*EMA, "--train_text_encoder", "--lora_dropout", 0.2),
    "8-bit": ("--optimizer", "adamw8bit"),
    "schedule-free": ("--optimizer", "schedulefree"),
    "past the pivot": (*TOKENS, "--train_text_encoder_ti_frac", 0.25),
    "before the pivot": (*TOKENS, "--train_text_encoder_ti_frac", 0.75),
    "at the pivot": (*TOKENS, "--train_text_encoder_ti_frac", 0.5),
    "lokr, ema": ("--lora_type", "lokr", *EMA, "--gradient_checkpointing"),
    "buckets, repeats": ("--aspect_ratio_buckets", "auto", "--repeats", 2, "--train_batch_size", 2),
}
FAMILIES_OF = {  # noise, text and tokens for each family's own code in one of them; the rest for one family
    "mid-epoch, cached latents, flips": ("flux", "sd15", "sd3", "sdxl"),
    "mid-accumulation, augmentations": ("flux",),
    "prodigy": ("sdxl",),
    "ema, text encoder, dropout": ("sd3", "sdxl"),
    "8-bit": ("flux",),
    "schedule-free": ("flux",),
    "past the pivot": ("flux", "sd15"),
    "before the pivot": ("sdxl",),
    "at the pivot": ("flux",),
    "lokr, ema": ("flux",),
    "buckets, repeats": ("flux",),
}
PAIRS = [
    pytest.param(FAMILIES[name], case, id=f"{name}-{case}") for case in CASES for name in FAMILIES_OF[case]
]


def forget_results(output):
    """As if the run had been killed before it wrote them."""
    for file in output.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_resumed_run_equals_unbroken_run(family, pictures, tmp_path, case):
    flags = ("-d", pictures, *CASES[case], "--max_train_steps", 4, "--checkpointing_steps", 2)
    whole, broken = tmp_path / "whole" / "x", tmp_path / "broken" / "x"
    assert run_here(family, whole, *flags) == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "checkpoint-4")  # as if the run had died between steps 2 and 4
    forget_results(broken)
    assert run_here(family, broken, *flags, *LATEST) == 0
    assert same_weights(whole, broken)
    assert losses(broken) == losses(whole)
    assert [row["step"] for row in metrics(broken)] == [1, 2, 3, 4]


@pytest.mark.xdist_group("processes")
def test_killed_at_a_random_step(pictures, tmp_path):
    from ready_process import start

    flags = ("-d", pictures, "--max_train_steps", 16, "--checkpointing_steps", 4, "--rank", 8)
    assert run_here(QUICKEST, tmp_path / "a" / "x", *flags) == 0
    output, log = tmp_path / "b" / "x", tmp_path / "log"
    process = start(ROOT / QUICKEST.script, quick_flags(QUICKEST, output, *flags), {}, log)
    file, last_step, limit = output / "metrics.jsonl", random.randrange(5, 12), time.monotonic() + 120
    while process.exitcode is None and time.monotonic() < limit:
        if file.exists() and len(file.read_text().splitlines()) >= last_step:
            process.kill()
            break
        time.sleep(0.005)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert not (output / "pytorch_lora_weights.safetensors").exists()
    assert run_here(QUICKEST, output, *flags, *LATEST) == 0
    assert same_weights(tmp_path / "a" / "x", output)


@pytest.fixture(scope="module")
def five_steps(tmp_path_factory):
    """A folder with captioned pictures (pictures), and an unbroken run of five steps on them (x)."""
    from conftest import write_pictures

    folder = tmp_path_factory.mktemp("five_steps")
    data = write_pictures(folder / "pictures")
    assert run_here(QUICKEST, folder / "x", "-d", data, "--max_train_steps", 5) == 0
    return folder


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)]
)
def test_signal_saves_within_a_step(five_steps, tmp_path, monkeypatch, number, code):
    original, output = MetricsLogger.log, tmp_path / "x"

    def log_and_signal(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), number)
        return original(self, step, *rest)

    flags = ("-d", five_steps / "pictures", "--max_train_steps", 5)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "log", log_and_signal)
        assert run_here(QUICKEST, output, *flags) == code
    assert (output / "checkpoint-2" / "manifest.json").exists()
    assert run_here(QUICKEST, output, *flags, *LATEST) == 0
    assert same_weights(five_steps / "x", output)


@pytest.mark.families("sdxl")
def test_damaged_checkpoint_is_named_and_the_one_before_taken(family, pictures, tmp_path, capsys):
    flags, output = ("-d", pictures, "--max_train_steps", 4, "--checkpointing_steps", 1), tmp_path / "x"
    assert run_here(family, output, *flags) == 0
    forget_results(output)
    state = output / "checkpoint-4" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    (output / "checkpoint-3" / "manifest.json").unlink()
    capsys.readouterr()
    assert run_here(family, output, *flags, *LATEST) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-4 is passed over: training_state.pt is damaged" in printed
    assert "checkpoint-3 is passed over" in printed
    assert "going on from checkpoint-2" in printed


def test_all_damaged_is_an_error_and_none_a_start(pictures, tmp_path, capsys):
    flags = ("-d", pictures, "--max_train_steps", 1, "--checkpointing_steps", 1, *LATEST)
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 0
    assert "starting from step 0" in capsys.readouterr().out
    forget_results(tmp_path / "x")
    (tmp_path / "x" / "checkpoint-1" / "training_state.pt").write_bytes(b"")
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 2
    assert "every checkpoint" in capsys.readouterr().err


def test_resume_with_another_rank_is_refused(pictures, tmp_path, capsys):
    flags = ("-d", pictures, "--max_train_steps", 1, "--checkpointing_steps", 1)
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 0
    flags += ("--rank", 8, "--resume_from_checkpoint", "checkpoint-1")
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 2
    assert "rank 4, now 8" in capsys.readouterr().err


def test_only_the_latest_checkpoints_stay_and_the_seed_is_kept(pictures, tmp_path):
    flags = ("-d", pictures, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2)
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 0
    folders = sorted((tmp_path / "x").glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-2", "checkpoint-3"]
    assert json.loads((folders[-1] / "manifest.json").read_text())["seed"] == 3


@pytest.mark.parametrize("name", ["latest", "checkpoint-4"])
def test_a_checkpoint_beyond_the_last_step_is_an_error(five_steps, tmp_path, capsys, name):
    """It ended as "finished: step 3" with the weights of step 4."""
    flags, output = ("-d", five_steps / "pictures"), tmp_path / "x"
    assert run_here(QUICKEST, output, *flags, "--max_train_steps", 5, "--checkpointing_steps", 2) == 0
    forget_results(output)
    before = {file: file.read_bytes() for file in output.glob("checkpoint-*/*")}
    capsys.readouterr()
    assert run_here(QUICKEST, output, *flags, "--max_train_steps", 3, "--resume_from_checkpoint", name) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has trained 4 steps, this run ends at step 3: raise --max_train_steps" in line
    assert before == {file: file.read_bytes() for file in output.glob("checkpoint-*/*")}
    assert not list(output.glob("*.safetensors"))


def test_tensorboard_shows_each_step_once(five_steps, tmp_path):
    """Steps after a checkpoint were there twice after a resume, and a run before --overwrite for good."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def logged_losses() -> list[tuple[int, float]]:
        accumulator = EventAccumulator(str(output / "logs" / f"lora-{QUICKEST.name}"))
        accumulator.Reload()
        return [(event.step, event.value) for event in accumulator.Scalars("loss")]

    flags, output = ("-d", five_steps / "pictures", "--report_to", "tensorboard"), tmp_path / "x"
    assert run_here(QUICKEST, output, *flags, "--max_train_steps", 5, "--checkpointing_steps", 3) == 0
    forget_results(output)
    assert run_here(QUICKEST, output, *flags, "--max_train_steps", 5, *LATEST) == 0
    assert [step for step, _ in logged_losses()] == [1, 2, 3, 4, 5]
    anew = ("--max_train_steps", 2, "--overwrite", "--seed", 8)
    assert run_here(QUICKEST, output, *flags, *anew) == 0
    assert logged_losses() == [(row["step"], pytest.approx(row["loss"])) for row in metrics(output)]
