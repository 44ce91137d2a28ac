"""A LoRA file's layers at another rank, and plain LoRAs of DoRA, LoHa, LoKr and full differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_training.console import progress
from lora_training.errors import UserError
from lora_training.lora.fused_layers import fuse_lora_layers
from lora_training.lora.low_rank import LoraLayer, LycorisLayer, resize_layer
from lora_training.lora.reading import Lora

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class Resizer:
    """Makes layers smaller, and adds up what is lost.

    rank, energy_share, dtype: as `resize_layer` takes them. base_weights(part, layer): for DoRA.
    """

    rank: int | None
    energy_share: float | None
    base_weights: Callable[[str, str], torch.Tensor] | None
    dtype: torch.dtype | None = None
    squared_error: float = 0.0
    squared_norm: float = 0.0

    def resize(self, layer: LoraLayer | LycorisLayer, part: str, name: str) -> LoraLayer:
        """The layer as a plain LoRA. Errors: UserError for NaN in it, or a DoRA without base_weights."""
        if not all(torch.isfinite(t).all() for t in layer.tensors):
            raise UserError(f"{part}.{name} has weights that are not finite")
        weight = None
        if layer.magnitude is not None:
            if self.base_weights is None:
                raise UserError(
                    "DoRA changes every weight of its layers: --base BASE says which weights these are"
                )
            weight = self.base_weights(part, name)
        small, squared_error, squared_norm = resize_layer(
            layer, self.rank, self.energy_share, weight, self.dtype
        )
        self.squared_error += squared_error
        self.squared_norm += squared_norm
        return small

    @property
    def lost_share(self) -> float:
        """The length of what is lost, as a share of the whole update's."""
        return (self.squared_error / self.squared_norm) ** 0.5 if self.squared_norm else 0.0


def check_size(rank: int | None, energy_share: float | None) -> None:
    """Errors: UserError for a rank and a share of energy that can't be, or neither."""
    if rank is None and energy_share is None:
        raise UserError("--rank or --keep says how large the new LoRA is")
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: must be 1 or more")
    if energy_share is not None and not 0 < energy_share <= 1:
        raise UserError(f"--keep {energy_share:g}: must be between 0 and 1")


def resize_lora(
    lora: Lora,
    rank: int | None = None,
    energy_share: float | None = None,
    base_weights: Callable[[str, str], torch.Tensor] | None = None,
    only_unfit: bool = False,
    fused: bool = False,
) -> tuple[Lora, float]:
    """The LoRA with plain layers of another rank. Returns (LoRA, share of the update that is lost).

    only_unfit: layers that are plain LoRAs or DoRAs stay as they are. fused: the ranks are those of a file
    for other tools, where some layers are one. Errors: UserError as of `Resizer.resize`.
    """
    base, denoiser = lora.base, lora.base.family.denoiser
    resizer = Resizer(rank, energy_share, base_weights)
    out = {part: dict(layers) for part, layers in lora.layers.items()}
    for part, layers in lora.layers.items():
        with progress(part, len(layers)) as bar:
            for name, layer in layers.items():
                bar.update()
                if only_unfit and layer.kind == "LoRA":
                    continue
                if not (fused and part == denoiser and is_resized_fused(lora, name)):
                    out[part][name] = resizer.resize(layer, part, name)
    if fused:
        with progress("fused layers", len(base.fused)) as bar:
            for original, names in base.fused.items():
                bar.update()
                resize_fused(lora, out.get(denoiser, {}), original, names, resizer)
    return Lora(lora.family, out, lora.metadata, lora.is_foreign, base), resizer.lost_share


def is_resized_fused(lora: Lora, name: str) -> bool:
    """Whether a denoiser's layer is resized together with those that the original holds as one with it."""
    base, layers = lora.base, lora.layers[lora.base.family.denoiser]
    siblings = [sibling for sibling in base.fused[base.places[name].name] if sibling in layers]
    plain = all(layers[n].kind == "LoRA" and layers[n].magnitude is None for n in siblings)
    return len(siblings) > 1 and plain


def resize_fused(
    lora: Lora, layers: dict[str, LoraLayer], original: str, names: list[str], resizer: Resizer
) -> None:
    """Resizes those of `layers` that the original holds as one, `names`, together: with one down matrix."""
    adapted = {name: layers[name] for name in names if name in layers}
    if len(adapted) < 2:
        return
    places = {name: lora.base.places[name] for name in names}
    small = resizer.resize(fuse_lora_layers(places, adapted, None), "", original)
    for name in adapted:
        layers[name] = LoraLayer(small.down, places[name].read(small.up), small.alpha)
