"""LoHa and LoKr by their factors against peft's whole updates."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model
from small_models import Pictures, close
from torch.utils.checkpoint import checkpoint

from lora_training.memory.factored_products import FactoredLayer, can_be_factored
from lora_training.memory.frozen_linear import FrozenLinear, skip_layers
from lora_training.memory.lora_products import fuse_lora
from lora_training.optim.parts import TrainedPart

pytestmark = pytest.mark.unit

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv", "proj_out"]
CONFIGS = {
    "loha": LoHaConfig(r=2, alpha=3, target_modules=TARGETS, init_weights=False),
    "lokr whole": LoKrConfig(r=16, alpha=8, decompose_factor=4, target_modules=TARGETS, init_weights=False),
    "lokr": LoKrConfig(r=1, alpha=3, decompose_factor=4, target_modules=TARGETS, init_weights=False),
    "lokr near the root": LoKrConfig(r=2, alpha=2, target_modules=TARGETS, init_weights=False),
}


def pair(kind: str, layout=torch.contiguous_format):
    """peft's model and a copy by factors, in float64; as `small_models.exact` gives them."""
    torch.manual_seed(0)
    plain = Pictures().to(memory_format=layout).double().requires_grad_(False)
    inject_adapter_in_model(CONFIGS[kind], plain)
    trained = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.3
    fused = copy.deepcopy(plain)
    parameters = {n: p for n, p in fused.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    part = TrainedPart("denoiser", parameters, 1e-3, 0.0, 9)
    part.allocate(torch.float64)
    for name, view in part.views(part.shadow).items():
        view.copy_(start[name])
    fuse_lora(fused)
    return plain, trained, fused, part


def factored(model) -> list[str]:
    """The layers that compute with their factors."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", CONFIGS)
def test_products_with_the_factors_equal_those_with_the_whole_update(kind, layout):
    both = pair(kind, layout)
    names = {name.split(".")[-1] for name in factored(both[2])}
    assert "to_q" in names and "proj_in" in names and "conv" not in names  # 3 x 3 stays peft's
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    close(*both, x)
    close(*pair(kind, layout), x, wrap=lambda model: lambda x: checkpoint(model, x, use_reentrant=False))


@pytest.mark.parametrize("kind", CONFIGS)
def test_without_the_adapter_it_is_the_base(kind):
    plain, _, fused, _ = pair(kind)
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    for model in (plain, fused):
        for module in model.modules():
            if hasattr(module, "enable_adapters"):
                module.enable_adapters(False)
    assert torch.equal(plain(x), fused(x))


def test_a_loha_whose_rank_is_high_for_its_layer_is_made_whole():
    """r^2 columns are more than the layer has."""
    model = torch.nn.Sequential(torch.nn.Linear(32, 32))
    for rank, expected in ((4, True), (5, False)):
        copied = copy.deepcopy(model)
        inject_adapter_in_model(LoHaConfig(r=rank, target_modules=["0"]), copied)
        assert can_be_factored(copied[0]) == expected


@pytest.mark.parametrize("quantized", ["int8", "nf4", None])
@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr whole"])
def test_frozen_layers_keep_nothing_as_large_as_the_update(kind, quantized):
    """Forward and backward save the input, and what is narrow; a skipped layer isn't multiplied at all."""
    torch.manual_seed(0)
    weight = torch.randn(256, 256) / 16
    base = FrozenLinear(weight, None, quantized, torch.float32)
    model = torch.nn.Sequential(base).requires_grad_(False)
    configs = {
        "loha": LoHaConfig(r=4, target_modules=["0"], init_weights=False),
        "lokr": LoKrConfig(r=4, decompose_factor=4, target_modules=["0"], init_weights=False),
        "lokr whole": LoKrConfig(r=256, decompose_factor=16, target_modules=["0"], init_weights=False),
    }
    inject_adapter_in_model(configs[kind], model)
    x = torch.randn(8, 256, requires_grad=True)
    expected = torch.nn.functional.linear(
        x, model[0].base_layer.weight + model[0].get_delta_weight("default")
    )
    FactoredLayer(model[0])
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        out = model(x)
    assert torch.allclose(out, expected, atol=1e-4) and max(sizes) < 256 * 256 / 8
    out.sum().backward()
    with skip_layers([model[0].base_layer]):
        assert model(x).shape == out.shape
