"""Frozen weights in 8 and 4 bits."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    KINDS,
)

from lora_training.memory.frozen_linear import FrozenLinear, quantize_fp8

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind,error", [("fp8", 0.0275), ("int8", 0.012), ("nf4", 0.1)])
def test_frozen_weights(kind, error):
    torch.manual_seed(0)
    weight = torch.randn(96, 256) * 0.01
    layer = FrozenLinear(weight, torch.nn.Parameter(torch.randn(96)), kind, torch.float32)
    assert ((layer.weight - weight).norm() / weight.norm()) < error
    layer.to(torch.bfloat16)  # a cast leaves them alone
    assert ((layer.weight - weight).norm() / weight.norm()) < error
    x, saved = torch.randn(3, 7, 256, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert not saved  # nothing but the layer itself
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(out, expected)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-4, atol=1e-4
    )


def test_fp8_products():
    """What a GPU with fp8 does, on the CPU: forward and input gradient near to those of the dense weights."""
    torch.manual_seed(0)
    weight = torch.randn(96, 256) * 0.01 * torch.logspace(-2, 1, 96)[:, None]
    layer = FrozenLinear(weight, torch.nn.Parameter(torch.randn(96).bfloat16()), "fp8", torch.bfloat16)
    x = torch.randn(70, 256).bfloat16().requires_grad_()
    results = []
    for layer.multiplies_in_fp8 in (False, True):
        out = layer(x)
        results.append((out.detach(), torch.autograd.grad(out.float().square().sum(), x)[0]))
    for dense, direct in zip(*results, strict=True):
        similarity = torch.nn.functional.cosine_similarity
        assert similarity(dense.flatten().float(), direct.flatten().float(), 0) > 0.999
        assert (dense - direct).float().norm() / dense.float().norm() < 0.06


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_keeps_rows_of_every_size(dtype):
    """Scales are powers of two, in float32: all rows have e4m3's three bits, and a row of zeros stays one."""
    torch.manual_seed(0)
    x = torch.randn(9, 256) * torch.tensor([0.0, 1e-6, 1e-5, 1e-4, 1e-2, 1, 10, 100, 1000])[:, None]
    x = x.to(dtype)
    rows, scale = quantize_fp8(x)
    error = (rows.float() * scale - x.float()).norm(dim=1) / x.float().norm(dim=1).clamp(min=1e-30)
    assert rows.float().isfinite().all()
    assert error.max() < 0.03 and not rows[0].float().any()
    assert (scale.frexp().mantissa == 0.5).all() and scale.dtype == torch.float32


def test_only_8_bits_are_kept():
    """No dense weight, and no input of a frozen layer without LoRA, survives the forward pass."""
    weights = [torch.randn(64, 64) for _ in range(4)]
    for kind in KINDS:
        layers = torch.nn.Sequential(*(FrozenLinear(w, None, kind, torch.float32) for w in weights))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            layers(torch.randn(3, 64, requires_grad=True))
        assert not saved
