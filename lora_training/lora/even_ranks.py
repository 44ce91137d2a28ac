"""LoRAs whose layers have several ranks or scales, made to have one of each, with every product as it was."""

from __future__ import annotations

import math
from collections import Counter

import torch

from lora_training.errors import UserError
from lora_training.lora.layer_tensors import metadata_alpha
from lora_training.seeds import stable_seed

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def equalize_ranks(start: dict[str, dict[str, torch.Tensor]], settings: dict) -> tuple[int, float, int]:
    """Gives every layer the highest rank, and the scale (alpha / rank) that most of them have.

    start: weights with peft's keys by part, which are changed. settings: peft's, of the file. New rows of A
    are drawn as peft begins with them, B's columns for them are 0, and B takes up what differs in scale, so
    that B A * alpha / rank stays what it was. Returns (rank, scale, number of layers that were changed).
    Errors: UserError for an A and a B of different ranks.
    """
    layers = [
        (state, part, key.removesuffix(DOWN))
        for part, state in start.items()
        for key in state
        if key.endswith(DOWN)
    ]
    for state, part, name in layers:
        down, up = state[name + DOWN], state.get(name + UP)
        if up is None or up.shape[1] != down.shape[0]:
            raise UserError(f"{part}.{name}: its two matrices don't belong together")
    ranks = [len(state[name + DOWN]) for state, _, name in layers]
    scales = [
        metadata_alpha(settings, part, name, rank) / rank
        for (_, part, name), rank in zip(layers, ranks, strict=True)
    ]
    rank, scale = max(ranks), Counter(scales).most_common(1)[0][0]
    changed = sum(pair != (rank, scale) for pair in zip(ranks, scales, strict=True))
    for (state, _, name), own_rank, own_scale in zip(layers, ranks, scales, strict=True):
        state[name + UP] = pad_up(state[name + UP] * (own_scale / scale), rank - own_rank)
        state[name + DOWN] = pad_down(state[name + DOWN], rank - own_rank, name)
    return rank, scale, changed


def pad_up(up: torch.Tensor, count: int) -> torch.Tensor:
    """B, (N, r) or (N, r, 1, 1), with `count` more columns of zeros."""
    return torch.cat([up, up.new_zeros(up.shape[0], count, *up.shape[2:])], dim=1)


def pad_down(down: torch.Tensor, count: int, name: str) -> torch.Tensor:
    """A, (r, K) or (r, C, H, W), with `count` more rows, drawn as Kaiming's uniform initialisation does."""
    generator = torch.Generator().manual_seed(stable_seed("rows of A", name))
    bound = 1 / math.sqrt(down[0].numel())
    rows = torch.empty(count, *down.shape[1:]).uniform_(-bound, bound, generator=generator)
    return torch.cat([down, rows.to(down.dtype)])
