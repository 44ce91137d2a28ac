"""Layers that keep less for the backward pass."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F


class GatedGelu(torch.autograd.Function):
    """(..., 2C) -> first half * gelu(second half), (..., C); makes the gelu again instead of keeping it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        value, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        (value, gate), (of_value, of_gate) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gate), out=of_value)
        torch.ops.aten.gelu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
        return out


class JoinedGelu(torch.autograd.Function):
    """a (..., A) and x (..., C) -> a and gelu(x), (..., A + C), for a product alone: backwards it writes into the gradient
    that it is given, which is a product's own.
    """

    @staticmethod
    def forward(ctx, a, x):
        ctx.save_for_backward(x)
        joined = x.new_empty(*x.shape[:-1], a.shape[-1] + x.shape[-1])
        first, second = joined.tensor_split([a.shape[-1]], dim=-1)
        torch.ops.aten.gelu.out(x, approximate="tanh", out=second)
        first.copy_(a)
        return joined

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        of_a, of_x = gradient.split([gradient.shape[-1] - x.shape[-1], x.shape[-1]], dim=-1)
        torch.ops.aten.gelu_backward.grad_input(of_x, x, approximate="tanh", grad_input=of_x)
        return of_a, of_x


def save_activation_memory(denoiser) -> None:
    """Has layers that keep more for the backward pass than it needs keep less: gated gelus (UNets), and FLUX.1's blocks.

    Other denoisers keep little as they are.
    """
    for layer in denoiser.modules():
        if type(layer).__name__ == "GEGLU":
            layer.forward = functools.partial(lambda layer, x: GatedGelu.apply(layer.proj(x)), layer)
    if type(denoiser).__name__ == "FluxTransformer2DModel":
        optimize_flux_blocks(denoiser)


def optimize_flux_blocks(denoiser) -> None:
    """Fewer operations: queries and keys as complex numbers. Less memory: a single block's MLP after its attention, so that
    backwards its gradient is gone first.
    """
    from diffusers.models import embeddings, transformers

    # one table turns the queries and keys of all blocks; (S, D), each number twice -> (S, 1, D/2)
    turns = functools.lru_cache(1)(lambda cos, sin: torch.complex(cos[:, None, ::2], sin[:, None, ::2]))

    def turned(x, angles, sequence_dim: int):
        if x.is_mps:
            return embeddings.apply_rotary_emb(x, angles, sequence_dim=sequence_dim)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, S, heads, D/2)
        return torch.view_as_real(pairs * turns(*angles)).flatten(-2).to(x.dtype)

    def single(
        block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = block.norm(joined, emb=temb)
        attended = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        mixed = JoinedGelu.apply(attended, block.proj_mlp(normed))
        joined = joined + gate.unsqueeze(1) * block.proj_out(mixed)
        return joined.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)

    transformers.transformer_flux.apply_rotary_emb = turned
    for block in denoiser.single_transformer_blocks:
        block.forward = functools.partial(single, block)
