"""Blocks whose weights lie in the CPU's memory until they work."""

from __future__ import annotations

import functools

import torch

from lora_training.errors import UserError
from lora_training.memory.checkpointing import repeated_blocks
from lora_training.memory.frozen_linear import FrozenLinear
from lora_training.tensors import pin_memory


class BlockSwap:
    """Blocks whose weights lie in the CPU's memory. Two places on the device take turns: while the block in one works, the
    next is copied into the other, on a stream of its own. Nothing is copied back.

    A layer that asks for its weights gets its block, in whatever order: forwards, backwards, recomputed, or drawing.
    """

    def __init__(self, blocks: list[list], device) -> None:
        """blocks: the FrozenLinears of each."""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copies: list[
            list
        ] = []  # of each block: its layers' weights at home, in the first place, in the second
        self.inside, self.turn = (
            [None, None],
            0,
        )  # the number of the block in each place; the place that works
        rooms = [[-(-layer.stored.nbytes // 256) * 256 for layer in block] for block in blocks]
        places = [torch.empty(max(map(sum, rooms)), dtype=torch.uint8, device=device) for _ in range(2)]
        home = torch.empty(0, dtype=torch.uint8)
        for number, block in enumerate(blocks):
            free, copies = places, []
            for layer, room in zip(block, rooms[number], strict=True):
                if len(home) < room:  # many layers to a piece: pinned memory comes in powers of two
                    home = pin_memory(torch.empty(max(room, 2**29), dtype=torch.uint8))
                kept = layer.stored
                views = [flat[: kept.nbytes].view(kept.dtype).view(kept.shape) for flat in (home, *free)]
                views[0].copy_(kept)
                layer.stored, layer.swapped_in = (
                    kept.new_empty(0),
                    functools.partial(self.fetch, number, views[1:]),
                )
                copies.append(views)
                home, *free = (flat[room:] for flat in (home, *free))
            self.copies.append(copies)

    def fetch(self, number: int, views: list):
        """A layer's weights, of its views in the two places; the first layer of a block sends for the block after it."""
        before = self.inside[self.turn]
        if before != number:
            self.turn = 1 - self.turn
            if self.inside[self.turn] != number:
                self.copy(number, self.turn)
            if self.stream:
                torch.cuda.current_stream().wait_stream(self.stream)
            ahead = number - 1 if before is not None and number < before else number + 1
            if 0 <= ahead < len(self.copies):  # else the way back begins, with the block before
                self.copy(ahead, 1 - self.turn)
        return views[self.turn]

    def copy(self, number: int, place: int) -> None:
        """Copies a block into a place, once the work with what is in it is done."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for home, *views in self.copies[number]:
                views[place].copy_(home, non_blocking=True)
        self.inside[place] = number


def swap_blocks(module, number: int | None, device) -> None:
    """Moves a module to the device, but for the linear weights of `number` of its blocks (None: all), evenly among the others.

    Autograd would keep a plain layer's weights on the device; a FrozenLinear asks for them again.
    """
    blocks = repeated_blocks(module)
    number = number or len(blocks)
    if number > len(blocks):
        raise UserError(f"--blocks_to_swap {number}: the model has {len(blocks)} blocks")
    chosen = [blocks[k * len(blocks) // number] for k in range(number)]
    for block in chosen:
        for name, layer in list(block.named_modules()):
            if type(layer) is torch.nn.Linear:
                block.set_submodule(
                    name, FrozenLinear(layer.weight.data, layer.bias, None, layer.weight.dtype)
                )
    BlockSwap(
        [[part for part in block.modules() if isinstance(part, FrozenLinear)] for block in chosen], device
    )
    module.to(device)
