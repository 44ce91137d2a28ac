"""The files of config/: presets and recipes of settings do what they say."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, SAMPLE, SDXL, losses, run_here

from lora_training.base_model.components import Components
from lora_training.data.buckets import bucket_sizes, nearest_bucket, share_cropped
from lora_training.launch.decision import decide

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


def parse_recipe(family, *flags):
    """The settings of a family's recipe file with these flags on top."""
    file = ROOT / "config" / f"recipe_{family.name}.yaml"
    return recipe_of(family).parse_args(["--config", str(file), "-m", "BASE", *map(str, flags)])


def test_recipes_are_for_ones_own_pictures(family):
    """They asked for W&B, for 200 to 500 epochs, and for pictures of a published example's size."""
    args = parse_recipe(family, "-d", SAMPLE)
    assert args.resolution == [512 if family.name == "sd15" else 1024]
    assert (args.aspect_ratio_buckets, args.max_train_steps) == ("auto", "auto")
    assert (args.rank, args.learning_rate, args.optimizer) == (16, 1e-4, "adamw8bit")
    assert (args.mixed_precision, args.report_to) == ("auto", "tensorboard")
    assert args.cache_latents and args.gradient_checkpointing
    assert args.resume_from_checkpoint == "latest" and 0 < args.checkpoints_total_limit <= 10
    assert parse_recipe(family, "-d", SAMPLE, "--optimizer", "prodigy").optimizer == "prodigy"


def test_a_recipe_asks_the_hub_for_no_second_vae(family):
    """SDXL's asked for one on a CPU, in float32 and with a toy; its own VAE works in float32 in any case."""
    args = parse_recipe(family, "-d", SAMPLE)
    assert args.pretrained_vae_model_name_or_path is None
    components = Components(Path(family.base), args, torch.float16, torch.device("cpu"))
    assert components.vae().dtype == (torch.float32 if family.name == "sdxl" else torch.float16)


def test_a_portrait_keeps_nearly_all_of_itself(family):
    """58% of a 3:4 portrait was cropped away in the command that the README has."""
    for size in ((3024, 4032), (4032, 3024), (1080, 1920), (800, 800)):
        sizes = bucket_sizes(parse_recipe(family, "-d", SAMPLE))
        assert share_cropped(size, sizes[nearest_bucket(size, sizes)]) < 0.05
    assert max(map(max, sizes)) > 1.2 * min(map(min, sizes))


def test_the_published_sdxl_settings_are_an_example():
    file = ROOT / "config" / "examples" / "sdxl_1280x720.yaml"
    args = recipe_of(SDXL).parse_args(["--config", str(file), "-m", "BASE", "-d", str(SAMPLE)])
    assert (args.resolution, args.num_train_epochs, args.learning_rate) == ([1280, 720], 500, 5e-5)
    assert (args.train_batch_size, args.rank, args.optimizer) == (4, 32, "adamw8bit")
    assert args.pretrained_vae_model_name_or_path == "madebyollin/sdxl-vae-fp16-fix"
    assert (args.mixed_precision, args.report_to) == ("fp16", "wandb")
    commands = [line[4:] for line in file.read_text().splitlines() if line.startswith("#   ")]
    joined = " ".join(commands).replace("\\", "")
    assert joined.count(f"--config {file.relative_to(ROOT)}") == 2
    argv = shlex.split(joined.split("run_lora_train.sh ")[1].split("accelerate launch")[0])
    start = decide(argv, {})
    assert start.family == "sdxl" and "config/examples/sdxl_1280x720.yaml" in start.argv
