"""Fused LoRA products against peft's."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    KINDS,
    LAYERS,
    Attention,
    Count,
    Pictures,
    close,
    exact,
    groups,
    with_lora,
)
from torch.utils.checkpoint import checkpoint

from lora_training.memory.frozen_linear import FrozenLinear

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("needs", [True, False])
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}])
def test_self_attention_equals_peft(times, needs, config):
    both = exact(Attention(), LAYERS, **config)
    assert groups(both[2]) == [3, 1]
    close(*both, torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=needs), times=times)


def test_cross_attention_equals_peft():
    both = exact(Attention(cross=True), LAYERS)
    assert groups(both[2]) == [2, 1, 1]
    x, context = (torch.randn(2, n, 16, dtype=torch.float64, requires_grad=True) for n in (5, 5))
    close(*both, x, context)
    both = exact(Attention(), LAYERS)  # k and v get another input than q though they were thought to share it
    close(*both, x, context)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_equal_peft(batch, layout):
    both = exact(Pictures().to(memory_format=layout), ("proj_in", "conv", "proj_out", *LAYERS))
    assert groups(both[2]) == [3, 1, 1, 1]  # the 3 x 3 convolution stays peft's
    x = torch.randn(batch, 8, 4, 6, dtype=torch.float64).to(memory_format=layout)
    close(*both, x.requires_grad_())


@pytest.mark.parametrize("config", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}])
def test_what_is_not_plain_stays_pefts(config):
    both = exact(Attention(), LAYERS, **config)
    assert groups(both[2]) == []
    torch.manual_seed(0)
    if "lora_dropout" not in config:
        close(*both, torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True))


def test_checkpointing_adds_gradients_once():
    both = exact(Attention(), LAYERS)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)

    def checkpointed(model):
        return lambda *inputs: checkpoint(model, *inputs, use_reentrant=False, preserve_rng_state=False)

    close(*both, x, wrap=checkpointed)


def test_adapters_off_on_and_frozen():
    plain, _, fused, part = exact(Attention(), LAYERS)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for model in (plain, fused):
        for module in model.modules():
            if hasattr(module, "enable_adapters"):
                module.enable_adapters(False)
    torch.testing.assert_close(fused(x), plain(x))
    off = fused(x)
    for model in (plain, fused):
        for module in model.modules():
            if hasattr(module, "enable_adapters"):
                module.enable_adapters(True)
    torch.testing.assert_close(fused(x), plain(x))
    assert not torch.allclose(fused(x), off)
    for parameter in part.parameters.values():
        parameter.requires_grad_(False)
    fused(x.requires_grad_()).sum().backward()
    assert not part.micro_gradients.any() and x.grad.any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_lora_over_frozen_weights_equals_peft(kind, config):
    torch.manual_seed(0)
    model = Attention()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            model.set_submodule(name, FrozenLinear(layer.weight.data, layer.bias, kind, torch.float32))
    model, part = with_lora(model, **config)
    assert groups(model) == ([] if config else [3, 1])
    x = torch.randn(2, 5, 16)
    out = model(x)
    out.square().mean().backward()
    gradients = part.gradients.clone()
    part.gradients.zero_()
    for module in model.modules():
        vars(module).pop("forward", None)  # peft's again
    expected = model(x)
    expected.square().mean().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, part.gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations_of_a_layer(dtype):
    """A LoRA layer is 3 operations forwards and 5 backwards; three of one input are 7 and 11."""
    model, part = with_lora(Attention(), dtype)
    x, count = torch.randn(5, 16, dtype=dtype, requires_grad=True), Count()
    cases = (([model.to_out[0]], x.repeat(1, 2), 3, 5), ([model.to_q, model.to_k, model.to_v], x, 7, 11))
    for layers, inputs, forwards, backwards in cases:
        count.names = []
        with count:
            outs = [layer(inputs) for layer in layers]
        assert len(count.names) == forwards, count.names
        count.names = []
        gradients = [torch.randn_like(out) for out in outs]
        with count:
            torch.autograd.backward(outs, gradients)
        spare = [n for n in count.names if not n.startswith(("mm", "addmm"))]
        assert len(count.names) - len(spare) == backwards, count.names
    count.names = []
    with count:
        part.accumulate_gradients()
        part.update_shadow()
    assert len(count.names) == (3 if dtype != torch.float32 else 0)
