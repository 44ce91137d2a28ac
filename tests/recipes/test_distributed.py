"""Two gloo processes with batch 1 do what one process with batch 2 does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import FAMILIES, ROOT, SAMPLE, SD15, losses, quick_flags, run_here, same_weights, weights
from PIL import Image

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

PRIOR = "prior preservation, text encoder"
SHARDED, SHARDED_DRAWING = "sharded base", "sharded base, pictures"
DEEPSPEED = "DeepSpeed's launcher"
CASES = {
    "odd number of images": (),
    PRIOR: (
        *("--with_prior_preservation", "--class_prompt", "a circle", "--num_class_images", 3),
        *("--train_text_encoder", "--validation_inference_steps", 1),
    ),
    "buckets, accumulation, cached": (
        *("--aspect_ratio_buckets", "auto", "--gradient_accumulation_steps", 2, "--cache_latents"),
    ),
    SHARDED: ("--gradient_checkpointing",),
    SHARDED_DRAWING: (
        *("--gradient_checkpointing", "--num_validation_images", 1, "--validation_inference_steps", 1),
        *("--validation_split", 0.2),
    ),
    DEEPSPEED: (
        *("--train_text_encoder_ti", "--token_abstraction", "circle", "--use_ema", "--ema_decay", 0.5),
    ),
}
# what the launcher's configuration sets: a frozen base split over the processes (FSDP2), pictures drawn by
# both together; DeepSpeed, whose launcher alone is used
ENVIRONMENTS = {
    SHARDED: {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    SHARDED_DRAWING: {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    DEEPSPEED: {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
# what a UNet and a transformer do differently, and text encoders, in both; each family once
FAMILIES_OF = {
    "odd number of images": ("flux",),
    PRIOR: ("sd3", "sdxl"),
    "buckets, accumulation, cached": ("sdxl",),
    SHARDED: ("sdxl",),
    SHARDED_DRAWING: ("flux",),
    DEEPSPEED: ("sd15",),
}
PAIRS = [
    pytest.param(FAMILIES[name], case, id=f"{name}-{case}") for case in CASES for name in FAMILIES_OF[case]
]


def two_processes(family, output, environment, *flags) -> str:
    """Runs a training with two gloo processes; returns what it prints."""
    from ready_process import launch

    argv = quick_flags(family, output, *flags)
    return launch(ROOT / family.script, argv, environment, output.parent / "logs")


def same_class_pictures(one: Path, two: Path) -> bool:
    """Whether the folders hold the same pictures.

    float32's rounding may make a channel in a hundred one level brighter.
    """
    files = sorted(file.name for file in one.iterdir())
    assert files and files == sorted(file.name for file in two.iterdir())
    pixels = [[np.asarray(Image.open(folder / f)).astype(int) for f in files] for folder in (one, two)]
    differences = [np.abs(a - b) for a, b in zip(*pixels, strict=True)]
    return all(d.max() <= 1 and (d > 0).mean() < 0.01 for d in differences)


def relative_distance(one: dict, two: dict) -> float:
    """The distance of two states of weights, as a share of the first one's size."""
    distance = sum((one[key] - two[key]).square().sum() for key in one).sqrt()
    return (distance / sum(value.square().sum() for value in one.values()).sqrt()).item()


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_two_processes_equal_one(family, pictures, tmp_path, case):
    """Losses agree but for float32's rounding, which depends on a batch's size and the processor.

    It is 5e-7 of a loss with AVX-512, AVX2 or SSE (1e-15 in float64), and the bound ten times that. Class
    pictures are rounded to 256 levels, so that a few channels can differ, worth 2e-5 of a loss: they are
    compared by themselves, and both runs train on the same.
    """
    one, two = tmp_path / "one" / "x", tmp_path / "two" / "x"
    flags = ("-d", SAMPLE if case == DEEPSPEED else pictures, *CASES[case])
    flags += ("--max_train_steps", 5, "--learning_rate", 1e-3)
    printed = two_processes(family, two, ENVIRONMENTS.get(case, {}), *flags, "--train_batch_size", 1)
    assert "x 2 processes" in printed and ("FSDP2: the" in printed) == (SHARDED in case)
    assert ("state (" in printed and "isn't split" in printed) == (case == DEEPSPEED)
    if case == PRIOR:
        drawing, class_images = tmp_path / "drawing" / "x", two / "class_images"
        assert run_here(family, drawing, *flags, "--max_train_steps", 1) == 0
        assert same_class_pictures(drawing / "class_images", class_images)
        flags += ("--class_data_dir", class_images)
    assert run_here(family, one, *flags, "--train_batch_size", 2) == 0
    assert losses(two) == pytest.approx(losses(one), rel=5e-6)
    # Adam turns the rounding of a gradient near zero into a step of either sign
    assert relative_distance(weights(one), weights(two)) < 1e-3


def test_a_run_of_two_processes_is_resumed_by_two_and_by_one(tmp_path):
    """Before and past the pivot: by two bit for bit; by one, whose batch is as large, to the same losses."""
    whole = tmp_path / "a" / "x"
    flags = ("-d", SAMPLE, *CASES[DEEPSPEED], "--max_train_steps", 6, "--checkpointing_steps", 2)
    two_processes(SD15, whole, {}, *flags)
    for step in (2, 4):
        output = tmp_path / f"from {step}" / "x"
        shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
        two_processes(SD15, output, {}, *flags, "--resume_from_checkpoint", "latest")
        assert same_weights(whole, output)
    output = tmp_path / "from 2" / "x"
    flags += ("--train_batch_size", 2, "--resume_from_checkpoint", "checkpoint-2", "--overwrite")
    assert run_here(SD15, output, *flags) == 0
    assert losses(output)[-4:] == pytest.approx(losses(whole)[-4:], rel=1e-4)
