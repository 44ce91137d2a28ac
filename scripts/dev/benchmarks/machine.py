"""The machine on which is measured: its name, its speed, whether it still answers."""

from __future__ import annotations

import sys
import time
from importlib.metadata import version

import torch

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")


def describe_machine() -> dict:
    """The GPU's name, what it reaches in a large product of bf16 matrices, and the libraries' versions."""
    versions = {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES}
    if not torch.cuda.is_available():
        return {"name": "CPU"} | versions
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(2):  # the second time counts
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            matrix @ matrix
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    total = torch.cuda.get_device_properties(0).total_memory
    return {
        "name": torch.cuda.get_device_name(),
        "GiB": round(total / 2**30, 1),
        "matmul_TFLOPs": round(20 * 2 * 8192**3 / seconds / 1e12),
    } | versions


def gpu_answers() -> bool:
    """Whether the GPU can still be used: after some errors a process can't use it any more."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return True
    except RuntimeError:
        return False
