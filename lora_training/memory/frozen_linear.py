"""Linear layers that aren't trained: their products, and their weights in 8 or 4 bits."""

from __future__ import annotations

import contextlib
import functools
import math

import torch
import torch.nn.functional as F


class FrozenLinear(torch.nn.Linear):
    """A linear layer that isn't trained. Autograd saves nothing but the layer itself.

    Its weights are in 8 bits (a scale per row), in 4 (a scale per 64 values), or as they are. fp8: e4m3,
    which GPUs of compute capability 8.9 multiply as it is. int8: rounded. nf4:
    https://arxiv.org/abs/2305.14314, scales in 8 bits.
    """

    def __init__(self, weight, bias, kind: str | None, dtype) -> None:
        """weight: (N, K), of any floating type, on its device; kind: nf4, int8, fp8 or None; dtype: of the
        products.
        """
        torch.nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.kind, self.dtype, self.bias = kind, dtype, bias
        self.nf4_state = None  # bitsandbytes' scales
        self.fetch = None  # of a swapped block: gives the weights on the device
        stored, scale = weight, weight.new_empty(0)
        if kind == "nf4":
            from bitsandbytes.functional import quantize_4bit

            stored, self.nf4_state = quantize_4bit(
                weight.to(dtype), quant_type="nf4", compress_statistics=True
            )
        elif kind:  # some rows at a time, so that little is held in float32
            quantize = quantize_fp8 if kind == "fp8" else functools.partial(quantize_int8, dtype=dtype)
            pieces = zip(*map(quantize, weight.split(max(1, 2**22 // self.in_features))), strict=True)
            stored, scale = map(torch.cat, pieces)
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale)
        nvidia = weight.is_cuda and not torch.version.hip  # AMD's numbers of capability mean something else
        capable = nvidia and torch.cuda.get_device_capability(weight.device) >= (8, 9)
        self.multiplies_in_fp8 = kind == "fp8" and capable and not any(n % 16 for n in weight.shape)

    @property
    def stored_weight(self):
        """The weights as they are stored; of a swapped block, where the device has them now."""
        return self.fetch() if self.fetch else self.stored

    @property
    def weight(self):
        """The weights (N, K) in `dtype`."""
        stored = self.stored_weight
        if self.kind is None:
            return stored
        if self.kind == "nf4":
            from bitsandbytes.functional import dequantize_4bit

            return dequantize_4bit(stored, self.nf4_state)
        return stored * self.scale if self.kind == "int8" else stored.to(self.dtype).mul_(self.scale)

    def _apply(self, fn, recurse=True):
        """Moves the weights to another device; a cast leaves them as they are."""
        device = fn(self.scale.new_empty(0)).device
        if self.nf4_state is not None:
            self.nf4_state.to(device)
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def forward(self, x):
        """(..., K) -> (..., N)."""
        x = x.to(self.dtype)
        if torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        return frozen_linear(self, x)


class FrozenProduct(torch.autograd.Function):
    """x (M, K) -> x W^T + b, (M, N), of a FrozenLinear."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return linear_product(layer, x)

    @staticmethod
    def backward(ctx, gradient):
        return input_gradient(ctx.layer, gradient), None


def empty_rows_like(x, columns: int):
    """An empty (M, columns) that lies in memory as x (M, K) does: row by row or, as in a picture, column by
    column.
    """
    by_columns = x.stride(0) == 1 and x.stride(1) != 1
    return x.new_empty(columns, len(x)).t() if by_columns else x.new_empty(len(x), columns)


def quantize_fp8(x):
    """(M, K) -> the same in e4m3, row by row in memory, and float32 scales (M, 1) that make it x again.

    Scales are powers of two, the least that leave e4m3's largest, 448, unreached: bfloat16 is divided as it
    is, exactly. float16 doesn't reach down to the scales of small rows.
    """
    scale = torch.linalg.vector_norm(x, math.inf, dim=1, keepdim=True, dtype=torch.float32)
    scale = scale.clamp_min_(1e-12).div_(224)
    scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone
    divisor = scale if x.dtype == torch.float16 else scale.to(x.dtype)
    return (x / divisor).to(torch.float8_e4m3fn, memory_format=torch.contiguous_format), scale


def quantize_int8(x, dtype):
    """(M, K) -> the same in int8, and scales (M, 1) in `dtype` that make it x again."""
    scale = (x.abs().amax(dim=1, keepdim=True).float().clamp_min_(1e-12) / 127).to(dtype)
    return (x / scale.float()).round_().to(torch.int8), scale


@functools.cache
def unit_scales(columns: int, device):
    """(1, columns) of 1.0, for products without scales."""
    return torch.ones(1, columns, device=device)


def frozen_linear(layer, x):
    """x (..., K) -> (..., N), of a linear layer that isn't trained."""
    return FrozenProduct.apply(x.reshape(-1, layer.in_features), layer).view(*x.shape[:-1], -1)


def linear_product(layer, x, x_fp8=None):
    """x (M, K) -> x W^T + b, (M, N), of a linear layer or a 1 x 1 convolution, frozen in 8 or 4 bits or not.

    x_fp8: quantize_fp8(x), where several layers share it.
    """
    if layer in skipped_layers:
        return x.new_empty(len(x), layer.out_features)
    if multiplies_in_fp8(layer):
        rows, scale = x_fp8 or quantize_fp8(x)
        weight = layer.stored_weight.t()
        return torch._scaled_mm(rows, weight, scale, layer.scale.t(), bias=layer.bias, out_dtype=x.dtype)
    weight = layer.weight.flatten(1)
    out = empty_rows_like(x, len(weight))
    if layer.bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(layer.bias, x, weight.t(), out=out)


def multiplies_in_fp8(layer) -> bool:
    """Whether a layer's products are taken in fp8."""
    return isinstance(layer, FrozenLinear) and layer.multiplies_in_fp8


def input_gradient(layer, gradient, total=None):
    """gradient (M, N) -> gradient W, (M, K); added to `total` if that is given."""
    if multiplies_in_fp8(layer):
        rows, scale = quantize_fp8(gradient * layer.scale.t().to(gradient.dtype))
        columns = (
            layer.stored_weight.t().contiguous().t()
        )  # the GPU takes the second factor column by column only
        scales = scale, unit_scales(layer.in_features, columns.device)
        result = torch._scaled_mm(rows, columns, *scales, out_dtype=gradient.dtype)
        return result if total is None else total.add_(result)
    weight = layer.weight.flatten(1)
    if total is not None:
        return total.addmm_(gradient, weight)
    return torch.mm(gradient, weight, out=empty_rows_like(gradient, weight.shape[1]))


skipped_layers: set = set()  # layers whose results nobody will read, while a block is computed again


@contextlib.contextmanager
def skip_layers(layers):
    """While inside, these layers give tensors of the right shape with nothing in them."""
    skipped_layers.update(layers)
    try:
        yield
    finally:
        skipped_layers.difference_update(layers)
