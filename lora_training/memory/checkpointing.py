"""Gradient checkpointing that doesn't compute a block's last products again."""

from __future__ import annotations

import contextlib
import functools

import torch

from lora_training.memory.frozen_linear import frozen_linear, skip_layers


def enable_checkpointing(
    denoiser, last_products: tuple[str, ...], dropout: bool, whole: bool = False
) -> None:
    """Turns gradient checkpointing on; without dropout there is no random state to be kept at each block.

    A block's `last_products` are not computed again: each is multiplied by a gate and added, and the backward pass needs the gate
    alone, as long as nothing trained moves the gate. whole: compute all of a block again.
    """
    run = functools.partial(
        torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=dropout
    )
    gates_move = any("norm" in name for name, p in denoiser.named_parameters() if p.requires_grad)
    ends = {
        block: last_layers(block, last_products)
        for block in repeated_blocks(denoiser)
        if not (whole or gates_move)
    }

    def frugal(block, *given):
        moved = any(torch.is_tensor(value) and value.dim() == 2 and value.requires_grad for value in given)
        layers = () if moved else ends.get(block, ())
        return run(block, *given, context_fn=lambda: (contextlib.nullcontext(), skip_layers(layers)))

    denoiser.enable_gradient_checkpointing(frugal if any(ends.values()) else run)


def last_layers(block, last_products: tuple[str, ...]) -> list:
    """The linear layers of a block that are in `last_products`, those under a LoRA too."""
    layers = dict(block.named_modules())
    found = [layers.get(f"{name}.base_layer", layers.get(name)) for name in last_products]
    for layer in found:
        if type(layer) is torch.nn.Linear:
            layer.forward = functools.partial(frozen_linear, layer)
    return [layer for layer in found if layer is not None]


def repeated_blocks(module) -> list:
    """The blocks of which a transformer, an encoder, or the attention of a UNet is made."""
    return [part for part in module.modules() if type(part).__name__.endswith(("Block", "EncoderLayer"))]


def compile_blocks(denoiser) -> None:
    """Compiles the blocks that repeat: each kind once, for each shape of batch."""
    torch._dynamo.config.recompile_limit = (
        256  # kinds times shapes; beyond it they would run uncompiled in silence
    )
    for block in repeated_blocks(denoiser):
        block.compile(dynamic=False)
