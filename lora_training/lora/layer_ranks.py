"""Rank and alpha of each layer that gets an adapter: what flags, patterns and --init_lora's file say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable


def is_spatial(module: torch.nn.Module) -> bool:
    """Whether a layer, or the one that an adapter lies on, is a convolution that sees more than one pixel."""
    kernels = [m.kernel_size for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
    return bool(kernels) and max(kernels) > (1, 1)


def layer_ranks(
    module: torch.nn.Module, part: str, layers: Iterable[str], args: argparse.Namespace
) -> dict[str, tuple[int, float]]:
    """{layer: (rank, alpha)}, alpha as peft takes it. part: what the pipeline calls the module."""
    conv_rank, conv_alpha = (vars(args).get(name) for name in ("conv_rank", "conv_alpha"))
    ranks = {}
    for name in layers:
        rank, alpha = args.rank, None if args.alpha_is_rank else args.lora_alpha
        if conv_rank and is_spatial(module.get_submodule(name)):
            rank, alpha = conv_rank, conv_alpha
        rank = args.patterns["rank_pattern"].value(part, name, rank)
        alpha = args.patterns["alpha_pattern"].value(part, name, float(rank) if alpha is None else alpha)
        ranks[name] = args.initial_ranks.get((part, name.removeprefix("text_model.")), (rank, alpha))
    return ranks


def differing_ranks(
    module: torch.nn.Module, part: str, layers: Iterable[str], args: argparse.Namespace
) -> dict[str, tuple[int, float]]:
    """`layer_ranks` without the layers that have --rank and --lora_alpha."""
    ranks = layer_ranks(module, part, layers, args)
    return {name: pair for name, pair in ranks.items() if pair != (args.rank, args.lora_alpha)}


def peft_patterns(values: dict[str, float]) -> dict[str, float]:
    """{layer: value} as peft's rank_pattern or alpha_pattern: one regular expression for each value.

    peft compares each layer with each key, so hundreds of keys would take it minutes.
    """
    by_value: dict[float, list[str]] = {}
    for name, value in values.items():  # peft's own would also match a longer name that ends so
        by_value.setdefault(value, []).append(name if "." in name else f"^{name}")
    return {"|".join(names): value for value, names in by_value.items()}


def describe_ranks(ranks: dict[str, tuple[int, float]]) -> str:
    """The rank and alpha of layers in a few words, such as "rank 4 to 32, alpha / rank 1"."""
    values = [sorted(set(v)) for v in ([r for r, _ in ranks.values()], [a / r for r, a in ranks.values()])]
    names = ("rank", "alpha / rank")
    spans = [f"{v[0]:g} to {v[-1]:g}" if len(v) > 1 else f"{v[0]:g}" for v in values]
    return ", ".join(f"{name} {span}" for name, span in zip(names, spans, strict=True))
