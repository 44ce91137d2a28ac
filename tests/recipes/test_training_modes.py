"""A short run of each way to train: it moves weights, and its losses are numbers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import (
    FAMILIES,
    KINDS,
    QUICKEST,
    ROOT,
    SAMPLE,
    family_and,
    losses,
    metrics,
    quick_flags,
    run_argv_here,
    run_here,
    weights,
    without_flag,
)

from lora_training.base_model.components import Components

pytestmark = pytest.mark.run

INVERSION = ("--train_text_encoder_ti", "--token_abstraction", "circle", "--train_transformer_frac", 0)
AUGMENTED = ("--color_jitter", "--random_rotation", "--random_flip", "--caption_dropout", 0.5)
HELD_OUT = ("--validation_split", 0.1, "--validation_steps", 1, "--validation_inference_steps", 1)
MODES = {  # a text encoder alone, and tokens by prodigy: in test_known_faults.py
    "inversion": (*INVERSION, "--initializer_concept", "star"),
    "bf16, checkpointing, cached": (
        *("--mixed_precision", "bf16", "--gradient_checkpointing", "--train_text_encoder", "--cache_latents"),
        *("--train_batch_size", 2),
    ),
    "blocks": ("--lora_blocks", 1, "--center_crop"),
    "dora, rslora": ("--use_dora", "--use_rslora"),
    "huber, ema, offset": ("--loss_type", "huber", "--use_ema"),
    "adafactor": ("--optimizer", "adafactor", "--lr_scheduler", "cosine", "--lr_warmup_steps", 1),
    "workers, augmentations": ("--dataloader_num_workers", 2, *AUGMENTED),
    "tags, held out": ("--shuffle_tags", "--tag_separator", " ", *HELD_OUT),
    "epochs": ("--num_train_epochs", 1, "--train_batch_size", 5, "--scale_lr"),
}
EVERY_FAMILY = ("inversion", "bf16, checkpointing, cached")  # with code of a family's own
ONCE = ("huber, ema, offset", "adafactor", "workers, augmentations", "tags, held out", "epochs")


@family_and("mode", MODES, EVERY_FAMILY, ONCE)
def test_mode_runs_and_moves_weights(family, tmp_path, mode):
    argv = quick_flags(family, tmp_path / "x", "-d", SAMPLE, *MODES[mode])
    if mode == "epochs":
        argv = without_flag(argv, "--max_train_steps")  # which would win
    assert run_argv_here(family, argv) == 0
    assert weights(tmp_path / "x") and all(0 < loss < 100 for loss in losses(tmp_path / "x"))
    assert len(losses(tmp_path / "x")) == 3  # in an epoch 12 pictures in batches of 5, 5 and 2
    if mode == "tags, held out":
        held_out = [row["held_out_loss"] for row in metrics(tmp_path / "x") if "held_out_loss" in row]
        assert len(held_out) == 3 and all(loss > 0 for loss in held_out)


BITS = {  # each way to hold a base in few bits, and each family with one
    "sd15-nf4": ("--quantize_base", "nf4"),
    "sdxl-int8, 8-bit": ("--quantize_base", "int8", "--optimizer", "AdamW8bit"),
    "sd3-fp8, swapped": ("--quantize_base", "fp8", "--mixed_precision", "bf16", "--blocks_to_swap", 2),
    "flux-nf4, swapped": ("--quantize_base", "nf4", "--mixed_precision", "bf16", "--blocks_to_swap", 2),
}


@pytest.mark.parametrize("case", BITS)
def test_a_base_in_few_bits_is_trained_on(case, tmp_path):
    assert run_here(FAMILIES[case.split("-")[0]], tmp_path / "x", "-d", SAMPLE, *BITS[case]) == 0
    assert weights(tmp_path / "x") and all(0 < loss < 100 for loss in losses(tmp_path / "x"))


@pytest.mark.families(*KINDS)
def test_caches_change_nothing_and_a_second_run_loads_no_encoder(family, pictures, tmp_path, monkeypatch):
    flags = ("-d", pictures, "--center_crop", "--random_flip", "--train_batch_size", 2)
    cached = (*flags, "--cache_latents", "--cache_folder", tmp_path / "cache")
    assert run_here(family, tmp_path / "plain", *flags) == 0
    assert run_here(family, tmp_path / "x", *cached) == 0
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "x"), abs=1e-4)
    loaded = []
    original = Components.get

    def recorded(self, name, *rest, **options):
        loaded.append(name)
        return original(self, name, *rest, **options)

    monkeypatch.setattr(Components, "get", recorded)
    assert run_here(family, tmp_path / "y", *cached) == 0
    assert losses(tmp_path / "x") == losses(tmp_path / "y")
    assert "vae" not in loaded and not any(name.startswith("text_encoder") for name in loaded)


def test_dry_run_keeps_nothing(pictures, tmp_path, capsys):
    flags = ("-d", pictures, "--dry_run", "--max_train_steps", 100, "--aspect_ratio_buckets", "auto")
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 0
    printed = capsys.readouterr().out
    assert "100 steps would take about" in printed and "peak memory" in printed
    assert not (tmp_path / "x").exists()


def test_seed_is_drawn_and_said(tmp_path, capsys):
    argv = quick_flags(QUICKEST, tmp_path / "x", "-d", SAMPLE, "--checkpointing_steps", 3)
    assert run_argv_here(QUICKEST, without_flag(argv, "--seed")) == 0
    seed = int(capsys.readouterr().out.split("seed ")[1].split()[0])
    assert json.loads((tmp_path / "x" / "checkpoint-3" / "manifest.json").read_text())["seed"] == seed


@pytest.mark.xdist_group("processes")
def test_script_runs_alone_in_another_folder(family, pictures, tmp_path):
    """Copied anywhere, with the library beside it. One is started by accelerate with a configuration, as
    people do.
    """
    from ready_process import start

    folder = tmp_path / "alone"
    folder.mkdir()
    copy = folder / family.script
    copy.write_bytes((ROOT / family.script).read_bytes())
    shutil.copytree(ROOT / "lora_training", folder / "lora_training")
    flags = ["-m", family.base, "-d", str(pictures), "--resolution", "64", "--max_train_steps", "2"]
    flags += ["--report_to", "none", "--num_validation_images", "0"]
    if family.name == "sd15":
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        launcher += ["--config_file", ROOT / "config" / "accelerate_config_cpu.yaml"]
        environment = os.environ | {"PYTHONPATH": ""}
        options = {"cwd": folder, "capture_output": True, "text": True, "env": environment}
        result = subprocess.run([*launcher, copy, *flags], **options)
        assert result.returncode == 0, result.stderr
    else:
        process = start(copy, flags, {}, tmp_path / "log", folder=folder)
        process.join()
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert list((folder / "output").rglob("pytorch_lora_weights.safetensors"))
