"""LoRA layers whose products are taken together: three small matrix products each, no copy of the input."""

from __future__ import annotations

import functools

import torch

from lora_training.memory.factored_products import factor_layers, is_pointwise
from lora_training.memory.frozen_linear import (
    input_gradient,
    linear_product,
    multiplies_in_fp8,
    quantize_fp8,
    skipped_layers,
)

# layers of an attention that are given the same tensor; in cross-attention the first has another
SHARED_INPUT = (
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
)


class LoraGroup:
    """peft's LoRA layers that are given the same tensor one after another: the first call computes all of
    them. Their ranks may differ, their scale is one.

    Takes the place of their `forward`. What is read and written are views into the buffers of the layers'
    part.
    """

    def __init__(self, layers: list) -> None:
        self.layers, self.bases = layers, [layer.base_layer for layer in layers]
        downs = [layer.lora_A["default"].weight for layer in layers]
        ups = [layer.lora_B["default"].weight for layer in layers]
        self.trained, self.scale = downs + ups, layers[0].scaling["default"]
        self.ranks = [len(down) for down in downs]
        self.ups = [up.detach().flatten(1) for up in ups]
        self.up_grads = [up.grad.flatten(1) for up in ups]
        shape = (sum(self.ranks), downs[0][0].numel())  # the A matrices lie one after another
        self.down = downs[0].detach().as_strided(shape, (shape[1], 1))
        self.down_grad = downs[0].grad.as_strided(shape, (shape[1], 1))
        self.input, self.outputs = None, {}  # outputs: by layer, those not yet asked for
        for number, layer in enumerate(layers):
            layer.forward = functools.partial(self.forward, number)

    def forward(self, number: int, x):
        """The output of layer `number`: x (..., K) -> (..., N), or (B, K, H, W) -> (B, N, H, W)."""
        layer = self.layers[number]
        if layer.disable_adapters or layer.merged:
            return layer.base_layer(x)
        if self.input is not x or number not in self.outputs:
            self.input, self.outputs = x, dict(enumerate(self.compute(x)))
        output = self.outputs.pop(number)
        if not self.outputs:
            self.input = None
        return output

    def compute(self, x) -> list:
        """The outputs of all layers."""
        is_convolution = isinstance(self.bases[0], torch.nn.Conv2d)
        values = x.permute(0, 2, 3, 1) if is_convolution else x
        rows = values.reshape(-1, values.shape[-1]).to(self.down.dtype)
        outputs = [out.view(*values.shape[:-1], -1) for out in LoraProducts.apply(rows, self, *self.trained)]
        if not is_convolution:
            return outputs
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return [out.permute(0, 3, 1, 2).contiguous(memory_format=layout) for out in outputs]


class LoraProducts(torch.autograd.Function):
    """x (M, K) -> x W^T + b + s (x A^T) B^T, (M, N), for each layer of a LoraGroup, whose layers have x in
    common.

    The gradients of A and B are added to the buffers of the group's part; autograd sees none.
    """

    @staticmethod
    def forward(ctx, x, group, *trained):
        hidden = torch.mm(x, group.down.t())  # (M, R), R the sum of the layers' ranks
        skipped = group.bases[0] in skipped_layers
        x_fp8 = quantize_fp8(x) if not skipped and multiplies_in_fp8(group.bases[0]) else None
        outputs = tuple(linear_product(base, x, x_fp8) for base in group.bases)
        for output, part, up in zip(outputs, hidden.split(group.ranks, dim=1), group.ups, strict=True):
            if not skipped:
                output.addmm_(part, up.t(), alpha=group.scale)
        ctx.group = group
        ctx.save_for_backward(x, hidden)
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        group, (x, hidden) = ctx.group, ctx.saved_tensors
        hidden_gradient, x_gradient = torch.empty_like(hidden), None  # the first but for the scale
        pieces = hidden_gradient.split(group.ranks, dim=1)
        for gradient, piece, up in zip(gradients, pieces, group.ups, strict=True):
            torch.mm(gradient, up, out=piece)
        if ctx.needs_input_grad[0]:
            for base, gradient in zip(group.bases, gradients, strict=True):
                x_gradient = input_gradient(base, gradient, x_gradient)
            x_gradient.addmm_(hidden_gradient, group.down, alpha=group.scale)
        if ctx.needs_input_grad[2]:
            group.down_grad.addmm_(hidden_gradient.t(), x, alpha=group.scale)
            pieces = hidden.split(group.ranks, dim=1)
            for gradient, piece, up_gradient in zip(gradients, pieces, group.up_grads, strict=True):
                up_gradient.addmm_(gradient.t(), piece, alpha=group.scale)
        return x_gradient, *([None] * (1 + 2 * len(gradients)))


def fuse_lora(module) -> None:
    """Gives a module's LoRA layers the forward of LoraGroup; those of one attention with the same input
    become one group; a LoHa's or LoKr's layers that of FactoredLayer.

    To be called when the part's buffers are there. Layers that `can_be_fused` refuses are computed by peft.
    """
    factor_layers(module)
    for parent in module.modules():
        layers = {name: layer for name, layer in parent.named_children() if can_be_fused(layer)}
        is_cross_attention = getattr(parent, "is_cross_attention", False)
        for names in SHARED_INPUT:
            group = [layers[name] for name in layers if name in names[is_cross_attention:]]
            kinds = {(layer.in_features, layer.scaling["default"]) for layer in group}
            if len(group) > 1 and len(kinds) == 1 and adjacent_in_memory(group):
                LoraGroup(group)
                layers = {name: layer for name, layer in layers.items() if layer not in group}
        for layer in layers.values():
            LoraGroup([layer])


def can_be_fused(layer) -> bool:
    """Whether it is a plain LoRA on a linear layer or a 1 x 1 convolution: no dropout, no DoRA, no bias of
    its own.
    """
    from peft.tuners.lora import Conv2d, Linear

    if type(layer) not in (Linear, Conv2d) or list(layer.lora_A) != ["default"] or layer.lora_variant:
        return False
    if not is_pointwise(layer.base_layer):
        return False
    return type(layer.lora_dropout["default"]) is torch.nn.Identity and not layer.lora_bias["default"]


def adjacent_in_memory(layers: list) -> bool:
    """Whether the layers' A matrices follow each other in memory, so that together they are one matrix."""
    downs = [layer.lora_A["default"].weight for layer in layers]
    pairs = zip(downs, downs[1:], strict=False)
    return all(b.storage_offset() == a.storage_offset() + a.numel() for a, b in pairs)
