"""Loading a denoiser with its linear layers in nf4, int8 or fp8, a tensor at a time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from lora_training.base_model.reading import read_json, reading_base
from lora_training.console import progress
from lora_training.errors import UserError
from lora_training.memory.frozen_linear import FrozenLinear

if TYPE_CHECKING:
    from pathlib import Path


def load_quantized(
    model_class, folder: Path, quantize: str, dtype, device, variant: str | None = None, target_device=None
):
    """A denoiser of a diffusers class with the linear layers of its blocks in nf4, int8 or fp8, on
    `target_device`.

    Each tensor is read, cast or quantised on `device`, and dropped; those of the blocks first, the largest of
    them first, so that the CPU holds no more than one file, the device never more than the result. Layers
    outside of the blocks (embeddings, the last layer) are few and sensitive, and stay in `dtype`. Errors:
    UserError if weights are missing.
    """
    from accelerate import init_empty_weights

    target_device = target_device or device
    with init_empty_weights():
        model = model_class.from_config(model_class.load_config(folder)).requires_grad_(False).eval()
    files = weight_files(folder, variant)
    total = sum((folder / file).stat().st_size for file in files if (folder / file).is_file())
    with progress(f"loading in {quantize}", total, unit="B", unit_scale=True) as bar:
        for file in files:
            with reading_base(file):
                opened = safe_open(folder / file, framework="pt")
            with opened as shard:
                names = shard.keys()
                sizes = {name: math.prod(shard.get_slice(name).get_shape()) for name in names}
                for name in sorted(sizes, key=lambda name: ("block" in name, sizes[name]), reverse=True):
                    tensor = shard.get_tensor(name)
                    load_tensor(model, name, tensor, quantize, dtype, device, target_device)
                    bar.update(tensor.nbytes)
    if missing := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise UserError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}")
    return model.to(target_device)


def weight_files(folder: Path, variant: str | None) -> list[str]:
    """Names of the files that hold a diffusers model's weights."""
    infix, stem = f".{variant}" if variant else "", "diffusion_pytorch_model"
    index = folder / f"{stem}.safetensors.index{infix}.json"
    if not index.is_file():
        return [f"{stem}{infix}.safetensors"]
    with reading_base(index.name):
        return sorted(set(read_json(index)["weight_map"].values()))


def load_tensor(model, name: str, tensor, quantize: str, dtype, device, target_device) -> None:
    """Puts one tensor of a file into the model; a linear layer inside a block becomes a FrozenLinear."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if leaf == "weight" and type(layer) is torch.nn.Linear and "block" in path:
        frozen = FrozenLinear(tensor.to(device), None, quantize, dtype).to(target_device)
        frozen.bias = layer.bias  # it comes later
        model.set_submodule(path, frozen)
    elif leaf in layer._parameters:
        layer._parameters[leaf] = torch.nn.Parameter(
            tensor.to(target_device, dtype, copy=True), requires_grad=False
        )
    elif leaf in layer._buffers:
        layer._buffers[leaf] = tensor.to(
            target_device, dtype if tensor.is_floating_point() else None, copy=True
        )
