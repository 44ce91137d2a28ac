"""Small operations on tensors: devices, types, files."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from pathlib import Path


def torch_dtype(precision: str | None):
    """fp16 and bf16 as torch's types; anything else is float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def move_to_device(batch: dict, device) -> dict:
    """Moves the tensors of a batch."""
    is_async = device.type == "cuda"  # elsewhere a copy that isn't waited for may be read before it is there
    return {
        name: value.to(device, non_blocking=is_async) if torch.is_tensor(value) else value
        for name, value in batch.items()
    }


def pin_memory(tensor):
    """The tensor in pinned memory, from which the GPU copies by itself; unchanged where there is none."""
    try:
        return tensor.pin_memory() if torch.cuda.is_available() else tensor
    except RuntimeError:
        return tensor


def read_safetensors(file: Path) -> tuple[dict, dict]:
    """Tensors and metadata of a file."""
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def hash_tensors(tensors: dict, key: tuple) -> str:
    """SHA-256 of tensors, their names, types and shapes, and of the key that they are stored under."""
    digest = hashlib.sha256("|".join(map(str, key)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"|{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
