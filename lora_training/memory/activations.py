"""Layers that keep less for the backward pass."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F


class GatedGelu(torch.autograd.Function):
    """(..., 2C) -> first half * gelu(second half), (..., C); computes the gelu again instead of saving it."""

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
        value, gate = x.chunk(2, dim=-1)
        value_gradient, gate_gradient = out.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gate), out=value_gradient)
        torch.ops.aten.gelu_backward.grad_input(gradient * value, gate, grad_input=gate_gradient)
        return out


class JoinedGelu(torch.autograd.Function):
    """a (..., A) and x (..., C) -> a and gelu(x) side by side, (..., A + C), as the input of a product.

    The backward pass writes into the gradient that it receives, which nothing but that product has.
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
        widths = [gradient.shape[-1] - x.shape[-1], x.shape[-1]]
        a_gradient, x_gradient = gradient.split(widths, dim=-1)
        torch.ops.aten.gelu_backward.grad_input(x_gradient, x, approximate="tanh", grad_input=x_gradient)
        return a_gradient, x_gradient


def save_activation_memory(denoiser) -> None:
    """Has gated gelus (UNets) and FLUX.1's blocks save less for the backward pass; other denoisers save
    little anyway.
    """
    for layer in denoiser.modules():
        if type(layer).__name__ == "GEGLU":
            layer.forward = functools.partial(lambda layer, x: GatedGelu.apply(layer.proj(x)), layer)
    if type(denoiser).__name__ == "FluxTransformer2DModel":
        optimize_flux_blocks(denoiser)


def optimize_flux_blocks(denoiser) -> None:
    """Rotates queries and keys as complex numbers, in fewer operations, and computes a single block's MLP
    after its attention.

    Backwards the MLP's gradient is then gone before the attention's begins.
    """
    from diffusers.models import embeddings, transformers

    # one table rotates the queries and keys of all blocks; (S, D), each number twice -> (S, 1, D/2)
    rotations = functools.lru_cache(1)(lambda cos, sin: torch.complex(cos[:, None, ::2], sin[:, None, ::2]))

    def apply_rotary_emb(x, angles, sequence_dim: int):
        if x.is_mps:
            return embeddings.apply_rotary_emb(x, angles, sequence_dim=sequence_dim)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (B, S, heads, D/2)
        return torch.view_as_real(pairs * rotations(*angles)).flatten(-2).to(x.dtype)

    def single_block_forward(
        block, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, joint_attention_kwargs=None
    ):
        joined = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = block.norm(joined, emb=temb)
        attended = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        mixed = JoinedGelu.apply(attended, block.proj_mlp(normed))
        joined = joined + gate.unsqueeze(1) * block.proj_out(mixed)
        return joined.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)

    transformers.transformer_flux.apply_rotary_emb = apply_rotary_emb
    for block in denoiser.single_transformer_blocks:
        block.forward = functools.partial(single_block_forward, block)
