"""An interrupted run, gone on with, ends with the very weights of an unbroken one."""

import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import FAMILIES, ROOT, load_script, losses, metrics, quick_flags, run_here, same_weights

pytestmark = pytest.mark.resume

TI = ("--train_text_encoder_ti", "--token_abstraction", "red", "--text_encoder_lr", 1e-2)
CASES = {
    "mid-epoch, cached latents, flips": ("--cache_latents", "--random_flip", "--train_batch_size", 2),
    "mid-accumulation, augmentations": ("--gradient_accumulation_steps", 3, "--color_jitter", "--random_rotation"),
    "prodigy": ("--optimizer", "prodigy", "--learning_rate", 1, "--lr_scheduler", "cosine"),
    "ema, text encoder, dropout": ("--use_ema", "--ema_decay", 0.9, "--train_text_encoder", "--lora_dropout", 0.2),
    "8-bit": ("--optimizer", "adamw8bit"),
    "schedule-free": ("--optimizer", "schedulefree"),
    "past the pivot": (*TI, "--train_text_encoder_ti_frac", 0.4),
    "before the pivot": (*TI, "--train_text_encoder_ti_frac", 0.8),
    "at the pivot": (*TI, "--train_text_encoder_ti_frac", 0.5),
    "lokr, ema": ("--lora_type", "lokr", "--use_ema", "--ema_decay", 0.9, "--gradient_checkpointing"),
    "buckets, repeats": ("--aspect_ratio_buckets", "auto", "--repeats", 2, "--train_batch_size", 2),
}


def forget_results(output):
    """As if the run had been killed before it wrote them."""
    for file in output.glob("*.safetensors"):
        file.unlink()


OWN = ("mid-epoch, cached latents, flips", "ema, text encoder, dropout", "past the pivot")  # noise, text and tokens
ONE_OF = {  # no code of a family's own: a family for each, of either kind
    "mid-accumulation, augmentations": "sdxl",
    "prodigy": "sdxl",
    "8-bit": "flux",
    "schedule-free": "flux",
    "before the pivot": "sdxl",
    "at the pivot": "flux",
    "lokr, ema": "sdxl",
    "buckets, repeats": "flux",
}


PAIRS = [(f, case) for case in CASES for f in (sorted(FAMILIES) if case in OWN else [ONE_OF[case]])]


@pytest.mark.parametrize(("family", "case"), [pytest.param(FAMILIES[f], case, id=f"{f}-{case}") for f, case in PAIRS])
def test_resumed_run_equals_unbroken_run(family, pictures, tmp_path, case):
    flags = ("-d", pictures, *CASES[case], "--max_train_steps", 6, "--checkpointing_steps", 3)
    assert run_here(family, tmp_path / "whole" / "x", *flags) == 0
    broken = tmp_path / "broken" / "x"
    shutil.copytree(tmp_path / "whole" / "x", broken)
    shutil.rmtree(broken / "checkpoint-6")  # as if the run had died between steps 3 and 6
    forget_results(broken)
    assert run_here(family, broken, *flags, "--resume_from_checkpoint", "latest") == 0
    assert same_weights(tmp_path / "whole" / "x", broken)
    assert losses(broken) == losses(tmp_path / "whole" / "x")
    assert [row["step"] for row in metrics(broken)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.xdist_group("processes")
@pytest.mark.families("sdxl")
def test_killed_at_a_random_step(family, pictures, tmp_path):
    from ready_process import start

    flags = ("-d", pictures, "--max_train_steps", 24, "--checkpointing_steps", 4, "--rank", 8)
    assert run_here(family, tmp_path / "a" / "x", *flags) == 0
    output = tmp_path / "b" / "x"
    process = start(ROOT / family.script, quick_flags(family, output, *flags), {}, tmp_path / "log")
    wanted, limit = random.randrange(5, 14), time.monotonic() + 120
    while process.exitcode is None and time.monotonic() < limit:
        if (output / "metrics.jsonl").exists() and len((output / "metrics.jsonl").read_text().splitlines()) >= wanted:
            process.kill()
            break
        time.sleep(0.005)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (output / "pytorch_lora_weights.safetensors").exists()
    assert run_here(family, output, *flags, "--resume_from_checkpoint", "latest") == 0
    assert same_weights(tmp_path / "a" / "x", output)


@pytest.mark.parametrize(
    ("name", "number", "code"),
    [("sdxl", signal.SIGTERM, 143), ("flux", signal.SIGUSR1, 138), ("flux", signal.SIGINT, 130)],
)
def test_signal_saves_within_a_step(name, pictures, tmp_path, number, code):
    family, module = FAMILIES[name], load_script(FAMILIES[name].script)
    original = module.Meter.log

    def log_and_signal(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), number)
        return original(self, step, *rest)

    flags = ("-d", pictures, "--max_train_steps", 5)
    module.Meter.log = log_and_signal
    try:
        assert run_here(family, tmp_path / "b" / "x", *flags) == code
    finally:
        module.Meter.log = original
    assert (tmp_path / "b" / "x" / "checkpoint-2" / "manifest.json").exists()
    assert run_here(family, tmp_path / "a" / "x", *flags) == 0
    assert run_here(family, tmp_path / "b" / "x", *flags, "--resume_from_checkpoint", "latest") == 0
    assert same_weights(tmp_path / "a" / "x", tmp_path / "b" / "x")


@pytest.mark.families("sdxl")
def test_damaged_checkpoint_is_named_and_the_one_before_taken(family, pictures, tmp_path, capsys):
    flags = ("-d", pictures, "--max_train_steps", 4, "--checkpointing_steps", 1)
    assert run_here(family, tmp_path / "x", *flags) == 0
    forget_results(tmp_path / "x")
    state = tmp_path / "x" / "checkpoint-4" / "training_state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    (tmp_path / "x" / "checkpoint-3" / "manifest.json").unlink()
    capsys.readouterr()
    assert run_here(family, tmp_path / "x", *flags, "--resume_from_checkpoint", "latest") == 0
    said = capsys.readouterr().out
    assert "checkpoint-4 is passed over: training_state.pt is damaged" in said
    assert "checkpoint-3 is passed over" in said
    assert "going on from checkpoint-2" in said


@pytest.mark.families("sdxl")
def test_all_damaged_is_an_error_and_none_a_start(family, pictures, tmp_path, capsys):
    flags = ("-d", pictures, "--max_train_steps", 1, "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert "starting from step 0" in capsys.readouterr().out
    forget_results(tmp_path / "x")
    (tmp_path / "x" / "checkpoint-1" / "training_state.pt").write_bytes(b"")
    assert run_here(family, tmp_path / "x", *flags) == 2
    assert "every checkpoint" in capsys.readouterr().err


@pytest.mark.families("sdxl")
def test_resume_with_another_rank_is_refused(family, pictures, tmp_path, capsys):
    flags = ("-d", pictures, "--max_train_steps", 1, "--checkpointing_steps", 1)
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert run_here(family, tmp_path / "x", *flags, "--rank", 8, "--resume_from_checkpoint", "checkpoint-1") == 2
    assert "rank 4, now 8" in capsys.readouterr().err


@pytest.mark.families("sdxl")
def test_only_the_latest_checkpoints_stay_and_the_seed_is_kept(family, pictures, tmp_path):
    flags = ["-d", pictures, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert sorted(p.name for p in (tmp_path / "x").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert json.loads((tmp_path / "x" / "checkpoint-3" / "manifest.json").read_text())["seed"] == 3
