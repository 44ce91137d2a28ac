"""Optimizers by name, with schedule and moving average."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import math
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.reading import import_class
from lora_training.errors import UserError, one_line
from lora_training.optim.nonblocking import batched_muon, nonblocking_8bit, nonblocking_prodigy
from lora_training.optim.parts import arguments_of, averages_by_itself

if TYPE_CHECKING:
    from lora_training.optim.parts import TrainedPart

# libraries whose optimizers treat each weight by itself, and those of their classes that don't
ELEMENTWISE_LIBRARIES = {"torch", "schedulefree", "bitsandbytes", "prodigyopt", "lora_training", "builtins"}
SHAPED_CLASSES = {"Adafactor", "Muon", "LAMB", "LARS", "PytorchLARS"}
LARGEST_RELATIVE_RATE = 1e-2  # of Adafactor with relative_step=True, which has no learning rate
ADAM_LIKE = ("adamw", "adamw8bit", "ademamix8bit", "prodigy", "schedulefree")
EIGHT_BIT_CLASSES = {"adamw8bit": "AdamW8bit", "lion8bit": "Lion8bit", "ademamix8bit": "AdEMAMix8bit"}
SLOW_BETA = 0.9999  # AdEMAMix's, https://arxiv.org/abs/2409.03137


def prepare_parts(parts: list[TrainedPart], args: argparse.Namespace, dtype=None) -> None:
    """Gives each part its buffers, optimizer, schedule and moving average. dtype: the modules' precision."""
    from diffusers.training_utils import EMAModel

    for part in parts:
        exact = part.name == "embeddings" or args.use_dora  # DoRA's magnitudes would be rounded
        part.allocate(None if exact else dtype)
        try:
            part.optimizer = make_optimizer(part, args)
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"--optimizer {args.optimizer}: {one_line(error)}") from None
        part.schedule = make_schedule(part, args)
        if args.use_ema and part.name != "embeddings":
            part.ema = EMAModel([part.weights], decay=args.ema_decay)


def make_schedule(part: TrainedPart, args: argparse.Namespace):
    """The learning rate's schedule: the flags', or the one that Adafactor's relative_step=True makes."""
    from diffusers.optimization import get_scheduler

    if args.optimizer == "adafactor" and args.optimizer_args.get("relative_step"):
        slow = args.optimizer_args.get("warmup_init")
        part.optimizer.param_groups[0]["lr"] = 1.0

        def relative_rate(done: int) -> float:
            step = done + 1
            return min(1e-6 * step if slow else LARGEST_RELATIVE_RATE, 1 / math.sqrt(step))

        return torch.optim.lr_scheduler.LambdaLR(part.optimizer, relative_rate)
    return get_scheduler(
        args.lr_scheduler,
        part.optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=part.last_step,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )


def make_optimizer(part: TrainedPart, args: argparse.Namespace):
    """The optimizer of --optimizer for one part; --optimizer_args win over all other flags.

    Each part has its own, so that Prodigy finds a step size for each. New tokens are rows of a table, no
    matrix: beside Muon, AdamW trains them.

    Errors: ImportError, AttributeError, TypeError or ValueError for a class or arguments that there are not.
    """
    if args.optimizer == "muon" and part.name == "embeddings":
        args = argparse.Namespace(**vars(args) | {"optimizer": "adamw", "optimizer_args": {}})
    optimizer_class = find_class(args.optimizer)
    settings = flag_settings(optimizer_class, part, args) | args.optimizer_args
    part.learning_rate = LARGEST_RELATIVE_RATE if settings["lr"] is None else settings["lr"]
    shaped, as_matrices = needs_shapes(optimizer_class), args.optimizer in ("muon", "came")
    groups = parameter_groups(part, args.loraplus_lr_ratio, shaped, as_matrices)
    with contextlib.redirect_stdout(io.StringIO()):  # Prodigy prints how it decays weights
        optimizer = optimizer_class(groups, **settings)
    if averages_by_itself(optimizer):
        optimizer.train()
    return optimizer


def find_class(name: str) -> type:
    """The class that --optimizer names. Errors: ImportError, AttributeError, TypeError or ValueError."""
    if "." in name:
        found = import_class(*name.rsplit(".", 1))
        if not (isinstance(found, type) and hasattr(found, "step")):
            raise TypeError("it is no class of an optimizer")
        return found
    if name in EIGHT_BIT_CLASSES:
        return nonblocking_8bit(import_class("bitsandbytes.optim", EIGHT_BIT_CLASSES[name]))
    if name == "prodigy":
        from prodigyopt import Prodigy

        return nonblocking_prodigy(Prodigy)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor
    if name == "schedulefree":
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree
    if name == "came":
        from pytorch_optimizer import CAME

        return with_named_arguments(CAME)
    return batched_muon(torch.optim.Muon) if name == "muon" else torch.optim.AdamW


def with_named_arguments(base: type) -> type:
    """A class that takes only arguments that it names: a misspelt one would vanish in its **kwargs."""
    signature = inspect.signature(base)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return type(base.__name__, (base,), {"__signature__": signature.replace(parameters=named)})


def flag_settings(optimizer_class: type, part: TrainedPart, args: argparse.Namespace) -> dict:
    """What the flags say to an optimizer, as arguments of its class."""
    name, settings = args.optimizer, {"lr": part.learning_rate}
    if "weight_decay" in arguments_of(optimizer_class):
        settings["weight_decay"] = part.weight_decay
    if name in ADAM_LIKE:
        settings |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if name == "ademamix8bit":
        settings["betas"] += (SLOW_BETA,)
    elif name == "muon":  # steps as large as AdamW's, so that its rate and decay fit
        settings["adjust_lr_fn"] = "match_rms_adamw"
    elif name == "adamw":  # fused excludes these two
        other = args.optimizer_args.get("foreach") or args.optimizer_args.get("differentiable")
        settings["fused"] = part.weights.is_cuda and not other
    elif name == "prodigy":
        flags = ("decouple", "use_bias_correction", "safeguard_warmup")
        settings |= {flag: vars(args)[f"prodigy_{flag}"] for flag in flags} | {"beta3": args.prodigy_beta3}
    elif name == "schedulefree":
        settings["warmup_steps"] = args.lr_warmup_steps
    elif name == "adafactor":
        settings |= {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        if args.optimizer_args.get("relative_step"):
            settings["lr"] = None
    return settings


def needs_shapes(optimizer_class: type) -> bool:
    """Whether an optimizer may look at the weights of a layer together: any but those known not to."""
    bases = optimizer_class.__mro__
    libraries = {base.__module__.partition(".")[0] for base in bases}
    names = {base.__name__.removesuffix("8bit").removesuffix("32bit") for base in bases}
    return not libraries <= ELEMENTWISE_LIBRARIES or bool(names & SHAPED_CLASSES)


def parameter_groups(part: TrainedPart, ratio: float, shaped: bool, as_matrices: bool = False) -> list:
    """A part's weights as an optimizer takes them: flat, or each in its shape.

    For LoRA+, two groups, of which the B matrices' has a learning rate `ratio` times as high.

    https://arxiv.org/abs/2402.12354
    """
    is_b = [".lora_B." in name for name in part.parameters]
    b_size = sum(p.numel() for name, p in part.parameters.items() if ".lora_B." in name)
    splits = ratio != 1 and b_size > 0
    if shaped:
        pieces = zip(part.views(part.weights.detach()).values(), part.views(part.gradients).values())
        if as_matrices:  # of a convolution: a row for each of its outputs
            pieces = [tuple(tensor.flatten(min(1, tensor.dim() - 1)) for tensor in pair) for pair in pieces]
    elif splits:
        sizes, is_b = [len(part.gradients) - b_size, b_size], [False, True]
        pieces = zip(part.weights.detach().split(sizes), part.gradients.split(sizes))
    else:
        return [part.weights]
    part.pieces = [(torch.nn.Parameter(weights), gradient) for weights, gradient in pieces]
    part.attach_gradients()
    parameters = [parameter for parameter, _ in part.pieces]
    if not splits:
        return parameters
    first_b = is_b.index(True)
    rates = {"lr": part.learning_rate * ratio}
    return [{"params": parameters[:first_b]}, {"params": parameters[first_b:]} | rates]
