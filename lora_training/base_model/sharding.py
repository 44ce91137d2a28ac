"""Splitting the frozen base over several GPUs."""

from __future__ import annotations

import warnings

import torch


def shard_base(denoiser, block_lists: tuple[str, ...], device) -> None:
    """Splits the frozen weights over all processes, block by block; the LoRA's stay whole on each.

    A block's weights are gathered when it works and dropped after, forwards and backwards: FSDP2 of
    https://arxiv.org/abs/2304.11277 without its gradients, because nothing that is sharded is trained.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # of in-place changes; the models make none
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trained = {p for p in denoiser.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    for name in block_prefixes(denoiser, block_lists):
        fully_shard(denoiser.get_submodule(name), mesh=mesh, ignored_params=trained)
    fully_shard(denoiser, mesh=mesh, ignored_params=trained)


def block_prefixes(denoiser, block_lists: tuple[str, ...]) -> list[str]:
    """Full names of the denoiser's blocks in order. block_lists: the names of its lists of blocks."""
    prefixes = []
    for name in block_lists:
        blocks = getattr(denoiser, name)
        if isinstance(blocks, torch.nn.ModuleList):
            prefixes += [f"{name}.{number}" for number in range(len(blocks))]
        elif blocks is not None:
            prefixes.append(name)
    return prefixes
