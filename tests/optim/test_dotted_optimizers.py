"""Optimizers by dotted name: in the weights' shapes, in their modes, and tried before the base is loaded."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import QUICKEST, SAMPLE, SD15, metrics, run_here, same_weights
from toy_parts import arguments

from lora_training.errors import UserError
from lora_training.optim.optimizers import find_class, needs_shapes, prepare_parts
from lora_training.optim.parts import TrainedPart, averaged_weights
from lora_training.optim.trial import try_optimizer

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")
SHAPED = {
    "torch.optim.Muon": True,
    "torch.optim.Adafactor": True,
    "transformers.optimization.Adafactor": True,
    "bitsandbytes.optim.LAMB8bit": True,
    "bitsandbytes.optim.LARS": True,
    "odd_optimizers.Layerwise": True,
    "odd_optimizers.Watching": True,
    "torch.optim.RAdam": False,
    "schedulefree.SGDScheduleFree": False,
    "bitsandbytes.optim.Lion8bit": False,
    "prodigyopt.Prodigy": False,
    **dict.fromkeys(("adamw", "adamw8bit", "prodigy", "schedulefree"), False),
    "adafactor": True,
}


@pytest.mark.parametrize("name", SHAPED)
def test_only_what_is_known_to_look_at_single_weights_gets_flat_ones(name):
    assert needs_shapes(find_class(name)) is SHAPED[name]


def make_part(recipe, name: str, *flags, shapes=((2, 6), (5, 2)), part_name="denoiser") -> TrainedPart:
    """A part of one LoRA layer with its optimizer."""
    generator = torch.Generator().manual_seed(0)
    names = ("x.lora_A.default.weight", "x.lora_B.default.weight")
    pairs = zip(names, shapes, strict=True)
    parameters = {key: torch.nn.Parameter(torch.randn(s, generator=generator)) for key, s in pairs}
    part = TrainedPart(part_name, parameters, 1e-2, 0.0, 10)
    prepare_parts([part], arguments(recipe, "--optimizer", name, *flags))
    return part


@pytest.mark.parametrize("name", ["torch.optim.Muon", "torch.optim.Adafactor"])
def test_steps_are_those_on_the_matrices_themselves(recipe, name):
    part = make_part(recipe, name)
    matrices = [torch.nn.Parameter(p.detach().clone()) for p in part.parameters.values()]
    alone = find_class(name)(matrices, lr=1e-2, weight_decay=0.0)
    for seed in range(3):
        torch.manual_seed(seed)
        for matrix, gradient in zip(matrices, part.views(part.gradients).values(), strict=True):
            matrix.grad = torch.randn_like(matrix)
            gradient.copy_(matrix.grad)
        alone.step()
        part.step()
    for matrix, view in zip(matrices, part.views(part.weights.detach()).values(), strict=True):
        torch.testing.assert_close(view, matrix.detach())


def test_gradients_that_an_optimizer_drops_are_there_again(recipe):
    part = make_part(recipe, "odd_optimizers.Layerwise", "--loraplus_lr_ratio", 2)
    assert [group["lr"] for group in part.optimizer.param_groups] == [1e-2, 2e-2]
    for _ in range(3):
        before = {key: view.clone() for key, view in part.views(part.weights.detach()).items()}
        part.gradients.fill_(1.0)
        part.step()
        for (key, view), rate in zip(part.views(part.weights.detach()).items(), (1e-2, 2e-2), strict=True):
            assert (view - before[key]).norm() / before[key].norm() == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("name", ["odd_optimizers.Averaging", "schedulefree.SGDScheduleFree"])
def test_what_averages_is_shown_and_frozen_at_its_average(recipe, name):
    part = make_part(recipe, name)
    for step in range(4):
        part.gradients.fill_(1.0 + step)
        part.step()
    trained = part.weights.detach().clone()
    with averaged_weights([part]):
        shown = part.weights.detach().clone()
    assert torch.equal(part.weights, trained) and not torch.allclose(shown, trained)
    part.step()  # in training mode again
    optimizer = copy.copy(part.optimizer)
    part.freeze()
    frozen = part.weights.detach().clone()
    optimizer.train()
    assert not torch.equal(part.weights.detach(), frozen)


@pytest.mark.parametrize("name", ["odd_optimizers.Averaging", "schedulefree.SGDScheduleFree"])
def test_new_tokens_other_weights_are_scaled_with_them(recipe, name):
    part = make_part(recipe, name, shapes=((3, 8), (2, 8)), part_name="embeddings")
    stds = [view.std() for view in part.views(part.weights.detach()).values()]
    for _ in range(60):
        part.gradients.copy_(torch.linspace(-9, 9, 40))
        part.step()
    with averaged_weights([part]):
        for std, view in zip(stds, part.views(part.weights.detach()).values(), strict=True):
            assert view.std() == pytest.approx(float(std), rel=0.4)


def test_a_number_that_clips_is_no_step_size(recipe):
    assert make_part(recipe, "torch.optim.Adafactor").step_size_estimate() is None
    assert make_part(recipe, "torch.optim.SGD").step_size_estimate() is None
    for name in ("prodigy", "prodigyopt.Prodigy"):
        assert float(make_part(recipe, name).step_size_estimate()) == pytest.approx(1e-6)


REFUSED = {
    "odd_optimizers.Idle": "don't change the weights",
    "odd_optimizers.Unsaved": "no checkpoint keeps",
    "torch.optim.LBFGS": "closure",
    "torch.optim.SparseAdam": "does not support dense gradients",
    "torch.nn.Linear": "no class of an optimizer",
    "builtins.print": "no class of an optimizer",
    ".": "--optimizer .",
    "nowhere.Adam": "No module named 'nowhere'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_before_the_base_is_loaded(tmp_path, capsys, name):
    """The base is nowhere: nothing has looked for it."""
    flags = ("-d", SAMPLE, "-m", tmp_path / "nowhere", "--optimizer", name)
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 2
    message = capsys.readouterr().err
    assert REFUSED[name] in message and f"--optimizer {name} can't train here" in message


def test_an_optimizer_may_watch_the_first_steps(recipe):
    try_optimizer(arguments(recipe, "--optimizer", "odd_optimizers.Watching"), CPU)
    try_optimizer(arguments(recipe, "--optimizer", "schedulefree.RAdamScheduleFree"), CPU)


def test_a_decay_that_a_class_has_not(recipe):
    args = arguments(recipe, "--optimizer", "odd_optimizers.Undecayed")
    try_optimizer(args, CPU)
    args = arguments(recipe, "--optimizer", "torch.optim.Rprop", "--adam_weight_decay", 0.3)
    with pytest.raises(
        UserError, match="--adam_weight_decay has no effect with --optimizer torch.optim.Rprop"
    ):
        try_optimizer(args, CPU)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--optimizer", "torch.optim.Muon", "--lora_layers", "conv1"), "convolutions"),
        (("--optimizer", "torch.optim.Muon", "--lora_layers", "to_q", "--use_dora"), "2D"),
        (
            ("--optimizer", "odd_optimizers.Layerwise", "--lora_layers", "conv1", "--optimizer_args")
            + ("most_dimensions=2",),
            "a parameter has 4 dimensions",
        ),
    ],
)
def test_shapes_that_an_optimizer_refuses_are_known_before_the_denoiser_is_loaded(
    tmp_path, capsys, monkeypatch, flags, reason
):
    from lora_training.base_model.components import Components

    monkeypatch.setattr(Components, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert run_here(SD15, tmp_path / "x", "-d", SAMPLE, *flags) == 2
    assert reason in capsys.readouterr().err


RUNS = {
    "muon": ("--optimizer", "torch.optim.Muon", "--learning_rate", 1e-2),
    "adafactor": ("--optimizer", "torch.optim.Adafactor"),
    "averaging": ("--optimizer", "odd_optimizers.Averaging"),
    "schedule-free": ("--optimizer", "schedulefree.RAdamScheduleFree"),
    "prodigy": ("--optimizer", "prodigyopt.Prodigy", "--learning_rate", 1),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_run_goes_on_where_it_was_broken_off(tmp_path, case):
    import shutil

    flags = ("-d", SAMPLE, *RUNS[case], "--max_train_steps", 10, "--checkpointing_steps", 8)
    whole, broken = tmp_path / "a" / "x", tmp_path / "b" / "x"
    assert run_here(QUICKEST, whole, *flags) == 0
    shutil.copytree(whole, broken)
    for file in broken.glob("*.safetensors"):
        file.unlink()
    assert run_here(QUICKEST, broken, *flags, "--resume_from_checkpoint", "latest") == 0
    assert same_weights(whole, broken)
    rows = [row for row in metrics(whole) if "lr_denoiser" in row]
    assert len(rows) == 10


def test_no_average_on_top_of_another_class_that_averages(recipe):
    args = arguments(recipe, "--optimizer", "odd_optimizers.Averaging", "--use_ema")
    with pytest.raises(UserError, match="odd_optimizers.Averaging can't train here: it averages by itself"):
        try_optimizer(args, CPU)


@pytest.mark.parametrize("name", ["schedulefree.AdamWScheduleFree", "schedulefree.SGDScheduleFree"])
def test_no_schedule_and_no_average_on_top_of_a_schedule_free_class(recipe, name):
    for flags in (("--lr_scheduler", "cosine"), ("--use_ema",)):
        with pytest.raises(UserError, match=f"--optimizer {name} averages by itself"):
            arguments(recipe, "--optimizer", name, *flags)
