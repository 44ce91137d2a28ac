"""The environment variables of a training: logging to Weights & Biases, and the precision of the GPU."""

from __future__ import annotations

import shutil
import subprocess

from lora_training.cli.trackers import has_login


def training_environment(settings: dict, launch_config: str | None) -> dict[str, str]:
    """Variables for the training of a real base, where the settings don't have them: no question for a login,
    and the precision of this GPU by default.

    launch_config: a configuration of accelerate, which then decides the precision.
    """
    variables = {}
    if not settings.get("WANDB_API_KEY") and not settings.get("WANDB_MODE") and not has_login("wandb"):
        variables["WANDB_MODE"] = "offline"  # the files stay here, for `wandb sync`
    if not launch_config and "ACCELERATE_MIXED_PRECISION" not in settings:
        precision = gpu_precision()
        if precision:
            variables["ACCELERATE_MIXED_PRECISION"] = precision
    return variables


def gpu_precision() -> str | None:
    """The half precision of the first NVIDIA GPU, bf16 from Ampere on; None without one.

    A default: --mixed_precision and a recipe's setting win over it.
    """
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    capabilities = answer.stdout.split()
    if answer.returncode or not capabilities:
        return None
    return "bf16" if float(capabilities[0]) >= 8 else "fp16"
