"""Several LoRAs as one file, without their base: their sum, exact by its ranks, or the nearest of a rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_training.errors import UserError
from lora_training.lora.block_weights import layer_weights
from lora_training.lora.conversion import TOOLS, check_target, rank_range
from lora_training.lora.low_rank import LoraLayer, LycorisLayer
from lora_training.lora.merging import DTYPES
from lora_training.lora.reading import Lora, read_lora
from lora_training.lora.resizing import check_size, resize_lora
from lora_training.lora.writing import METADATA_PREFIXES, write_lora

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.lora.block_weights import Layer

OWN_METADATA = ("hash", "title", "date", "thumbnail", "ss_network_", "trigger_phrase")  # of one file alone


@dataclass
class LayerSum:
    """The sum of a layer's adapters, of which not all are two matrices: made only when it is read."""

    parts: list[tuple[LoraLayer | LycorisLayer, float]]  # with their factors
    kind = "sum"
    magnitude = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0][0].shape

    @property
    def rank(self) -> int:
        return sum(layer.rank for layer, _ in self.parts)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for layer, _ in self.parts for tensor in layer.tensors]

    def delta(self) -> torch.Tensor:
        """The change of the layer's weight, float32, of the weight's own shape."""
        return sum(layer.delta() * factor for layer, factor in self.parts)


def join_lora_files(
    sources: list[tuple[str, float]],
    target: Path,
    rank: int | None = None,
    spelling: str | None = None,
    dtype: str | None = None,
    family: str | None = None,
    base: str | None = None,
    block_weights: list[tuple[str, float]] | None = None,
) -> list[str]:
    """Writes the sum of LoRAs as one. Returns lines that say what was written.

    sources: files or folders with their scales. rank: None for the sum of theirs, which is exact. spelling:
    "kohya" or "diffusers"; None for the first one's. dtype: a key of DTYPES; None for theirs, float32 where
    another scale goes into a matrix. family, base: as `read_lora` takes them. block_weights: as
    `parse_block_weights` gives them. Errors: UserError.
    """
    check_target(target)
    if target.exists():
        raise UserError(f"{target} is there already: name another target")
    if rank is not None:
        check_size(rank, None)
    loras = [read_lora(path, family, base) for path, _ in sources]
    check_same_base(loras, [path for path, _ in sources])
    scales = [scale for _, scale in sources]
    lora = join_loras(loras, scales, layer_weights(block_weights or [], loras[0].base))
    lora.metadata = common_metadata(loras, [path for path, _ in sources])
    spelling = spelling or ("kohya" if loras[0].is_foreign else "diffusers")
    how = "exact"
    if rank is not None:
        lora, lost_share = resize_lora(lora, rank, fused=spelling == "kohya")
        how = f"{lost_share:.2%} of the sum is lost"
    elif any(layer.kind == "sum" for _, _, layer in lora):
        kinds = " and ".join(sorted({kind for x in loras for kind in x.kinds} - {"LoRA"}))
        raise UserError(f"{kinds} is not two matrices: --rank 32 makes the nearest LoRA of the sum")
    if dtype is not None:
        cast_layers(lora, DTYPES[dtype])
        how += f", and what {dtype} rounds away"
    write_lora(lora, target, spelling, None)
    notes = [note for x in loras for note in x.notes]
    size = target.stat().st_size / 1e6
    return [
        *notes,
        f"{len(loras)} LoRAs became one of rank {rank_range(lora)}: {how}",
        f"{target}: {lora.family} LoRA, {size:.1f} MB, for {TOOLS[spelling]}",
    ]


def check_same_base(loras: list[Lora], names: list[str]) -> None:
    """Errors: UserError for LoRAs of different bases, or a DoRA, whose sum the base's weights decide."""
    first = loras[0].base
    for lora, name in zip(loras, names, strict=True):
        if lora.base is not first and lora.base.shapes != first.shapes:
            raise UserError(
                f"{name} is for {lora.base.title}, {names[0]} for {first.title}: no sum is for both"
            )
        if any(layer.magnitude is not None for _, _, layer in lora):
            advice = "merge both into the base, or make a plain LoRA of it with scripts/lora/resize_lora.py"
            raise UserError(f"{name}: a DoRA can't be added without its base: {advice}")


def join_loras(loras: list[Lora], scales: list[float], weights: dict[Layer, float]) -> Lora:
    """The sum of LoRAs of one base. weights: further factors by (part, layer); a layer without any is left
    out. Errors: UserError if nothing remains, or a weight is not finite.
    """
    adapters: dict[Layer, list[tuple[LoraLayer | LycorisLayer, float]]] = {}
    for lora, scale in zip(loras, scales, strict=True):
        lora.check_finite()
        for part, name, layer in lora:
            if factor := scale * weights.get((part, name), 1.0):
                adapters.setdefault((part, name), []).append((layer, factor))
    if not adapters:
        raise UserError("every scale or weight is 0: nothing remains of the LoRAs")
    first, layers = loras[0], {}
    for (part, name), parts in adapters.items():
        layers.setdefault(part, {})[name] = join_layers(parts)
    return Lora(first.family, layers, {}, first.is_foreign, first.base)


def join_layers(parts: list[tuple[LoraLayer | LycorisLayer, float]]) -> LoraLayer | LayerSum:
    """The sum of a layer's adapters with their factors: of plain ones a LoRA of all their ranks."""
    if any(layer.kind != "LoRA" for layer, _ in parts):
        return LayerSum(parts)
    scales = [factor * layer.alpha / layer.rank for layer, factor in parts]
    same_scale = len(set(scales)) == 1
    dtype = torch.float32  # another scale goes into the up matrix, which must not be rounded
    if same_scale:
        dtype = parts[0][0].up.dtype
        for layer, _ in parts:
            dtype = torch.promote_types(dtype, layer.up.dtype)
    ups = [
        layer.up.to(dtype) if same_scale else layer.up.to(dtype) * scale
        for (layer, _), scale in zip(parts, scales, strict=True)
    ]
    down = torch.cat([layer.down.to(dtype) for layer, _ in parts])
    return LoraLayer(down, torch.cat(ups, 1), len(down) * (scales[0] if same_scale else 1.0))


def cast_layers(lora: Lora, dtype: torch.dtype) -> None:
    """Stores the matrices in another precision."""
    for _, _, layer in lora:
        layer.down, layer.up = layer.down.to(dtype), layer.up.to(dtype)


def common_metadata(loras: list[Lora], names: list[str]) -> dict[str, str]:
    """What all files say alike, the trigger words of each, and which files they were."""
    first, *others = (lora.metadata for lora in loras)
    out = {
        key: value
        for key, value in first.items()
        if key.startswith(METADATA_PREFIXES)
        and not any(own in key for own in OWN_METADATA)
        and all(other.get(key) == value for other in others)
    }
    triggers = [lora.metadata.get("modelspec.trigger_phrase") for lora in loras]
    if any(triggers):
        out["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(filter(None, triggers)))
    return out | {"modelspec.merged_from": ", ".join(names)}
