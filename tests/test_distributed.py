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

# with a frozen base that is split over the processes (FSDP2), pictures drawn by both together
CASES |= {
    "sharded base": (
        *("--gradient_checkpointing", "--num_validation_images", 1, "--validation_inference_steps", 2),
        *("--validation_split", 0.2),
    )
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(family, pictures, tmp_path, case):
    flags = ("-d", pictures, "--max_train_steps", 5, "--checkpointing_steps", 5, "--learning_rate", 1e-3, *CASES[case])
    port = f"--master-port={29500 + os.getpid() % 2000}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", port, str(ROOT / family.script)]
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if case == "sharded base" else {}
    flags_two = quick_flags(family, tmp_path / "two" / "x", *flags, "--train_batch_size", 1)
    result = subprocess.run(
        [*command, *flags_two],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"} | sharded,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "x 2 processes" in result.stdout and ("FSDP2: the" in result.stdout) == bool(sharded)
    assert run_here(family, tmp_path / "one" / "x", *flags, "--train_batch_size", 2) == 0
    assert losses(tmp_path / "two" / "x") == pytest.approx(losses(tmp_path / "one" / "x"), abs=1e-5)
    one, two = weights(tmp_path / "one" / "x"), weights(tmp_path / "two" / "x")
    apart = (
        sum((one[k] - two[k]).square().sum() for k in one).sqrt() / sum(w.square().sum() for w in one.values()).sqrt()
    )
    assert apart < 1e-3  # Adam turns the rounding of a gradient near zero into a step of either sign
