"""What only a GPU can show: half precision, compilation, quantised bases. Skipped without one."""

import pytest
import torch
from conftest import SAMPLE, losses, run_here, weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize(
    "flags",
    [
        ("--mixed_precision", "bf16", "--compile", "--cache_latents"),
        ("--mixed_precision", "fp16", "--gradient_checkpointing"),
        ("--mixed_precision", "bf16", "--quantize_base", "nf4", "--optimizer", "adamw8bit", "--offload"),
        ("--mixed_precision", "bf16", "--quantize_base", "fp8"),
    ],
)
def test_precisions_train_to_finite_weights(family, tmp_path, flags):
    pictures = ("--num_validation_images", 1, "--validation_inference_steps", 2)
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, *pictures, *flags, "--max_train_steps", 6) == 0
    assert len(losses(tmp_path / "x")) == 6
    assert all(w.isfinite().all() for w in weights(tmp_path / "x").values())
