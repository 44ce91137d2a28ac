"""LoRAs of layers that the original checkpoint holds as one, such as q, k and v: split and fused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lora_training.errors import UserError
from lora_training.lora.low_rank import LoraLayer, LycorisLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_training.base_model.original_layout import OriginalPlace
    from lora_training.lora.base_layers import Meaning

PLAIN_LORA_ADVICE = "scripts/lora/resize_lora.py makes a plain LoRA of it"


def split_lora_layer(
    layer: LoraLayer | LycorisLayer, meaning: Meaning, source: str
) -> dict[str, LoraLayer | LycorisLayer]:
    """The LoRA of a fused layer as LoRAs of its parts; `meaning` as `BaseLayers.meaning` gives it.

    They have ranks of their own where the matrices show it, else each the whole rank. A part whose rows are
    all zero has no LoRA, unless all are zero. source: file and key, for errors. Errors: UserError for DoRA
    by columns.
    """
    if meaning[0][1] is None:
        return {meaning[0][0]: layer}
    if layer.magnitude_per_input and len(meaning) > 1:
        raise UserError(f"{source}: a DoRA by columns on fused layers can't be taken apart")
    row_indices = {name: place.read(torch.arange(place.height)) for name, place in meaning}
    magnitudes = dict.fromkeys(row_indices, layer.magnitude)
    if layer.magnitude is not None and not layer.magnitude_per_input:
        magnitudes = {name: layer.magnitude[rows] for name, rows in row_indices.items()}
    per_input = layer.magnitude_per_input
    if layer.kind != "LoRA":
        return {
            name: LycorisLayer(
                layer.factors, layer.alpha, (len(rows), *layer.shape[1:]), rows, magnitudes[name], per_input
            )
            for name, rows in row_indices.items()
        }
    ups = {name: layer.up[rows] for name, rows in row_indices.items()}
    if len(meaning) == 1:
        ((name, up),) = ups.items()
        return {name: LoraLayer(layer.down, up, layer.alpha, magnitudes[name], per_input)}
    out = {}
    for name, columns in rank_slices(layer, ups).items():
        down, up = layer.down[columns].clone(), ups[name][:, columns].clone()
        out[name] = LoraLayer(down, up, layer.alpha * len(down) / layer.rank, magnitudes[name])
    return out


def rank_slices(layer: LoraLayer, ups: dict[str, torch.Tensor]) -> dict[str, slice]:
    """{part: the columns of the up matrix that it uses}, without parts that use none, unless none uses any.

    ups: the up matrix's rows by part, in the order of a block diagonal, if it is one.
    """
    used = {name: up.flatten(1).any(0) for name, up in ups.items()}
    moved = [name for name, columns in used.items() if columns.any()] or list(used)
    slices = None
    for names in (list(used), moved):  # a part that never moved is zero, a part without LoRA is not there
        slices = slices or equal_slices(used, names, layer.rank)
    if slices is None:  # one pair of matrices for the fused layer, or parts of other ranks
        slices = block_slices(used, moved) or dict.fromkeys(moved, slice(None))
    if layer.magnitude is not None:  # a part without an update has a magnitude nevertheless
        slices = {name: slices.get(name, slice(0, 1)) for name in used}
    return slices


def equal_slices(used: dict[str, torch.Tensor], names: list[str], rank: int) -> dict[str, slice] | None:
    """The columns of each part of a block diagonal of equal blocks; None if it isn't one."""
    width, rest = divmod(rank, len(names))
    slices = {name: slice(k * width, (k + 1) * width) for k, name in enumerate(names)}
    outside = (used[name][: s.start].any() or used[name][s.stop :].any() for name, s in slices.items())
    return None if rest or any(outside) else slices


def block_slices(used: dict[str, torch.Tensor], names: list[str]) -> dict[str, slice] | None:
    """The columns of each part of a block diagonal whose blocks differ in width; None if it isn't one."""
    slices, start = {}, 0
    for name in names:
        columns = used[name].nonzero()[:, 0]
        stop = int(columns[-1]) + 1 if len(columns) else start
        if len(columns) and int(columns[0]) < start:
            return None
        slices[name] = slice(start, stop)
        start = stop
    last = names[-1]
    return slices | {last: slice(slices[last].start, len(used[last]))}


def fuse_lora_layers(
    places: dict[str, OriginalPlace],
    layers: dict[str, LoraLayer | None],
    row_norms: Callable[[str], torch.Tensor] | None,
) -> LoraLayer:
    """The LoRAs of layers that the original holds as one (None: a layer without LoRA) as one LoRA.

    Where the parts share their down matrix, as those that came from one fused layer do, it is there once;
    else the down matrices stand under each other, the up matrices on a block diagonal. row_norms(layer): of
    the base's weight, for DoRA on some of the layers. Errors: UserError for DoRA that can't be fused.
    """
    adapted = {name: layer for name, layer in layers.items() if layer is not None}
    first = next(iter(adapted.values()))
    if len(places) > 1 and any(layer.magnitude_per_input for layer in adapted.values()):
        raise UserError(f"a DoRA by columns has no place in fused layers; {PLAIN_LORA_ADVICE}")
    scales = [layer.alpha / layer.rank for layer in adapted.values()]
    same_scale = max(scales) - min(scales) <= 1e-9 * abs(scales[0])
    shared = same_scale and all(share_down(layer, first) for layer in adapted.values())
    rank = first.rank if shared else sum(layer.rank for layer in adapted.values())
    # another scale goes into the matrix, which must not be rounded
    dtype = first.up.dtype if same_scale else torch.float32
    up = torch.zeros(next(iter(places.values())).height, rank, *first.up.shape[2:], dtype=dtype)
    column = 0
    for (name, layer), scale in zip(adapted.items(), scales, strict=True):
        columns = slice(None) if shared else slice(column, column + layer.rank)
        scaled = layer.up if same_scale else layer.up.float() * (scale / scales[0])
        places[name].write(up[:, columns], scaled.to(dtype))
        column += layer.rank
    down = first.down if shared else torch.cat([layer.down for layer in adapted.values()])
    if first.magnitude_per_input:
        magnitude = first.magnitude
    else:
        magnitude = fuse_magnitudes(places, layers, row_norms)
    return LoraLayer(down, up, scales[0] * rank, magnitude, first.magnitude_per_input)


def share_down(layer: LoraLayer, other: LoraLayer) -> bool:
    """Whether two LoRAs have the same down matrix."""
    return layer.down.shape == other.down.shape and torch.equal(layer.down, other.down)


def fuse_magnitudes(
    places: dict[str, OriginalPlace],
    layers: dict[str, LoraLayer | None],
    row_norms: Callable[[str], torch.Tensor] | None,
) -> torch.Tensor | None:
    """DoRA's magnitudes of a layer of the original; a part without LoRA keeps the base's own row norms.

    None where there is no DoRA. Errors: UserError for DoRA on some of the LoRAs, or without row_norms where
    needed.
    """
    adapted = [layer for layer in layers.values() if layer is not None]
    doras = [layer.magnitude is not None for layer in adapted]
    if not any(doras):
        return None
    if not all(doras):
        raise UserError("DoRA on some of the layers that the original holds as one, LoRA on others")
    if row_norms is None and None in layers.values():
        raise UserError(
            "DoRA on some of the layers that the original holds as one needs the others' norms: --base FOLDER"
        )
    out = torch.empty(next(iter(places.values())).height, dtype=adapted[0].magnitude.dtype)
    for name, layer in layers.items():
        magnitude = row_norms(name) if layer is None else layer.magnitude
        places[name].write(out, magnitude.to(out.dtype))
    return out
