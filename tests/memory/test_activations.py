"""Blocks that save less compute what the library's do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from small_models import (
    Count,
    exact,
    tiny_flux,
)
from torch.utils.checkpoint import checkpoint

from lora_training.memory.activations import optimize_flux_blocks, save_activation_memory

pytestmark = pytest.mark.unit


def test_queries_and_keys_are_turned_as_the_library_does(monkeypatch):
    """In half precision a gradient is nearer to the exact one than diffusers' is, which is rounded twice."""
    from diffusers.models import embeddings, transformers

    library_module = transformers.transformer_flux
    monkeypatch.setattr(library_module, "apply_rotary_emb", library_module.apply_rotary_emb)  # undone later
    save_activation_memory(tiny_flux())
    angles = embeddings.FluxPosEmbed(10000, [4, 6, 6])(torch.arange(15.0).view(5, 3))
    states, gradient = torch.randn(2, 5, 3, 16).bfloat16(), torch.randn(2, 5, 3, 16).bfloat16()
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        for rotate in (embeddings.apply_rotary_emb, library_module.apply_rotary_emb):
            x, count = states.to(dtype, copy=True).requires_grad_(), Count()
            with count:
                result = rotate(x, angles, sequence_dim=1)
                result.backward(gradient.to(dtype))
            results.setdefault(dtype, []).append((result, x.grad, len(count.names)))
        (diffusers_result, _, diffusers_count), (result, _, count) = results[dtype]
        assert count < 0.7 * diffusers_count
        torch.testing.assert_close(result, diffusers_result)
    exact, same = (gradient for _, gradient, _ in results[torch.float32])
    torch.testing.assert_close(same, exact)
    diffusers_gradient, gradient = (gradient for _, gradient, _ in results[torch.bfloat16])
    assert (gradient - exact).norm() < (diffusers_gradient - exact).norm()


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v"), ("to_q", "proj_mlp", "proj_out")])
def test_a_single_block_computes_what_the_librarys_does(targets):
    """FLUX.1's: attention first, the MLP's gelu and its gradient in place; checkpointed too."""
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    plain, trained, fused, part = exact(FluxSingleTransformerBlock(32, 2, 16), targets)
    optimize_flux_blocks(SimpleNamespace(single_transformer_blocks=[fused]))
    states = [torch.randn(2, n, 32, dtype=torch.float64) for n in (6, 4)]
    temb, gradients = torch.randn(2, 32, dtype=torch.float64), [torch.randn_like(x) for x in states]

    def checkpointed(block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=False)

    def results_of(run, block, trained: dict) -> list:
        inputs = [x.clone().requires_grad_() for x in states]
        results = run(block, *inputs, temb)
        torch.autograd.backward(results, gradients[::-1])
        of_weights = [p.grad.clone() for _, p in sorted(trained.items())]
        for parameter in trained.values():
            parameter.grad.zero_()
        return [*results, *(x.grad for x in inputs), *of_weights]

    expected = results_of(torch.nn.Module.__call__, plain, trained)
    assert all(gradient.any() for gradient in expected)
    for run in (torch.nn.Module.__call__, checkpointed):
        torch.testing.assert_close(results_of(run, fused, part.parameters), expected, rtol=1e-6, atol=1e-9)
