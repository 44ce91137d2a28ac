"""LoRA layers whose products are taken together: three small matrix products each, no copy of the input."""

from __future__ import annotations

import functools

import torch

from lora_training.memory.frozen_linear import (
    input_gradient,
    linear_product,
    multiplies_in_fp8,
    quantize_fp8,
    skipped_layers,
)

SHARED_INPUT = (  # layers of an attention that are given the same tensor; in cross-attention the first has another
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
)


class LoraGroup:
    """peft's LoRA layers that are given the same tensor one after another: the first call computes all of them.

    Takes the place of their `forward`. What is read and written are views into the buffers of the layers' part.
    """

    def __init__(self, layers: list) -> None:
        self.layers, self.bases = layers, [layer.base_layer for layer in layers]
        downs, ups = (
            [getattr(layer, name)["default"].weight for layer in layers] for name in ("lora_A", "lora_B")
        )
        self.trained, self.scale, self.ranks = (
            downs + ups,
            layers[0].scaling["default"],
            [len(down) for down in downs],
        )
        self.ups, self.up_grads = [up.detach().flatten(1) for up in ups], [up.grad.flatten(1) for up in ups]
        shape = (sum(self.ranks), downs[0][0].numel())
        self.down, self.down_grad = (
            t.as_strided(shape, (shape[1], 1)) for t in (downs[0].detach(), downs[0].grad)
        )
        self.given, self.ready = None, {}
        for number, layer in enumerate(layers):
            layer.forward = functools.partial(self.forward, number)

    def forward(self, number: int, x):
        """What layer `number` makes of x: (..., K) -> (..., N), or (B, K, H, W) -> (B, N, H, W)."""
        layer = self.layers[number]
        if layer.disable_adapters or layer.merged:
            return layer.base_layer(x)
        if self.given is not x or number not in self.ready:
            self.given, self.ready = x, dict(enumerate(self.results(x)))
        result = self.ready.pop(number)
        if not self.ready:
            self.given = None
        return result

    def results(self, x) -> list:
        """The outputs of all layers."""
        picture = isinstance(self.bases[0], torch.nn.Conv2d)
        values = x.permute(0, 2, 3, 1) if picture else x
        rows = values.reshape(-1, values.shape[-1]).to(self.down.dtype)
        results = [r.view(*values.shape[:-1], -1) for r in LoraProducts.apply(rows, self, *self.trained)]
        if not picture:
            return results
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return [r.permute(0, 3, 1, 2).contiguous(memory_format=layout) for r in results]


class LoraProducts(torch.autograd.Function):
    """x (M, K) -> x W^T + b + s (x A^T) B^T, (M, N), for each layer of a LoraGroup, whose layers have x in common.

    The gradients of A and B are added to where the group's part collects them; autograd sees none.
    """

    @staticmethod
    def forward(ctx, x, group, *trained):
        hidden = torch.mm(x, group.down.t())  # (M, R), R the sum of the layers' ranks
        wanted = group.bases[0] not in skipped_layers
        eighth = quantize_fp8(x) if wanted and multiplies_in_fp8(group.bases[0]) else None
        results = tuple(linear_product(base, x, eighth) for base in group.bases)
        for result, part, up in zip(results, hidden.split(group.ranks, dim=1), group.ups, strict=True):
            if wanted:
                result.addmm_(part, up.t(), alpha=group.scale)
        ctx.group = group
        ctx.save_for_backward(x, hidden)
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        group, (x, hidden) = ctx.group, ctx.saved_tensors
        inner, total = (
            torch.empty_like(hidden),
            None,
        )  # inner: gradients of the hidden values, but for the scale
        for gradient, part, up in zip(gradients, inner.split(group.ranks, dim=1), group.ups, strict=True):
            torch.mm(gradient, up, out=part)
        if ctx.needs_input_grad[0]:
            for base, gradient in zip(group.bases, gradients, strict=True):
                total = input_gradient(base, gradient, total)
            total.addmm_(inner, group.down, alpha=group.scale)
        if ctx.needs_input_grad[2]:
            group.down_grad.addmm_(inner.t(), x, alpha=group.scale)
            for gradient, part, up in zip(
                gradients, hidden.split(group.ranks, dim=1), group.up_grads, strict=True
            ):
                up.addmm_(gradient.t(), part, alpha=group.scale)
        return total, *([None] * (1 + 2 * len(gradients)))


def fuse_lora(module) -> None:
    """Gives a module's plain LoRA layers (linear, 1 x 1 convolution; no dropout, no DoRA) the forward of LoraGroup.

    Those of one attention with the same input become one group. To be called when the part's buffers are there; peft
    computes all other layers.
    """
    from peft.tuners.lora import Conv2d, Linear

    def plain(layer) -> bool:
        if type(layer) not in (Linear, Conv2d) or list(layer.lora_A) != ["default"] or layer.lora_variant:
            return False
        base, linear = layer.base_layer, isinstance(layer.base_layer, torch.nn.Linear)
        if not linear and (base.kernel_size, base.stride, base.padding, base.groups) != (
            (1, 1),
            (1, 1),
            (0, 0),
            1,
        ):
            return False
        return type(layer.lora_dropout["default"]) is torch.nn.Identity and not layer.lora_bias["default"]

    for parent in module.modules():
        layers = {name: layer for name, layer in parent.named_children() if plain(layer)}
        crossed = getattr(parent, "is_cross_attention", False)
        for names in SHARED_INPUT:
            group = [layers[name] for name in layers if name in names[crossed:]]
            if (
                len(group) > 1
                and len({layer.in_features for layer in group}) == 1
                and adjacent_in_memory(group)
            ):
                LoraGroup(group)
                layers = {name: layer for name, layer in layers.items() if layer not in group}
        for layer in layers.values():
            LoraGroup([layer])


def adjacent_in_memory(layers: list) -> bool:
    """Whether the layers' A matrices follow each other in memory, so that together they are one matrix."""
    downs = [layer.lora_A["default"].weight for layer in layers]
    return all(
        b.storage_offset() == a.storage_offset() + a.numel() for a, b in zip(downs, downs[1:], strict=False)
    )
