"""Gradient checkpointing and compiled blocks."""

from __future__ import annotations

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from small_models import (
    FLUX_TARGETS,
    Count,
    flux_pair,
    with_lora,
)

from lora_training.families import FLUX
from lora_training.memory.checkpointing import compile_blocks, enable_checkpointing
from lora_training.memory.frozen_linear import skipped_layers
from lora_training.validation.drawing import evaluation_mode

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", [None, "fp8", "nf4"])
@pytest.mark.parametrize("trained", ["attention", "gates", "pooled"])
def test_checkpointing_leaves_the_last_products_out(tmp_path, kind, trained):
    """The same gradients with fewer products; with all where gates are trained, or made of what is."""
    targets = (*FLUX_TARGETS, *["norm1.linear"] * (trained == "gates"))
    base, _, inputs = flux_pair(kind, tmp_path)
    results, products = [], []
    for whole in (None, True, False):  # computed again: nothing, all of a block, what is needed
        model, part = with_lora(copy.deepcopy(base).train(), targets=targets)
        if whole is not None:
            enable_checkpointing(model, FLUX.last_products, dropout=False, whole=whole)
        pooled, count = inputs["pooled_projections"].clone().requires_grad_(trained == "pooled"), Count()
        with count:
            model(**inputs | {"pooled_projections": pooled}).sample.square().mean().backward()
        results.append((part.gradients.clone(), pooled.grad))
        products.append(sum(name in ("mm", "addmm", "addmm_") for name in count.names))
    for gradients in results[1:]:
        torch.testing.assert_close(gradients, results[0], rtol=1e-5, atol=1e-8)
    assert results[0][0].any() and (results[0][1] is not None) == (trained == "pooled")
    # 2 double and 2 single blocks: 6 last products, of which 2 (ff.net.2) add a LoRA's
    assert products[1] - products[2] == (6 + 2 if trained == "attention" else 0) and not skipped_layers


def test_compiled_blocks(tmp_path, monkeypatch):
    """A kind of block is compiled once, and once more for the first, whose input needs no gradient.

    Gradients stay; what is drawn meanwhile runs eagerly.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    plain, compiled, inputs = flux_pair(None, tmp_path, layers=3)
    _, expected = with_lora(plain.train(), targets=FLUX_TARGETS, fused=False)
    _, trained = with_lora(compiled.train(), targets=FLUX_TARGETS, fused=False)
    compile_blocks(compiled)
    counters.clear()
    for model in (plain, compiled):
        model(**inputs).sample.square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 4
    for name, parameter in expected.items():
        torch.testing.assert_close(trained[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)
    run = SimpleNamespace(denoiser=compiled, lora_modules={}, args=SimpleNamespace(offload=False))
    run.components, run.prompts = SimpleNamespace(vae=torch.nn.Identity), SimpleNamespace(forget=lambda: None)
    run.accelerator = SimpleNamespace(device="cpu")
    with evaluation_mode(run), torch.no_grad():
        compiled(**inputs | {"hidden_states": torch.randn(1, 8, 16), "img_ids": torch.zeros(8, 3)})
    assert counters["stats"]["unique_graphs"] == 4
