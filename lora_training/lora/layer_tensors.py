"""The tensors that a LoRA file holds of one layer, made into a `LoraLayer` or a `LycorisLayer`."""

from __future__ import annotations

import functools
import math
import re

import torch

from lora_training.errors import UserError
from lora_training.lora.low_rank import LoraLayer, LycorisLayer


def read_layer(
    tensors: dict[str, torch.Tensor],
    shape: tuple[int, ...],
    settings: dict,
    part: str,
    name: str,
    source: str,
    base_title: str,
) -> LoraLayer | LycorisLayer:
    """A layer's tensors by what they are ("down", "alpha", …) -> the adapter of a weight of this shape.

    settings: what the file's metadata says of ranks and alphas, for the layer `name` of `part`. source: file
    and key, for errors. Errors: UserError where the tensors don't fit.
    """
    try:
        layer = layer_of_tensors(tensors, shape, source, base_title)
        alpha = tensors["alpha"].item() if "alpha" in tensors else None
    except (RuntimeError, IndexError, TypeError, KeyError, ValueError) as error:  # torch's own, of all kinds
        raise UserError(f"{source}: tensors that don't belong together ({error})") from None
    if layer.kind == "LoRA" and alpha is None:
        alpha = metadata_alpha(settings, part, name, layer.rank)
    elif alpha is None and f"{part}.alpha" in settings:  # a LoHa or LoKr of peft
        rank, alpha = (setting_of_layer(settings, part, key, name) for key in ("r", "alpha"))
        if {"lokr_w1", "lokr_w2"} <= tensors.keys():  # which peft scales, LyCORIS doesn't
            layer.factors["lokr_w1"] = layer.factors["lokr_w1"] * (alpha / rank)
    if alpha is not None and not math.isfinite(alpha):
        raise UserError(f"{source}: its alpha is {alpha}")
    layer.alpha = alpha
    return layer


def metadata_alpha(settings: dict, part: str, name: str, rank: int) -> float:
    """Alpha of a layer as diffusers' or peft's settings say it; else its rank.

    With rsLoRA it is such that alpha / rank is the scale.
    """
    alpha = setting_of_layer(settings, part, "lora_alpha", name)
    alpha = float(rank if alpha is None else alpha)
    return alpha * rank**0.5 if settings.get(f"{part}.use_rslora") else alpha


def setting_of_layer(settings: dict, part: str, key: str, name: str) -> float | None:
    """peft's setting `key` ("r", "lora_alpha" or "alpha") of a layer: by pattern, else for all, else None."""
    patterns = settings.get(f"{part}.{'rank' if key == 'r' else 'alpha'}_pattern") or {}
    if name in patterns:
        return patterns[name]
    matches = (value for pattern, value in patterns.items() if peft_pattern(pattern).match(name))
    return next(matches, settings.get(f"{part}.{key}"))


@functools.lru_cache(maxsize=4096)  # more than re keeps
def peft_pattern(pattern: str) -> re.Pattern:
    """What a key of peft's rank_pattern or alpha_pattern matches: the end of a layer's name."""
    return re.compile(rf"(.*\.)?({pattern})$")


def layer_of_tensors(
    tensors: dict[str, torch.Tensor], shape: tuple[int, ...], source: str, base_title: str
) -> LoraLayer | LycorisLayer:
    """The adapter without its alpha. Errors: UserError where it is another weight's, or those of torch."""
    factors = {k: v for k, v in tensors.items() if k.startswith(("hada_", "lokr_")) or k == "diff"}
    magnitude, per_input = dora_magnitude(tensors, shape, source)
    if factors:
        layer = LycorisLayer(factors, None, shape, magnitude=magnitude, magnitude_per_input=per_input)
        rows = factored_rows(layer, source)
    else:
        if "down" not in tensors or "up" not in tensors:
            raise UserError(f"{source}: one of its two matrices is missing")
        down, up = with_weight_shape(tensors, shape, source, base_title)
        layer, rows = LoraLayer(down, up, 0.0, magnitude, per_input), up.shape[0]
    if rows != shape[0]:
        advice = "--base FOLDER says which base it is for"
        raise UserError(f"{source}: {rows} rows, where {base_title} has {shape[0]}; {advice}")
    return layer


def dora_magnitude(
    tensors: dict[str, torch.Tensor], shape: tuple[int, ...], source: str
) -> tuple[torch.Tensor | None, bool]:
    """(DoRA's magnitudes in one dimension or None, whether they are those of the weight's columns)."""
    magnitude, per_input = tensors.get("magnitude"), False
    if (
        "dora_scale" in tensors
    ):  # (out, 1, …), or (1, in, …) as the first LyCORIS and OneTrainer's default have it
        magnitude = tensors["dora_scale"]
        is_row = shape[0] == 1 and magnitude.dim() > 1 and magnitude.shape[1] != 1
        per_input = magnitude.shape[0] != shape[0] or is_row
    if magnitude is None:
        return None, False
    magnitude = magnitude.flatten()
    if len(magnitude) != shape[1 if per_input else 0]:
        raise UserError(f"{source}: {len(magnitude)} magnitudes (DoRA) for a layer of {shape}")
    return magnitude, per_input


def factored_rows(layer: LycorisLayer, source: str) -> int:
    """The rows of a LoHa's, LoKr's or full difference's delta. Errors: UserError if the factors don't fit."""
    try:  # without numbers, which would take minutes for a large base
        factors = {name: factor.to("meta") for name, factor in layer.factors.items()}
        return LycorisLayer(factors, None, layer.shape).delta().shape[0]
    except (RuntimeError, KeyError, TypeError, IndexError) as error:
        problem = f"{layer.kind} factors that don't fit a layer of {layer.shape} ({error})"
        raise UserError(f"{source}: {problem}") from None


def with_weight_shape(
    tensors: dict[str, torch.Tensor], shape: tuple[int, ...], source: str, base_title: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(down, up) with the weight's number of dimensions. Errors: UserError for other sizes."""
    down, up = tensors["down"], tensors["up"]
    if "mid" in tensors:  # LoCon's core, (r, r, k, k): a LoRA of the same rank
        core, flat_down = tensors["mid"].float(), down.float().flatten(1)
        down = torch.einsum("mnkl,ni->mikl", core, flat_down).to(down.dtype)
    if down.shape[0] != up.shape[1]:
        raise UserError(f"{source}: its matrices' ranks differ")
    columns, expected = down[0].numel(), math.prod(shape[1:])
    if up.shape[0] == shape[0] and columns != expected:
        raise UserError(f"{source}: {columns} columns, where {base_title} has {expected}")
    if up.shape[0] == shape[0]:
        down = down.reshape(-1, *shape[1:])
        up = up.reshape(*up.shape[:2], *[1] * (len(shape) - 2))
    return down, up
