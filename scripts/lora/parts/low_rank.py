"""What a layer's LoRA is in memory, of any kind, and how it becomes two small matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

OVERSAMPLE, ITERATIONS = 8, 4  # of the randomised SVD: https://arxiv.org/abs/0909.4061


class FileError(Exception):
    """A file that can't be used; the message says which and why, in one line."""


@dataclass
class Layer:
    """One layer's LoRA. down (r, in[, k, k]), up (out, r[, 1, 1]); its update is alpha / r * up @ down."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None  # DoRA's: (out,), or (in,) as the first LyCORIS had it
    per_input: bool = False  # whether the magnitude is that of the weight's columns
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

    def update(self) -> torch.Tensor:
        """The change of the layer's weight, float32, of the weight's own shape; without DoRA's magnitude."""
        flat = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (flat * (self.alpha / self.rank)).reshape(self.shape)

    def norm(self) -> float:
        """Frobenius norm of the update, without making it."""
        up, down = self.up.double().flatten(1), self.down.double().flatten(1)
        square = ((up.T @ up) * (down @ down.T)).sum().item()
        return abs(self.alpha) / self.rank * math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan


@dataclass
class Product:
    """An update that no two small matrices make: LoHa, LoKr (https://arxiv.org/abs/2309.14859) or a full difference."""

    factors: dict[str, torch.Tensor]  # by the names of LyCORIS: hada_w1_a, lokr_w2, …, diff
    alpha: float | None
    shape: tuple[int, ...]
    rows: torch.Tensor | None = None  # of a fused layer: those of this part, in its order
    magnitude: torch.Tensor | None = None
    per_input: bool = False
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

    def update(self) -> torch.Tensor:
        """The change of the layer's weight, float32."""
        f = {name: value.float() for name, value in self.factors.items()}
        if self.kind == "full difference":
            out, scale = f["diff"], 1.0
        elif self.kind == "LoHa":
            halves = [self.half(f.get(f"hada_t{n}"), f[f"hada_w{n}_a"], f[f"hada_w{n}_b"]) for n in (1, 2)]
            out, scale = halves[0] * halves[1], 1.0 if self.alpha is None else self.alpha / self.rank
        else:
            one = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
            if "lokr_w2" in f:
                two = f["lokr_w2"]
            else:
                two = self.half(f.get("lokr_t2"), f["lokr_w2_a"], f["lokr_w2_b"])
            one = one.reshape(*one.shape, *[1] * (two.dim() - 2))
            out = torch.kron(one, two)
            whole = {"lokr_w1", "lokr_w2"} <= f.keys()  # then nothing was scaled
            scale = 1.0 if whole or self.alpha is None else self.alpha / self.rank
        whole_shape = (out.numel() // math.prod(self.shape[1:]), *self.shape[1:])
        out = out.reshape(whole_shape) * scale
        return out if self.rows is None else out[self.rows]

    @staticmethod
    def half(core: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a @ b, or with a Tucker core (r, r, k, k) the sum over both of its ranks."""
        return a @ b if core is None else torch.einsum("mnkl,mo,ni->oikl", core, a, b)

    def norm(self) -> float:
        return self.update().norm().item()


def doras_weight(weight: torch.Tensor, update: torch.Tensor, layer: Layer | Product) -> torch.Tensor:
    """weight + update, float32; with DoRA its rows (or columns) have their magnitudes, https://arxiv.org/abs/2402.09353."""
    out = weight.float() + update.reshape(weight.shape)
    if layer.magnitude is None:
        return out
    if layer.per_input:
        norm, shape = out.transpose(0, 1).flatten(1).norm(dim=1), (1, -1, *[1] * (out.dim() - 2))
    else:
        norm, shape = out.flatten(1).norm(dim=1), (-1, *[1] * (out.dim() - 1))
    return out * (layer.magnitude.float() / norm).reshape(shape)


def leading(matrix: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first `count` singular triplets (U, S, V) of a matrix; exact for small ones, else by random projection."""
    count = min(count, *matrix.shape)
    if min(matrix.shape) <= 4 * (count + OVERSAMPLE):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.mH
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same file from the same file
            u, s, v = torch.svd_lowrank(matrix, q=count + OVERSAMPLE, niter=ITERATIONS)
    return u[:, :count], s[:count], v[:, :count]


def decomposed(layer: Layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U, S, V) of the whole update of a plain LoRA, float64, from its two matrices."""
    (q_up, r_up), (q_down, r_down) = (
        torch.linalg.qr(m.double()) for m in (layer.up.flatten(1), layer.down.flatten(1).T)
    )
    u, s, vh = torch.linalg.svd(r_up @ r_down.T * (layer.alpha / layer.rank), full_matrices=False)
    return q_up @ u, s, q_down @ vh.mH


def shrunk(
    layer: Layer | Product, rank: int | None = None, keep: float | None = None, weight: torch.Tensor | None = None
) -> tuple[Layer, float, float]:
    """The nearest plain LoRA of a rank, or of the least rank that keeps this share of the update's energy (sum of squares).

    With both, `rank` is the highest. weight: the base's, for DoRA. Returns (LoRA, squared error, squared norm of the update),
    as the LoRA will be stored.
    """
    if layer.kind == "LoRA" and layer.magnitude is None:
        u, s, v = decomposed(layer)
        energy, update = s.square().sum().item(), None
    else:
        update = layer.update()
        if layer.magnitude is not None:
            update = doras_weight(weight, update, layer) - weight.float()
        update = update.flatten(1)
        energy, count = update.double().square().sum().item(), rank or 16
        u, s, v = leading(update, count)
        while not rank and len(s) < min(update.shape) and s.double().square().sum().item() < keep * energy:
            count *= 4
            u, s, v = leading(update, count)
    count = min(rank or len(s), len(s))
    if keep:
        count = min(count, int((s.double().square().cumsum(0) < keep * energy).sum()) + 1)
    root, dtype = s[:count].sqrt(), next(t.dtype for t in layer.tensors)
    up, down = (u[:, :count] * root).to(dtype), (v[:, :count] * root).T.to(dtype)
    if update is not None:
        lost = (update - up.float() @ down.float()).double().square().sum().item()
    else:  # what is left out, and what rounding to the file's precision adds
        kept = Layer(
            torch.cat([down.double(), v[:, :count].T]),
            torch.cat([up.double(), -u[:, :count] * s[:count]], 1),
            2 * count,
        )
        lost = s[count:].square().sum().item() + kept.norm() ** 2
    ones = [1] * (len(layer.shape) - 2)
    small = Layer(down.reshape(count, *layer.shape[1:]), up.reshape(layer.shape[0], count, *ones), float(count))
    return small, lost, energy
