"""Adapters: their precision, their update, what is saved of them."""

from __future__ import annotations

import argparse

import pytest
import torch
from conftest import (
    target_layers,
)
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from toy_parts import arguments, components_of

from lora_training.lora.adapters import add_lora, lora_parameters, lora_state
from lora_training.lora.formats import reference_free
from lora_training.memory.checkpointing import enable_checkpointing
from lora_training.memory.lora_products import fuse_lora
from lora_training.optim.guard import NonFiniteGuard
from lora_training.optim.parts import TrainedPart

pytestmark = pytest.mark.unit


def test_lora_is_float32_on_a_bf16_base_and_the_clip_clips(recipe):
    args = arguments(recipe, "--rank", 2)
    denoiser = components_of(recipe, dtype=torch.bfloat16).denoiser()
    add_lora(denoiser, target_layers(recipe, denoiser, args), args)
    trained = lora_parameters(denoiser)
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    assert all(p.dtype == torch.bfloat16 for p in denoiser.parameters() if not p.requires_grad)
    part = TrainedPart("denoiser", trained, 1e-4, 0.0, 10)
    part.allocate()
    part.gradients.fill_(3.0)
    accelerator = argparse.Namespace(num_processes=1)
    guard = NonFiniteGuard(torch.device("cpu"), half=False)
    norm = guard.apply([part], accelerator, 0.5)
    assert norm == pytest.approx(3.0 * len(part.gradients) ** 0.5, rel=1e-4)
    flat = torch.cat([p.grad.flatten() for p in trained.values()])
    assert torch.linalg.vector_norm(flat) == pytest.approx(0.5, rel=1e-3)


def test_the_update_is_alpha_by_rank(recipe):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5)).requires_grad_(False)
    model.add_adapter = lambda config: inject_adapter_in_model(config, model)
    add_lora(model, ["0"], arguments(recipe, "--rank", 2, "--lora_alpha", 7))
    up = next(p for n, p in model.named_parameters() if "lora_B" in n)
    up.data.normal_()
    down = next(p for n, p in model.named_parameters() if "lora_A" in n)
    x, base = torch.randn(3, 6), model[0].get_base_layer()
    expected = x @ base.weight.T + base.bias + 7 / 2 * x @ down.T @ up.T
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base_are_taken_out(recipe, start):
    args = arguments(recipe, "--init_lora_weights", start, "--rank", 2, "--lora_alpha", 3)
    torch.manual_seed(0)
    states, initials = (
        {"d": {"x.lora_A.weight": torch.randn(2, 6), "x.lora_B.weight": torch.randn(5, 2)}} for _ in "ab"
    )
    out, alpha, rank = reference_free(states, initials, args)
    update = alpha / rank * out["d"]["x.lora_B.weight"] @ out["d"]["x.lora_A.weight"]
    a, b = (s["d"]["x.lora_B.weight"] @ s["d"]["x.lora_A.weight"] for s in (states, initials))
    assert rank == 4 and torch.allclose(update, 3 / 2 * (a - b), atol=1e-5)


def test_lora_state_is_the_float32_one():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), cross_attention_dim=8, norm_num_groups=4, attention_head_dim=2,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).requires_grad_(False).to(torch.bfloat16)  # fmt: skip
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    part = TrainedPart("denoiser", {n: p for n, p in unet.named_parameters() if p.requires_grad}, 1e-3, 0, 9)
    part.allocate(torch.bfloat16)
    fuse_lora(unet)
    part.weights.data.normal_(std=0.1)
    part.update_shadow()
    state, views = lora_state(unet, [part]), part.views(part.weights.detach())
    assert len(state) == len(views)
    assert all(torch.equal(views[k.replace(".weight", ".default.weight")], v) for k, v in state.items())
    gradients, inputs = [], (torch.randn(1, 4, 8, 8).bfloat16(), 5, torch.randn(1, 3, 8).bfloat16())
    for checkpointing in (False, True):
        if checkpointing:
            enable_checkpointing(unet.train(), (), dropout=False)
        unet(*inputs).sample.float().square().mean().backward()
        part.accumulate_gradients()
        gradients.append(part.gradients.clone())
        part.gradients.zero_()
    assert torch.equal(*gradients) and all(v.any() for v in part.views(gradients[0]).values())
