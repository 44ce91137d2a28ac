"""Two gloo processes with batch 1 do what one process with batch 2 does."""

from pathlib import Path

import numpy as np
import pytest
from conftest import FAMILIES, ROOT, SAMPLE, losses, quick_flags, run_here, same_weights, weights
from PIL import Image

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

PRIOR = "prior preservation, text encoder"

CASES = {
    "odd number of images": (),
    PRIOR: (
        "--with_prior_preservation",
        "--class_prompt",
        "a circle",
        "--num_class_images",
        3,
        "--train_text_encoder",
        "--validation_inference_steps",
        2,
    ),
    "buckets, accumulation, cached": (
        "--aspect_ratio_buckets",
        "auto",
        "--gradient_accumulation_steps",
        2,
        "--cache_latents",
    ),
}

# what the launcher's configuration sets: a frozen base split over the processes (FSDP2), pictures drawn by both together;
# DeepSpeed, whose launcher alone is used
SPLIT = {
    "sharded base": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "DeepSpeed's launcher": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
}
CASES |= {
    "sharded base": (
        *("--gradient_checkpointing", "--num_validation_images", 1, "--validation_inference_steps", 2),
        *("--validation_split", 0.2),
    ),
    "DeepSpeed's launcher": (
        "--train_text_encoder_ti",
        "--token_abstraction",
        "circle",
        "--use_ema",
        "--ema_decay",
        0.5,
    ),
}


def two_processes(family, output, environment, *flags):
    """Runs a training with two gloo processes; returns what it has said."""
    from ready_process import launch

    return launch(ROOT / family.script, quick_flags(family, output, *flags), environment, output.parent / "logs")


def same_class_pictures(one: Path, two: Path) -> bool:
    """Whether the folders hold the same pictures: float32's rounding may make a channel in a hundred one level brighter."""
    files = sorted(file.name for file in one.iterdir())
    assert files and files == sorted(file.name for file in two.iterdir())
    apart = [
        np.abs(np.asarray(Image.open(one / f)).astype(int) - np.asarray(Image.open(two / f)).astype(int)) for f in files
    ]
    return all(a.max() <= 1 and (a > 0).mean() < 0.01 for a in apart)


FAMILIES_OF = {  # what a UNet and a transformer do differently, and pictures and text encoders, in both; each family once
    "odd number of images": ("flux",),
    PRIOR: ("sd3", "sdxl"),
    "buckets, accumulation, cached": ("sdxl",),
    "sharded base": ("flux", "sdxl"),
    "DeepSpeed's launcher": ("sd15",),
}
PAIRS = [pytest.param(FAMILIES[f], case, id=f"{f}-{case}") for case in CASES for f in FAMILIES_OF[case]]


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_two_processes_equal_one(family, pictures, tmp_path, case):
    """Losses agree but for float32's rounding, which depends on a batch's size and the processor: to 5e-7 of a loss with
    AVX-512, AVX2 or SSE (to 1e-15 in float64), of which the bound is ten times. Class pictures are rounded to 256 levels, so
    that a few channels can differ, worth 2e-5 of a loss: they are compared by themselves, and both runs train on the same.
    """
    data = SAMPLE if case == "DeepSpeed's launcher" else pictures
    flags = ("-d", data, "--max_train_steps", 5, "--checkpointing_steps", 5, "--learning_rate", 1e-3, *CASES[case])
    said = two_processes(family, tmp_path / "two" / "x", SPLIT.get(case, {}), *flags, "--train_batch_size", 1)
    assert "x 2 processes" in said and ("FSDP2: the" in said) == (case == "sharded base")
    assert ("state (" in said and "isn't split" in said) == (case == "DeepSpeed's launcher")
    if case == PRIOR:
        drawn = tmp_path / "two" / "x" / "class_images"
        assert run_here(family, tmp_path / "drawing" / "x", *flags, "--max_train_steps", 1) == 0
        assert same_class_pictures(tmp_path / "drawing" / "x" / "class_images", drawn)
        flags += ("--class_data_dir", drawn)
    assert run_here(family, tmp_path / "one" / "x", *flags, "--train_batch_size", 2) == 0
    assert losses(tmp_path / "two" / "x") == pytest.approx(losses(tmp_path / "one" / "x"), rel=5e-6)
    one, two = weights(tmp_path / "one" / "x"), weights(tmp_path / "two" / "x")
    apart = (
        sum((one[k] - two[k]).square().sum() for k in one).sqrt() / sum(w.square().sum() for w in one.values()).sqrt()
    )
    assert apart < 1e-3  # Adam turns the rounding of a gradient near zero into a step of either sign


def test_a_run_of_two_processes_is_resumed_by_two_and_by_one(tmp_path):
    """Before and past the pivot: by two bit for bit; by one, whose batch is as large, with the same losses."""
    import shutil

    family = FAMILIES["sd15"]
    flags = ("-d", SAMPLE, *CASES["DeepSpeed's launcher"], "--max_train_steps", 6, "--checkpointing_steps", 2)
    two_processes(family, tmp_path / "a" / "x", {}, *flags)
    for step in (2, 4):
        output = tmp_path / f"from {step}" / "x"
        shutil.copytree(tmp_path / "a" / "x" / f"checkpoint-{step}", output / f"checkpoint-{step}")
        two_processes(family, output, {}, *flags, "--resume_from_checkpoint", "latest")
        assert same_weights(tmp_path / "a" / "x", output)
    flags += ("--train_batch_size", 2, "--resume_from_checkpoint", "checkpoint-2", "--overwrite")
    assert run_here(family, tmp_path / "from 2" / "x", *flags) == 0
    assert losses(tmp_path / "from 2" / "x")[-4:] == pytest.approx(losses(tmp_path / "a" / "x")[-4:], rel=1e-4)
