"""Flat parts: steps, averages, clipping, and the shadow in half precision."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from small_models import (
    Attention,
    with_lora,
)
from toy_parts import arguments

from lora_training.optim.guard import NonFiniteGuard
from lora_training.optim.optimizers import prepare_parts
from lora_training.optim.parts import TrainedPart, averaged_weights

pytestmark = pytest.mark.unit


def test_averages_are_swapped_back_exactly(recipe):
    parameter = torch.nn.Parameter(torch.randn(5))
    part = TrainedPart("denoiser", {"x": parameter}, 1e-2, 0.0, 10)
    prepare_parts([part], arguments(recipe, "--use_ema", "--ema_decay", 0.5))
    for _ in range(3):
        parameter.grad.copy_(torch.randn(5))
        part.step()
    raw = parameter.detach().clone()
    with averaged_weights([part]):
        assert not torch.equal(parameter, raw)
    assert torch.equal(parameter, raw)


def test_steps_are_those_of_a_plain_loop(recipe):
    """Warm-up, a rate that falls to zero at the end, decay, an average: each as its formula says.

    Gradients start at zero in each step.
    """
    steps, rate, warm, decay, average = 8, 1e-2, 3, 0.1, 0.6
    flags = ("--lr_scheduler", "linear", "--lr_warmup_steps", warm, "--use_ema", "--ema_decay", average)
    args = arguments(recipe, *flags, "--adam_beta1", 0.8, "--adam_beta2", 0.95)
    torch.manual_seed(0)
    start = torch.randn(7)
    part = TrainedPart("denoiser", {"x": torch.nn.Parameter(start.clone())}, rate, decay, steps)
    prepare_parts([part], args)
    weights, shown = start.double(), start.double()
    m = v = torch.zeros(7, dtype=torch.float64)
    for t in range(1, steps + 1):
        gradient = torch.randn(7)
        next(iter(part.parameters.values())).grad.add_(gradient)
        part.step()
        now = rate * min((t - 1) / warm, (steps - t + 1) / (steps - warm))
        assert part.current_lr == pytest.approx(now)
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient.double() ** 2
        weights = weights * (1 - now * decay)
        weights = weights - now * (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + args.adam_epsilon)
        inertia = min(average, t / (9 + t)) if t > 1 else 0.0  # https://arxiv.org/abs/1806.04498, warmed up
        shown = inertia * shown + (1 - inertia) * weights
        assert torch.allclose(part.weights.detach().double(), weights, atol=1e-5)
    with averaged_weights([part]):
        assert torch.allclose(part.weights.detach().double(), shown, atol=1e-3)
        assert not torch.allclose(shown, weights, atol=1e-3)


def test_all_parts_are_clipped_by_one_norm():
    sizes = {"a": 9, "b": 16}
    parts = [TrainedPart(n, {"x": torch.nn.Parameter(torch.ones(k))}, 1.0, 0.0, 5) for n, k in sizes.items()]
    for part in parts:
        part.allocate()
        part.gradients.fill_(2.0)
    guard, alone = NonFiniteGuard("cpu", half=False), SimpleNamespace(num_processes=1)
    assert guard.apply(parts, alone, 1.0).item() == pytest.approx(2 * math.sqrt(25))
    assert all(torch.allclose(part.gradients, torch.tensor(0.2)) for part in parts)
    guard.apply(parts, alone, 100.0)
    assert torch.allclose(parts[0].gradients, torch.full((9,), 0.2))  # what is small enough is left alone


def test_half_precision_part():
    """The modules see a bfloat16 shadow; weights and gradients are float32; micro-batches add up."""
    model, part = with_lora(Attention(), torch.bfloat16)
    assert part.weights.dtype == part.gradients.dtype == torch.float32 and part.shadow.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 and p.grad.dtype == torch.bfloat16 for p in part.parameters.values())
    part.weights.data.add_(1.0)
    part.update_shadow()
    assert torch.equal(
        model.to_q.lora_A["default"].weight, part.views(part.weights)["to_q.lora_A.default.weight"].bfloat16()
    )
    sums = torch.zeros_like(part.gradients)
    for seed in range(3):
        torch.manual_seed(seed)
        model(torch.randn(2, 5, 16, dtype=torch.bfloat16)).float().square().mean().backward()
        sums += part.micro_gradients
        part.accumulate_gradients()
        assert not part.micro_gradients.any()
    assert torch.equal(part.gradients, sums) and sums.any()


def test_averaged_and_state():
    model, part = with_lora(Attention(), torch.bfloat16)
    part.ema = SimpleNamespace(copy_to=lambda ps: [p.data.fill_(0.5) for p in ps])
    before = part.weights.detach().clone()
    with averaged_weights([part]):
        assert part.shadow.eq(0.5).all()
    assert torch.equal(part.weights, before) and torch.equal(part.shadow, before.bfloat16())


def test_guard():
    model, part = with_lora(Attention())
    guard = NonFiniteGuard("cpu", half=False)
    alone = SimpleNamespace(num_processes=1)
    part.gradients.fill_(1.0)
    norm = guard.apply([part], alone, 0.5)
    torch.testing.assert_close(norm, torch.tensor(part.gradients.numel() ** 0.5))
    torch.testing.assert_close(torch.linalg.vector_norm(part.gradients), torch.tensor(0.5), rtol=1e-4, atol=0)
    for bad in (float("nan"), float("inf")):
        for clip in (0.0, 1.0):
            part.gradients.fill_(1.0)[3] = bad
            guard.apply([part, part], alone, clip)
            assert not part.gradients.any()
    assert guard.bad_total == guard.bad_run == 4
    part.gradients.fill_(1.0)
    guard.apply([part], alone, 0.0)
    assert guard.bad_run == 0 and part.gradients.eq(1).all()
