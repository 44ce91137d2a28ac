"""--resume_anyway with other arguments of the optimizer: they take effect, or can't, which is said."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from conftest import QUICKEST, SAMPLE, run_here
from toy_parts import arguments

from lora_training.errors import UserError
from lora_training.optim.optimizers import prepare_parts
from lora_training.optim.parts import TrainedPart

pytestmark = pytest.mark.resume


def make_part(recipe, optimizer: str, *given: str) -> TrainedPart:
    """A part with its optimizer; given: --optimizer_args."""
    generator = torch.Generator().manual_seed(0)
    part = TrainedPart("denoiser", {"x": torch.nn.Parameter(torch.randn(5, 4, generator=generator))}, 1, 0, 9)
    flags = ("--optimizer_args", *given) if given else ()
    prepare_parts([part], arguments(recipe, "--optimizer", optimizer, *flags))
    return part


def take_step(part: TrainedPart) -> None:
    part.gradients.copy_(torch.linspace(-1, 2, 20))
    part.step()


def saved_after_steps(recipe, optimizer: str, *given: str) -> dict:
    """What a checkpoint has of a part after three steps."""
    part = make_part(recipe, optimizer, *given)
    for _ in range(3):
        take_step(part)
    states = {"optimizer": part.optimizer.state_dict(), "schedule": part.schedule.state_dict(), "ema": None}
    return {"weights": part.weights.detach().clone(), "initial": part.initial, **states}


TAKEN = [
    ("prodigy", ("d_coef=1.0",), ("d_coef=2.0",)),
    ("prodigy", (), ("growth_rate=1.02",)),
    ("adafactor", ("clip_threshold=1.0",), ("clip_threshold=0.1",)),
    ("adamw", (), ("maximize=True",)),
    ("torch.optim.SGD", ("momentum=0.9",), ("momentum=0.1", "nesterov=True")),
    ("torch.optim.Muon", (), ("ns_steps=2", "nesterov=False")),
    ("schedulefree", (), ("r=2.0", "weight_lr_power=1.0")),
    ("torch.optim.Adafactor", (), ("d=3.0",)),
]


@pytest.mark.parametrize(("name", "before", "after"), TAKEN)
def test_changed_arguments_are_used(recipe, name, before, after):
    """A step later the weights are those of an optimizer that has the state, and the arguments of now."""
    saved = saved_after_steps(recipe, name, *before)
    part, alone = make_part(recipe, name, *after), make_part(recipe, name, *after)
    own = dict(arguments(recipe, "--optimizer", name, "--optimizer_args", *after).optimizer_args)
    part.load_state_dict(copy.deepcopy(saved), 0.0)
    assert torch.equal(part.weights, saved["weights"]) and not part.gradients.any()
    assert all(part.optimizer_settings()[key] == value for key, value in own.items())
    alone.assign(saved["weights"])
    alone.optimizer.load_state_dict(saved["optimizer"])
    alone.schedule.load_state_dict(saved["schedule"])
    alone.optimizer.param_groups[0].update(own)
    for each in (part, alone):
        take_step(each)
    assert torch.equal(part.weights, alone.weights)


REFUSED = [
    ("adamw", (), ("amsgrad=True",), "max_exp_avg_sq"),
    ("prodigy", (), ("slice_p=3",), "doesn't fit"),
    ("prodigy", (), ("d0=1e-4",), "d0 can't change any more"),
    ("torch.optim.RMSprop", (), ("centered=True",), "grad_avg"),
]


@pytest.mark.parametrize(("name", "before", "after", "reason"), REFUSED)
def test_arguments_that_need_another_state_are_refused(recipe, name, before, after, reason):
    saved = saved_after_steps(recipe, name, *before)
    with pytest.raises(UserError, match="set --optimizer_args .* as they were") as refusal:
        make_part(recipe, name, *after).load_state_dict(saved, 0.0)
    assert reason in str(refusal.value)


def test_a_run_goes_on_with_its_new_arguments_and_names_what_cannot_change(tmp_path, capsys):
    flags = ("-d", SAMPLE, "--optimizer", "prodigy", "--checkpointing_steps", 2)
    assert run_here(QUICKEST, tmp_path / "a", *flags, "--max_train_steps", 2) == 0
    for file in (tmp_path / "a").glob("*.safetensors"):
        file.unlink()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    flags += ("--max_train_steps", 4, "--resume_from_checkpoint", "latest", "--resume_anyway")
    assert run_here(QUICKEST, tmp_path / "a", *flags, "--optimizer_args", "d_coef=7.0") == 0
    assert "changed since checkpoint-2: optimizer_args" in capsys.readouterr().out
    state = torch.load(tmp_path / "a" / "checkpoint-4" / "training_state.pt", weights_only=True)
    assert state["parts"]["denoiser"]["optimizer"]["param_groups"][0]["d_coef"] == 7
    assert run_here(QUICKEST, tmp_path / "b", *flags, "--optimizer_args", "slice_p=3") == 2
    assert "checkpoint-2: its optimizer's state doesn't fit" in capsys.readouterr().err
