"""--lr_pattern: each layer's weights move as with a learning rate of their own."""

from __future__ import annotations

import pytest
import torch
from small_models import LAYERS, Attention, close, exact, groups, with_lora
from toy_parts import arguments

from lora_training.memory.lora_products import fuse_lora
from lora_training.optim.optimizers import make_optimizer, prepare_parts
from lora_training.optim.parts import TrainedPart

pytestmark = pytest.mark.unit

FACTORS = {"to_q": 0.5, "to_v": 3.0}
CASES = (  # with LoRA+, where the optimizer takes it
    *(("adamw", 1), ("adamw", 4), ("adafactor", 1), ("schedulefree", 1)),
    *(("torch.optim.RMSprop", 1), ("torch.optim.RMSprop", 4), ("muon", 1)),
)


def lora_part(recipe, *flags: object) -> TrainedPart:
    """The part of an attention's LoRA, with its optimizer."""
    _, trained = with_lora(Attention(), fused=False)
    part = TrainedPart("denoiser", trained, 1e-2, 0.1, 10)
    prepare_parts([part], arguments(recipe, "--learning_rate", "1e-2", *flags))
    return part


def move(part: TrainedPart, name: str, steps: int = 3) -> torch.Tensor:
    """Takes steps with gradients that are the same for every part; a parameter's weights after them."""
    for step in range(steps):
        for key, view in part.views(part.gradients).items():
            generator = torch.Generator().manual_seed(len(key) + step)
            view.copy_(torch.randn(view.shape, generator=generator))
        part.step()
    return part.views(part.weights.detach())[name]


@pytest.mark.parametrize(("optimizer", "ratio"), CASES)
def test_each_layer_moves_as_with_a_rate_of_its_own(recipe, optimizer, ratio):
    """Flat or in shapes, with LoRA+ or without; a layer that no pattern matches moves as without the flag."""
    pattern = " ".join(f"{layer}={factor}" for layer, factor in FACTORS.items())
    flags = ("--optimizer", optimizer, "--loraplus_lr_ratio", ratio)
    for layer in ("to_q", "to_v", "to_k", "to_out.0"):
        for matrix in ("lora_A", "lora_B"):
            name = f"{layer}.{matrix}.default.weight"
            torch.manual_seed(0)
            part = lora_part(recipe, *flags, "--lr_pattern", pattern)
            torch.manual_seed(0)
            alone = lora_part(recipe, *flags)
            alone.learning_rate *= FACTORS.get(layer, 1)
            alone.optimizer = make_optimizer(alone, arguments(recipe, *flags))
            for group in alone.optimizer.param_groups:
                group["initial_lr"] = group["lr"]
            alone.schedule = torch.optim.lr_scheduler.LambdaLR(alone.optimizer, lambda step: 1.0)
            assert torch.allclose(move(part, name), move(alone, name), atol=1e-6), name


def test_the_rate_shown_is_that_of_most_layers(recipe):
    part = lora_part(recipe, "--lr_pattern", "to_q=0.5")
    move(part, "to_q.lora_A.default.weight", 1)
    assert part.current_lr == pytest.approx(1e-2)


def test_one_rate_is_one_operation_and_two_are_two(recipe):
    """Two ranges: neighbours of one rate stay together."""
    assert [len(group["params"]) for group in lora_part(recipe).optimizer.param_groups] == [1]
    part = lora_part(recipe, "--lr_pattern", "to_q=0.5 to_k=0.5")
    assert [len(group["params"]) for group in part.optimizer.param_groups] == [1, 1]
    part = lora_part(recipe, "--lr_pattern", "to_[qkv]=0.5 to_out=0.5")  # all of them: no range at all
    assert len(part.optimizer.param_groups) == 1 and part.optimizer.param_groups[0]["lr"] == 5e-3


@pytest.mark.parametrize("rates", [{}, {"to_q": 0.5}])
def test_products_of_layers_of_several_ranks_and_rates_equal_pefts(rates):
    """q, k and v of several ranks are one group while one rate holds them together in memory."""
    patterns = {"rank_pattern": {"to_k": 2, "to_v": 7}, "alpha_pattern": {"to_k": 3, "to_v": 10.5}}
    both = exact(Attention(), LAYERS, **patterns)
    assert groups(both[2]) == [3, 1]
    plain, trained, fused, _ = both
    part = TrainedPart(
        "denoiser", {n: p for n, p in fused.named_parameters() if p.requires_grad}, 1e-3, 0.0, 9
    )
    part.rate_factors = {n: rates.get(n.split(".")[0], 1.0) for n in part.parameters}
    for module in fused.modules():
        vars(module).pop("forward", None)
    start = {n: p.detach().clone() for n, p in part.parameters.items()}
    part.allocate(torch.float64)
    for name, view in part.views(part.shadow).items():
        view.copy_(start[name])
    fuse_lora(fused)
    assert groups(fused) == ([1, 1, 1, 1] if rates else [3, 1])
    close(plain, trained, fused, part, torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True))


def test_layers_of_several_scales_are_computed_apart():
    both = exact(Attention(), LAYERS, alpha_pattern={"to_k": 3})
    assert groups(both[2]) == [1, 1, 1, 1]
    close(*both, torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True))
