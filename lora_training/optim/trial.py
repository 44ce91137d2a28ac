"""Tries an optimizer on a few numbers, before anything is loaded."""

from __future__ import annotations

import argparse
import io
import pickle

import torch

from lora_training.errors import UserError, one_line
from lora_training.optim.optimizers import find_class, make_optimizer
from lora_training.optim.parts import TrainedPart, arguments_of, averages_by_itself

LINEAR_SHAPES = {"lora_A": (4, 1024), "lora_B": (1024, 4)}
DORA_SHAPES = {"lora_magnitude_vector": (1024,)}
MOST_STEPS = 12  # some optimizers only watch at first
CONVOLUTION_SHAPES = {"lora_A": (4, 64, 3, 3), "lora_B": (64, 4, 1, 1)}


def try_optimizer(args: argparse.Namespace, device: torch.device, convolutions: bool = False) -> None:
    """Trains weights of a LoRA's shapes for a few steps with --optimizer, and keeps its state, as a run does.

    convolutions: some of the layers are such. Errors: UserError that names the argument or what is missing.
    """
    name = f"--optimizer {args.optimizer}"
    try:
        optimizer_class = find_class(args.optimizer)
        check_arguments(optimizer_class, args)
        if "." not in args.optimizer and not args.optimizer_args:
            return  # it is known, and its library is there
        for shapes in (LINEAR_SHAPES, CONVOLUTION_SHAPES) if convolutions else (LINEAR_SHAPES,):
            part = trial_part(shapes | (DORA_SHAPES if args.use_dora else {}), device)
            if any(args.patterns["lr_pattern"].values):  # layers of several rates
                part.rate_factors = dict.fromkeys(list(part.parameters)[1:], 0.5)
            take_steps(part, args)
    except UserError:
        raise
    except Exception as error:  # of any library
        given = [f"{key}={value}" for key, value in args.optimizer_args.items()]
        arguments = " ".join(["", "--optimizer_args", *given]) if given else ""
        reason = one_line(error) or type(error).__name__
        layers = ", on layers that are convolutions (--lora_layers)" if convolutions else ""
        raise UserError(f"{name}{arguments} can't train here{layers}: {reason}") from None


def try_steps(args: argparse.Namespace, device: torch.device) -> None:
    """Tries the optimizer without --optimizer_args. Errors: whatever it raises where it can't work."""
    without = argparse.Namespace(**vars(args) | {"optimizer_args": {}})
    take_steps(trial_part(LINEAR_SHAPES, device), without)


def check_arguments(optimizer_class: type, args: argparse.Namespace) -> None:
    """Errors: UserError for --optimizer_args and --adam_weight_decay that the class doesn't take."""
    known = arguments_of(optimizer_class)
    taken = [argument for argument in known if argument not in ("params", "args", "kwargs", "self")]
    for key in args.optimizer_args:
        if key not in taken and "kwargs" not in known:
            what = f"{args.optimizer} has no such argument; it takes {', '.join(taken)}"
            raise UserError(f"--optimizer_args {key}: {what}")
    decay = "adam_weight_decay"
    if "weight_decay" not in known and vars(args)[decay] not in (0, args.defaults[decay]):
        raise UserError(f"--{decay} has no effect with --optimizer {args.optimizer}, which decays no weights")


def trial_part(shapes: dict[str, tuple[int, ...]], device: torch.device) -> TrainedPart:
    """A part with weights of these shapes; as in a LoRA, the B matrix is zero."""
    parameters = {}
    for name, shape in shapes.items():
        values = torch.linspace(-0.1, 0.1, torch.Size(shape).numel(), device=device).view(shape)
        parameters[f"x.{name}.default.weight"] = torch.nn.Parameter(values * (name != "lora_B"))
    part = TrainedPart("trial", parameters, 1e-3, 0.0, 2)
    part.allocate()
    return part


def take_steps(part: TrainedPart, args: argparse.Namespace) -> None:
    """Some steps, the weights for use, a checkpoint. Errors: ValueError, and what the optimizer raises."""
    part.optimizer, before = make_optimizer(part, args), part.weights.detach().clone()
    for step in range(MOST_STEPS):
        part.gradients.copy_(torch.linspace(-1, 1, len(before), device=before.device))
        part.optimizer.step()
        part.attach_gradients()
        changed = not torch.equal(part.weights.detach(), before)
        if changed and step > 0:
            break
    if not changed:
        raise ValueError("its steps don't change the weights")
    if not part.weights.isfinite().all():
        raise ValueError("its steps make weights that aren't finite")
    if averages_by_itself(part.optimizer):
        if args.use_ema:
            raise ValueError("it averages by itself: leave out --use_ema")
        part.optimizer.eval()
        part.optimizer.train()
    file = io.BytesIO()
    torch.save(part.optimizer.state_dict(), file)
    file.seek(0)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("its state holds more than tensors and numbers, which no checkpoint keeps") from None
    make_optimizer(part, args).load_state_dict(state)
