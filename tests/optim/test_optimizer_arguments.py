"""--optimizer_args win over what the script says itself, and each works or is refused by name."""

from __future__ import annotations

import pytest
import torch
from conftest import QUICKEST, SAMPLE, metrics, run_here
from toy_parts import arguments

from lora_training.errors import UserError
from lora_training.optim.nonblocking import nonblocking_prodigy
from lora_training.optim.optimizers import make_optimizer, prepare_parts
from lora_training.optim.parts import TrainedPart
from lora_training.optim.trial import try_optimizer

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


def lora_part(name: str = "denoiser") -> TrainedPart:
    """A part with a LoRA of one layer."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x.lora_A.default.weight": (2, 6), "x.lora_B.default.weight": (5, 2)}
    parameters = {key: torch.nn.Parameter(torch.randn(s, generator=generator)) for key, s in shapes.items()}
    part = TrainedPart(name, parameters, 1e-3, 0.01, 10)
    part.allocate()
    return part


WINNERS = {  # optimizer: what is given, and what the script says itself
    "prodigy": (
        *("decouple=False", "use_bias_correction=False", "safeguard_warmup=False", "beta3=0.7"),
        *("betas=(0.5,0.6)", "eps=1e-5", "weight_decay=0.3", "lr=0.5"),
    ),
    "adafactor": ("scale_parameter=True", "weight_decay=0.2", "lr=0.004"),
    "schedulefree": ("warmup_steps=7", "betas=(0.8,0.9)"),
    "adamw": ("fused=True", "betas=(0.8,0.9)", "eps=1e-7"),
    "adamw8bit": ("betas=(0.8,0.9)", "eps=1e-7", "lr=0.02"),
}


@pytest.mark.parametrize("name", WINNERS)
def test_arguments_that_the_script_passes_itself_win(recipe, name):
    args = arguments(recipe, "--optimizer", name, "--optimizer_args", *WINNERS[name])
    try_optimizer(args, CPU)
    group = make_optimizer(lora_part(), args).param_groups[0]
    assert all(group[key] == value for key, value in args.optimizer_args.items())


def test_b_matrices_rate_is_a_multiple_of_the_given_one(recipe):
    flags = ("--loraplus_lr_ratio", 4, "--optimizer_args", "lr=0.02")
    part = lora_part()
    groups = make_optimizer(part, arguments(recipe, *flags)).param_groups
    assert [group["lr"] for group in groups] == [0.02, 0.08] and part.learning_rate == 0.02


@pytest.mark.parametrize("slow", [False, True])
def test_adafactors_relative_steps_are_its_own_and_logged(recipe, slow):
    given = ("relative_step=True", f"warmup_init={slow}")
    part = lora_part()
    prepare_parts([part], arguments(recipe, "--optimizer", "adafactor", "--optimizer_args", *given))
    rates, expected = [], []
    for _ in range(3):
        part.gradients.copy_(torch.randn(len(part.gradients)))
        part.step()
        rates.append(part.current_lr)
        group, state = part.optimizer.param_groups[0], part.optimizer.state[part.pieces[0][0]]
        expected.append(part.optimizer._get_lr(group, state))
    assert rates == pytest.approx(expected) and rates[0] == pytest.approx(1e-6 if slow else 1e-2)


def test_a_rate_beside_adafactors_own_has_no_effect(recipe):
    own = ("--optimizer", "adafactor", "--optimizer_args", "relative_step=True")
    for flags in (("--learning_rate", 1e-3), ("--lr_scheduler", "cosine")):
        with pytest.raises(UserError, match=f"{flags[0]} has no effect with --optimizer_args relative_step"):
            arguments(recipe, *own, *flags)


REFUSED = {  # what is said
    ("prodigy", "fsdp_in_use=True"): "fsdp_in_use: leave it out",
    ("prodigy", "slice_p=0"): "slice_p is a whole number from 1 on",
    ("prodigy", "slice_p=2.5"): "slice_p is a whole number from 1 on",
    ("prodigy", "growth_rat=2"): "--optimizer_args growth_rat: prodigy has no such argument; it takes lr",
    ("adamw", "relative_step=True"): "adamw has no such argument; it takes lr, betas",
    ("adafactor", "warmup_init=True"): "requires `relative_step=True`",
    ("adamw8bit", "amsgrad=True"): "does not support amsgrad",
    ("adamw", "lr=0"): "don't change the weights",
    ("schedulefree", "params=[1]"): "--optimizer_args params: what is trained",
}


@pytest.mark.parametrize(("name", "argument"), REFUSED, ids=" ".join)
def test_arguments_that_cannot_work_are_refused_by_name(recipe, name, argument):
    with pytest.raises(UserError) as refusal:
        try_optimizer(arguments(recipe, "--optimizer", name, "--optimizer_args", argument), CPU)
    assert REFUSED[name, argument] in str(refusal.value)


PRODIGY = {
    "grows by a tenth": {"growth_rate": 1.1},
    "grows by two": {"growth_rate": 2.0, "d_coef": 0.5, "use_bias_correction": True},
    "every third weight": {"slice_p": 3, "safeguard_warmup": True},
    "both": {"slice_p": 11, "growth_rate": 1.5, "decouple": False},
    "no momentum": {"betas": (0.0, 0.9), "beta3": 0.8, "d0": 1e-4},
}


@pytest.mark.parametrize("case", PRODIGY)
def test_every_argument_of_prodigy_does_what_the_librarys_does(case):
    from prodigyopt import Prodigy

    results = []
    for optimizer_class in (nonblocking_prodigy(Prodigy), Prodigy):
        generator = torch.Generator().manual_seed(1)
        weights = torch.nn.Parameter(torch.randn(64, generator=generator))
        optimizer, estimates = optimizer_class([weights], lr=1.0, weight_decay=0.02, **PRODIGY[case]), []
        for _ in range(40):
            weights.grad = weights.detach() - torch.randn(64, generator=generator) * 0.1
            optimizer.step()
            estimates.append(float(optimizer.param_groups[0]["d"]))
        results.append((weights.detach(), torch.tensor(estimates)))
    (weights, estimates), (library_weights, library_estimates) = results
    assert library_estimates[-1] > 1.5 * library_estimates[0]
    torch.testing.assert_close(estimates, library_estimates, rtol=1e-3, atol=0)
    torch.testing.assert_close(weights, library_weights, rtol=1e-3, atol=1e-5)


def test_a_slow_estimate_goes_on_after_a_resume(recipe):
    """d_max, up to which a bounded d grows, is part of a checkpoint."""
    args = arguments(recipe, "--optimizer", "prodigy", "--optimizer_args", "lr=1", "growth_rate=2")
    ends = []
    for broken in (False, True):
        part, generator = lora_part(), torch.Generator().manual_seed(2)
        prepare_parts([part], args)
        for step in range(40):
            if broken and step == 20:
                state, weights = part.optimizer.state_dict(), part.weights.detach().clone()
                part = lora_part()
                prepare_parts([part], args)
                part.assign(weights)
                part.optimizer.load_state_dict(state)
            part.gradients.copy_(part.weights.detach() + 0.1 * torch.randn(22, generator=generator))
            part.optimizer.step()
        ends.append((part.weights.detach().clone(), float(part.step_size_estimate())))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]
    assert ends[0][1] > 1e-5


def test_prodigy_logs_a_number_before_its_first_step(tmp_path):
    """A warm-up begins at a rate of zero, where Prodigy has nothing found yet."""
    flags = ("--optimizer", "prodigy", "--learning_rate", 1, "--lr_warmup_steps", 2)
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, *flags) == 0
    rates = [row["lr_denoiser"] for row in metrics(tmp_path / "x") if "loss" in row]
    assert rates[0] == 0 and 0 < rates[1] < rates[2]
