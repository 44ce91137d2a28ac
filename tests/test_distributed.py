"""Two gloo processes with batch 1 do what one process with batch 2 does."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, losses, quick_flags, run_here, weights

pytestmark = pytest.mark.distributed

CASES = {
    "odd number of images": (),
    "prior preservation, text encoder": (
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


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(family, pictures, tmp_path, case):
    flags = ("-d", pictures, "--max_train_steps", 5, "--checkpointing_steps", 5, "--learning_rate", 1e-3, *CASES[case])
    port = f"--master-port={29500 + os.getpid() % 2000}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", port, str(ROOT / family.script)]
    flags_two = quick_flags(family, tmp_path / "two" / "x", *flags, "--train_batch_size", 1)
    result = subprocess.run(
        [*command, *flags_two],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "x 2 processes" in result.stdout
    assert run_here(family, tmp_path / "one" / "x", *flags, "--train_batch_size", 2) == 0
    assert losses(tmp_path / "two" / "x") == pytest.approx(losses(tmp_path / "one" / "x"), abs=1e-5)
    one, two = weights(tmp_path / "one" / "x"), weights(tmp_path / "two" / "x")
    apart = (
        sum((one[k] - two[k]).square().sum() for k in one).sqrt() / sum(w.square().sum() for w in one.values()).sqrt()
    )
    assert apart < 1e-3  # Adam turns the rounding of a gradient near zero into a step of either sign
