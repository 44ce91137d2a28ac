"""LoHa and LoKr layers whose update is never made whole: the input is multiplied by their factors.

A LoHa's update (a1 b1) * (a2 b2), elementwise, is up @ down, up's r^2 columns being those of a1 each times
those of a2, down's rows those of b1 each times those of b2. A LoKr's, the Kronecker product of w1 (l, m) and
w2 (k, n), takes the input as m pieces of n numbers: w1 mixes them, w2 multiplies each.
https://arxiv.org/abs/2309.14859
"""

from __future__ import annotations

import torch

from lora_training.memory.frozen_linear import input_gradient, linear_product, skipped_layers

LOHA_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class FactoredLayer:
    """One of peft's LoHa or LoKr layers; takes the place of its `forward`."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer, self.base, self.scale = layer, layer.base_layer, layer.scaling["default"]
        names = factor_names(layer)
        self.factors = [layer.get_submodule(name)["default"] for name in names]
        self.product = KroneckerProduct if names[-1] == "lokr_w2" else LowRankProduct
        self.matrices = loha_matrices if names[0] == "hada_w1_a" else lokr_matrices
        layer.forward = self.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) -> (..., N), or (B, K, H, W) -> (B, N, H, W)."""
        if self.layer.disable_adapters or self.layer.merged:
            return self.base(x)
        is_convolution = isinstance(self.base, torch.nn.Conv2d)
        values = x.permute(0, 2, 3, 1) if is_convolution else x
        rows = values.reshape(-1, values.shape[-1]).to(self.factors[0].dtype)
        output = self.product.apply(rows, self, *self.factors).view(*values.shape[:-1], -1)
        if not is_convolution:
            return output
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return output.permute(0, 3, 1, 2).contiguous(memory_format=layout)


def loha_matrices(a1, b1, a2, b2) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (r^2, K), up (N, r^2)) of a LoHa."""
    # as products of matrices, so that the gradients are such, too
    down, up = (
        torch.bmm(first[:, :, None], second[:, None]) for first, second in ((b1.t(), b2.t()), (a1, a2))
    )
    return down.flatten(1).t(), up.flatten(1)


def lokr_matrices(w1, a, b) -> tuple[torch.Tensor, torch.Tensor]:
    """(down (r, n), which multiplies each of m pieces of the input, up (N, m r)) of a LoKr with w2 = a b."""
    return b, torch.kron(w1, a)


def scaled_product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """a b times `scale`, in one operation."""
    return a.new_empty(len(a), b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


class LowRankProduct(torch.autograd.Function):
    """x (M, K) -> x W^T + b + up(down(x)), (M, N), of a FactoredLayer, whose matrices are made twice."""

    @staticmethod
    def forward(ctx, x, layer, *factors):
        down, up = layer.matrices(*factors)
        hidden = torch.mm(x.reshape(-1, down.shape[1]), down.t()).view(len(x), -1)
        output = linear_product(layer.base, x)
        if layer.base not in skipped_layers:
            output.addmm_(hidden, up.t(), alpha=layer.scale)
        ctx.layer = layer
        ctx.save_for_backward(x, hidden, *factors)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, hidden, *factors = ctx.saved_tensors
        base, scale = ctx.layer.base, ctx.layer.scale
        with torch.enable_grad():
            factors = [factor.detach().requires_grad_() for factor in factors]
            down, up = ctx.layer.matrices(*factors)
        pieces = x.reshape(-1, down.shape[1])  # (M m, n)
        hidden_gradient = scaled_product(gradient, up, scale).view(-1, len(down))
        gradients = torch.mm(pieces.t(), hidden_gradient).t(), scaled_product(gradient.t(), hidden, scale)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = input_gradient(base, gradient).contiguous()
            x_gradient.view(pieces.shape).addmm_(hidden_gradient, down)
        return x_gradient, None, *torch.autograd.grad((down, up), factors, gradients)


class KroneckerProduct(torch.autograd.Function):
    """x (M, K) -> x W^T + b + s x (w1 (x) w2)^T, (M, N), of a LoKr of two whole factors; saves x alone."""

    @staticmethod
    def forward(ctx, x, layer, w1, w2):
        mixed, rows = mix_pieces(x, w1, w2), linear_product(layer.base, x)
        output = rows.contiguous()
        if layer.base not in skipped_layers:
            output.view(-1, len(w2)).addmm_(mixed.flatten(0, 1), w2.flatten(1).t(), alpha=layer.scale)
        ctx.layer = layer
        ctx.save_for_backward(x, w1, w2)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, w1, w2 = ctx.saved_tensors
        scale, gradient = ctx.layer.scale, gradient.contiguous()
        pieces, rows = gradient.view(-1, len(w2)), mix_pieces(x, w1, w2).flatten(0, 1)  # (M l, k), (M l, n)
        w2_gradient = scaled_product(pieces.t(), rows, scale).view_as(w2)
        mixed_gradient = scaled_product(pieces, w2.flatten(1), scale).view(len(x), len(w1), -1)  # (M, l, n)
        x_pieces = x.reshape(len(x), w1.shape[1], -1)
        w1_gradient = torch.bmm(mixed_gradient, x_pieces.mT).sum(0)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = input_gradient(ctx.layer.base, gradient).contiguous()
            each = w1.t().expand(len(x), -1, -1)
            x_gradient.view(x_pieces.shape).baddbmm_(each, mixed_gradient)
        return x_gradient, None, w1_gradient, w2_gradient


def mix_pieces(x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """x (M, m n), m pieces of n numbers -> (M, l, n): each of l is a sum of the pieces, by a row of w1."""
    pieces = x.reshape(len(x), w1.shape[1], w2.shape[1])
    return torch.bmm(w1.expand(len(x), -1, -1), pieces)


def factor_layers(module: torch.nn.Module) -> None:
    """Gives a module's LoHa and LoKr layers the forward of FactoredLayer, where that costs less."""
    for layer in module.modules():
        if can_be_factored(layer):
            FactoredLayer(layer)


def factor_names(layer: torch.nn.Module) -> tuple[str, ...]:
    """The factors of a LoHa or LoKr layer of peft that FactoredLayer computes with; () for other layers."""
    from peft.tuners import loha, lokr

    if isinstance(layer, loha.layer.LoHaLayer):
        return () if "default" in layer.hada_t1 else LOHA_FACTORS
    if not isinstance(layer, lokr.layer.LoKrLayer) or "default" not in layer.lokr_w1:
        return ()
    if "default" in layer.lokr_w2:
        return "lokr_w1", "lokr_w2"
    return () if "default" in layer.lokr_t2 else ("lokr_w1", "lokr_w2_a", "lokr_w2_b")


def can_be_factored(layer: torch.nn.Module) -> bool:
    """Whether a LoHa or LoKr layer lies on a linear layer or a 1 x 1 convolution, and products with its
    factors cost less than those with its whole update.
    """
    names = factor_names(layer)
    if not names or not is_pointwise(layer.base_layer):
        return False
    if names != LOHA_FACTORS:
        return True
    rows, columns = len(layer.hada_w1_a["default"]), layer.hada_w1_b["default"].shape[1]
    return layer.r["default"] ** 2 * (rows + columns) <= rows * columns


def is_pointwise(base: torch.nn.Module) -> bool:
    """Whether a base's layer is linear, or a 1 x 1 convolution that multiplies each pixel by a matrix."""
    if isinstance(base, torch.nn.Linear):
        return True
    shape = (base.kernel_size, base.stride, base.padding, base.groups)
    return shape == ((1, 1), (1, 1), (0, 0), 1)
