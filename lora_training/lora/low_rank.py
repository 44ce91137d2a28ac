"""What an adapter of one layer is in memory, whatever its kind, and how it becomes a LoRA of another rank.

A plain LoRA is a `LoraLayer`; LoHa, LoKr (https://arxiv.org/abs/2309.14859) and full differences are a
`LycorisLayer`. Both may have DoRA's magnitudes (https://arxiv.org/abs/2402.09353).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

OVERSAMPLE, ITERATIONS = 8, 4  # of the randomised SVD: https://arxiv.org/abs/0909.4061


@dataclass
class LoraLayer:
    """One layer's LoRA. down (r, in[, k, k]), up (out, r[, 1, 1]); its delta is alpha / r * up @ down."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None  # DoRA's: (out,), or (in,) as the first LyCORIS had it
    magnitude_per_input: bool = False  # whether the magnitude is that of the weight's columns
    kind = "LoRA"

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""
        return self.up.shape[0], *self.down.shape[1:]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.down, self.up, self.magnitude) if t is not None]

    def delta(self) -> torch.Tensor:
        """The change of the layer's weight, float32, of the weight's own shape; without DoRA's magnitude."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * (self.alpha / self.rank)).reshape(self.shape)

    def delta_norm(self) -> float:
        """Frobenius norm of the delta, without making it; NaN if it isn't finite."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        square = ((up.T @ up) * (down @ down.T)).sum().item()
        if not math.isfinite(square):
            return math.nan
        return abs(self.alpha) / self.rank * math.sqrt(max(square, 0.0))


@dataclass
class LycorisLayer:
    """An adapter of one layer that no two small matrices make: LoHa, LoKr or a full difference."""

    factors: dict[str, torch.Tensor]  # by the names of LyCORIS: hada_w1_a, lokr_w2, …, diff
    alpha: float | None
    shape: tuple[int, ...]  # of the weight that it changes
    rows: torch.Tensor | None = None  # of a fused layer: those of this part, in its order
    magnitude: torch.Tensor | None = None
    magnitude_per_input: bool = False
    kind: str = field(init=False)

    def __post_init__(self) -> None:
        first = next(iter(self.factors))
        self.kind = {"hada": "LoHa", "lokr": "LoKr"}.get(first[:4], "full difference")

    @property
    def rank(self) -> int:
        """Of its factors."""
        for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in self.factors:
                return self.factors[name].shape[0]
        return min(self.shape[0], math.prod(self.shape[1:]))

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.factors.values(), *([] if self.magnitude is None else [self.magnitude])]

    def delta(self) -> torch.Tensor:
        """The change of the layer's weight, float32, of the weight's own shape; without DoRA's magnitude."""
        factors = {name: value.float() for name, value in self.factors.items()}
        if self.kind == "full difference":
            product, is_scaled = factors["diff"], False
        elif self.kind == "LoHa":
            product, is_scaled = loha_product(factors), True
        else:
            product = lokr_product(factors)
            is_scaled = not {"lokr_w1", "lokr_w2"} <= factors.keys()
        scale = self.alpha / self.rank if is_scaled and self.alpha is not None else 1.0
        columns = math.prod(self.shape[1:])
        product = product.reshape(product.numel() // columns, *self.shape[1:]) * scale
        return product if self.rows is None else product[self.rows]

    def delta_norm(self) -> float:
        """Frobenius norm of the delta."""
        return self.delta().norm().item()


def loha_product(factors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The elementwise product of LoHa's two halves, unscaled."""
    first, second = (
        with_core(factors.get(f"hada_t{n}"), factors[f"hada_w{n}_a"], factors[f"hada_w{n}_b"]) for n in (1, 2)
    )
    return first * second


def lokr_product(factors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The Kronecker product of LoKr's two factors, each whole or itself a product; unscaled."""
    first = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
    if "lokr_w2" in factors:
        second = factors["lokr_w2"]
    else:
        second = with_core(factors.get("lokr_t2"), factors["lokr_w2_a"], factors["lokr_w2_b"])
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second)


def with_core(core: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, or with a Tucker core (r, r, k, k) the sum over both of its ranks."""
    return a @ b if core is None else torch.einsum("mnkl,mo,ni->oikl", core, a, b)


def apply_delta(weight: torch.Tensor, delta: torch.Tensor, layer: LoraLayer | LycorisLayer) -> torch.Tensor:
    """weight + delta, float32; with DoRA its rows (or columns) get their magnitudes."""
    out = weight.float() + delta.reshape(weight.shape)
    if layer.magnitude is None:
        return out
    if layer.magnitude_per_input:
        norm, shape = out.transpose(0, 1).flatten(1).norm(dim=1), (1, -1, *[1] * (out.dim() - 2))
    else:
        norm, shape = out.flatten(1).norm(dim=1), (-1, *[1] * (out.dim() - 1))
    return out * (layer.magnitude.float() / norm).reshape(shape)


def truncated_svd(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first `count` singular triplets (U, S, V); exact for small matrices, else by random projection."""
    count = min(count, *matrix.shape)
    if min(matrix.shape) <= 4 * (count + OVERSAMPLE):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.mH
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file from the same file
            u, s, v = torch.svd_lowrank(matrix, q=count + OVERSAMPLE, niter=ITERATIONS)
    return u[:, :count], s[:count], v[:, :count]


def lora_svd(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U, S, V) of a plain LoRA's delta, float64, from its two matrices."""
    (q_up, r_up), (q_down, r_down) = (
        torch.linalg.qr(m.double()) for m in (layer.up.flatten(1), layer.down.flatten(1).T)
    )
    u, s, vh = torch.linalg.svd(r_up @ r_down.T * (layer.alpha / layer.rank), full_matrices=False)
    return q_up @ u, s, q_down @ vh.mH


def resize_layer(
    layer: LoraLayer | LycorisLayer,
    rank: int | None = None,
    energy_share: float | None = None,
    weight: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[LoraLayer, float, float]:
    """The nearest plain LoRA of a rank, or of the least rank that keeps this share of the delta's energy.

    Energy is the sum of squares; with both, `rank` is the highest. weight: the base's, for DoRA. dtype: of
    the LoRA; None for the layer's. Returns (LoRA, squared error, squared norm of the delta), the error as the
    LoRA will be stored.
    """
    delta = None
    if layer.kind == "LoRA" and layer.magnitude is None:
        u, s, v = lora_svd(layer)
        energy = s.square().sum().item()
    else:
        delta = layer.delta()
        if layer.magnitude is not None:
            delta = apply_delta(weight, delta, layer) - weight.float()
        delta = delta.flatten(1)
        energy = delta.double().square().sum().item()
        u, s, v = delta_svd(delta, energy, rank, energy_share)
    count = min(rank or len(s), len(s))
    if energy_share:
        count = min(count, int((s.double().square().cumsum(0) < energy_share * energy).sum()) + 1)
    root, dtype = s[:count].sqrt(), dtype or next(t.dtype for t in layer.tensors)
    up, down = (u[:, :count] * root).to(dtype), (v[:, :count] * root).T.to(dtype)
    if delta is not None:
        error = (delta - up.float() @ down.float()).double().square().sum().item()
    else:
        error = s[count:].square().sum().item() + rounding_error(up, down, u, s, v)
    up = up.reshape(layer.shape[0], count, *[1] * (len(layer.shape) - 2))
    return LoraLayer(down.reshape(count, *layer.shape[1:]), up, float(count)), error, energy


def rounding_error(
    up: torch.Tensor, down: torch.Tensor, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor
) -> float:
    """Squared distance of up @ down from the leading singular triplets that they were made of.

    up (out, r), down (r, in); u, s, v: r triplets or more.
    """
    rank = len(down)
    difference = LoraLayer(
        torch.cat([down.double(), v[:, :rank].T]),
        torch.cat([up.double(), -u[:, :rank] * s[:rank]], 1),
        2 * rank,
    )
    return difference.delta_norm() ** 2


def delta_svd(
    delta: torch.Tensor, energy: float, rank: int | None, energy_share: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U, S, V) of a whole delta: as many triplets as the rank, or as the share of its energy needs."""
    count = rank or 16
    u, s, v = truncated_svd(delta, count)
    while not rank and len(s) < min(delta.shape) and s.double().square().sum().item() < energy_share * energy:
        count *= 4
        u, s, v = truncated_svd(delta, count)
    return u, s, v
