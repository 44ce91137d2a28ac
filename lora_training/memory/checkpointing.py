"""Gradient checkpointing that doesn't compute a block's last products again."""

from __future__ import annotations

import contextlib
import functools

import torch

from lora_training.memory.frozen_linear import frozen_linear, skip_layers


def enable_checkpointing(
    denoiser, last_products: tuple[str, ...], dropout: bool, whole: bool = False
) -> None:
    """Turns gradient checkpointing on.

    A block's `last_products` are not computed again: each is multiplied by a gate and added, and the backward
    pass needs the gate alone, as long as nothing trained changes the gate. dropout: keep the random state at
    each block. whole: compute all of a block again.
    """
    checkpoint = torch.utils.checkpoint.checkpoint
    checkpoint = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=dropout)
    gates_are_trained = any("norm" in name for name, p in denoiser.named_parameters() if p.requires_grad)
    blocks = [] if whole or gates_are_trained else repeated_blocks(denoiser)
    skipped = {block: last_layers(block, last_products) for block in blocks}

    def checkpoint_block(block, *inputs):
        embeddings = [value for value in inputs if torch.is_tensor(value) and value.dim() == 2]
        layers = () if any(value.requires_grad for value in embeddings) else skipped.get(block, ())
        return checkpoint(block, *inputs, context_fn=lambda: (contextlib.nullcontext(), skip_layers(layers)))

    denoiser.enable_gradient_checkpointing(checkpoint_block if any(skipped.values()) else checkpoint)


def last_layers(block, last_products: tuple[str, ...]) -> list:
    """The linear layers of a block that are in `last_products`, those under a LoRA too."""
    layers = dict(block.named_modules())
    chosen = [layers.get(f"{name}.base_layer", layers.get(name)) for name in last_products]
    for layer in chosen:
        if type(layer) is torch.nn.Linear:
            layer.forward = functools.partial(frozen_linear, layer)
    return [layer for layer in chosen if layer is not None]


def repeated_blocks(module) -> list:
    """The blocks of which a transformer, an encoder, or the attention of a UNet is made."""
    return [part for part in module.modules() if type(part).__name__.endswith(("Block", "EncoderLayer"))]


def compile_blocks(denoiser) -> None:
    """Compiles the blocks that repeat: each kind once, for each shape of batch."""
    torch._dynamo.config.recompile_limit = 256  # kinds times shapes; beyond it they run uncompiled in silence
    for block in repeated_blocks(denoiser):
        block.compile(dynamic=False)
