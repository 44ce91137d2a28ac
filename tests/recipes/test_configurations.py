"""The files of config/: presets and recipes of settings do what they say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, SAMPLE, losses, run_here

pytestmark = pytest.mark.run


def recipe_of(family):
    """The family's training script as a module."""
    return importlib.import_module(Path(family.script).stem)


CARDS = (8, 12, 16, 24, 80)


@pytest.mark.parametrize("card", CARDS)
def test_presets_train(family, card, tmp_path):
    """Each preset as it stands, but for the size and the time that compiling takes."""
    file = ROOT / "config" / "presets" / f"{family.name}_{card}gb.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    assert all("  # " in f" {line.replace(' # ', '  # ')}" for line in lines), (
        "each value has its effect beside it"
    )
    values = yaml.safe_load(file.read_text())
    args = recipe_of(family).parse_args(["--config", str(file), "-m", family.base, "-d", str(SAMPLE)])
    for name in values.keys() - {"lora_layers", "learning_rate"}:
        assert getattr(args, name) in (values[name], [values[name]])
    if card in (12, 16):  # their neighbours have the same flags with other numbers
        return
    quick = tmp_path / "preset.yaml"
    quick.write_text(yaml.safe_dump(values | {"compile": False, "mixed_precision": "bf16"}))
    small = ("--resolution", 64, "--max_train_steps", 2, "--train_batch_size", 2)
    assert run_here(family, tmp_path / "x", "--config", quick, "-d", SAMPLE, *small) == 0
    assert len(losses(tmp_path / "x")) == 2


def test_recipes_are_complete(family):
    file = ROOT / "config" / f"recipe_{family.name}.yaml"
    args = recipe_of(family).parse_args(["--config", str(file), "-m", "BASE", "-d", str(SAMPLE)])
    assert args.resume_from_checkpoint == "latest" and args.report_to == "wandb"
    assert args.gradient_checkpointing
    assert args.mixed_precision == ("fp16" if family.name in ("sd15", "sdxl") else "bf16")
    if family.name == "sdxl":
        assert (args.resolution, args.num_train_epochs, args.learning_rate) == ([1280, 720], 500, 5e-5)
        assert (args.train_batch_size, args.rank, args.optimizer) == (4, 32, "adamw8bit")
        assert args.pretrained_vae_model_name_or_path == "madebyollin/sdxl-vae-fp16-fix"
