"""Blocks whose weights lie in the CPU's memory until they work."""

from __future__ import annotations

import functools

import torch

from lora_training.errors import UserError
from lora_training.memory.checkpointing import repeated_blocks
from lora_training.memory.frozen_linear import FrozenLinear
from lora_training.tensors import pin_memory


class BlockSwap:
    """Blocks whose weights lie in the CPU's memory and come to the device when they are asked for.

    There are two slots on the device: while the block in the active one works, the next block is copied into
    the other, on a stream of its own. Nothing is copied back. A layer that asks for its weights gets its
    block in any order: forwards, backwards, recomputed, or drawing.
    """

    def __init__(self, blocks: list[list], device) -> None:
        """blocks: the FrozenLinears of each."""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copies: list[
            list
        ] = []  # of each block: (weights on the CPU, in the first slot, in the second) by layer
        self.slot_blocks: list[int | None] = [None, None]  # the number of the block in each slot
        self.active_slot = 0
        sizes = [[aligned_size(layer.stored) for layer in block] for block in blocks]
        slots = [torch.empty(max(map(sum, sizes)), dtype=torch.uint8, device=device) for _ in range(2)]
        cpu_memory = torch.empty(0, dtype=torch.uint8)
        for number, block in enumerate(blocks):
            free, copies = slots, []
            for layer, size in zip(block, sizes[number], strict=True):
                if (
                    len(cpu_memory) < size
                ):  # many layers to an allocation: pinned memory comes in powers of two
                    cpu_memory = pin_memory(torch.empty(max(size, 2**29), dtype=torch.uint8))
                views = [view_as(memory, layer.stored) for memory in (cpu_memory, *free)]
                views[0].copy_(layer.stored)
                layer.fetch = functools.partial(self.fetch, number, views[1:])
                layer.stored = layer.stored.new_empty(0)
                copies.append(views)
                cpu_memory, *free = (memory[size:] for memory in (cpu_memory, *free))
            self.copies.append(copies)

    def fetch(self, number: int, slot_views: list):
        """A layer's weights in the active slot; the first layer of block `number` has the block after it
        copied.
        """
        previous = self.slot_blocks[self.active_slot]
        if previous != number:
            self.active_slot = 1 - self.active_slot
            if self.slot_blocks[self.active_slot] != number:
                self.copy(number, self.active_slot)
            if self.stream:
                torch.cuda.current_stream().wait_stream(self.stream)
            backwards = previous is not None and number < previous
            following = number - 1 if backwards else number + 1
            if 0 <= following < len(self.copies):  # else the way back begins, with the block before
                self.copy(following, 1 - self.active_slot)
        return slot_views[self.active_slot]

    def copy(self, number: int, slot: int) -> None:
        """Copies a block into a slot, once the work with what is in it is done."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for cpu_copy, *slot_views in self.copies[number]:
                slot_views[slot].copy_(cpu_copy, non_blocking=True)
        self.slot_blocks[slot] = number


def aligned_size(tensor) -> int:
    """A tensor's size in bytes, rounded up to a multiple of 256."""
    return -(-tensor.nbytes // 256) * 256


def view_as(memory, tensor):
    """The beginning of flat bytes, seen as a tensor of another's type and shape."""
    return memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)


def swap_blocks(module, number: int | None, device) -> None:
    """Moves a module to the device, but for the linear weights of `number` of its blocks (None: all).

    These blocks are spread evenly among the others. Autograd would keep a plain layer's weights on the
    device; a FrozenLinear asks for them again. Errors: UserError for more blocks than there are.
    """
    blocks = repeated_blocks(module)
    number = number or len(blocks)
    if number > len(blocks):
        raise UserError(f"--blocks_to_swap {number}: the model has {len(blocks)} blocks")
    swapped = [blocks[k * len(blocks) // number] for k in range(number)]
    for block in swapped:
        for name, layer in list(block.named_modules()):
            if type(layer) is torch.nn.Linear:
                weight = layer.weight.data
                block.set_submodule(name, FrozenLinear(weight, layer.bias, None, weight.dtype))
    layers = [[part for part in block.modules() if isinstance(part, FrozenLinear)] for block in swapped]
    BlockSwap(layers, device)
    module.to(device)
