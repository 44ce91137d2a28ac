"""Optimizers by name, without waits for the GPU, with schedule and moving average."""

from __future__ import annotations

import contextlib
import io
import math
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.reading import import_class
from lora_training.errors import UserError, one_line

if TYPE_CHECKING:
    import argparse

    from lora_training.optim.parts import TrainedPart


def prepare_parts(parts: list[TrainedPart], args: argparse.Namespace, dtype=None) -> None:
    """Gives each part its buffers, optimizer, schedule and moving average. dtype: the modules' precision."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    for part in parts:
        exact = part.name == "embeddings" or args.use_dora  # DoRA's magnitudes would be rounded
        part.allocate(None if exact else dtype)
        try:
            part.optimizer = make_optimizer(part, args)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"--optimizer {args.optimizer}: {one_line(error)}") from None
        part.schedule = get_scheduler(
            args.lr_scheduler,
            part.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=part.last_step,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        if args.use_ema and part.name != "embeddings":
            part.ema = EMAModel([part.weights], decay=args.ema_decay)


def make_optimizer(part: TrainedPart, args: argparse.Namespace):
    """The optimizer of --optimizer for one part.

    Each part has its own, so that Prodigy finds a step size for each.

    Errors: ImportError, AttributeError, TypeError or ValueError for a class or arguments that there are not.
    """
    common = {"params": parameter_groups(part, args.loraplus_lr_ratio), "lr": part.learning_rate}
    common |= {"weight_decay": part.weight_decay} | args.optimizer_args
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon} | common
    if "." in args.optimizer:
        return import_class(*args.optimizer.rsplit(".", 1))(**common)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(**adam, fused=part.weights.is_cuda)
    if args.optimizer == "adamw8bit":
        return make_adamw8bit(adam)
    if args.optimizer == "prodigy":
        return make_prodigy(adam, args)
    if args.optimizer == "adafactor":
        return make_adafactor(common, part)
    return make_schedulefree(adam, args)


def make_adamw8bit(settings: dict):
    """bitsandbytes' 8-bit AdamW."""
    import bitsandbytes

    return nonblocking_adamw8bit(bitsandbytes.optim.AdamW8bit)(**settings)


def make_prodigy(settings: dict, args: argparse.Namespace):
    """prodigyopt's Prodigy with the --prodigy_ flags."""
    from prodigyopt import Prodigy

    flags = ("decouple", "use_bias_correction", "safeguard_warmup")
    settings = settings | {name: vars(args)[f"prodigy_{name}"] for name in flags}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how it decays weights
        return nonblocking_prodigy(Prodigy)(**settings, beta3=args.prodigy_beta3)


def make_adafactor(settings: dict, part: TrainedPart):
    """transformers' Adafactor, which keeps a mean per row and column instead of one per weight, on the part's
    matrices.
    """
    from transformers.optimization import Adafactor

    matrices = [torch.nn.Parameter(view) for view in part.views(part.weights.detach()).values()]
    for matrix, gradient in zip(matrices, part.views(part.gradients).values(), strict=True):
        matrix.grad = gradient
    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    return Adafactor(**settings | {"params": matrices}, **fixed)


def make_schedulefree(settings: dict, args: argparse.Namespace):
    """schedulefree's AdamW, in training mode."""
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(**settings, warmup_steps=args.lr_warmup_steps)
    optimizer.train()
    return optimizer


def parameter_groups(part: TrainedPart, ratio: float) -> list:
    """A part's flat weights or, for LoRA+, two groups, of which the B matrices' has a learning rate `ratio`
    times as high.

    https://arxiv.org/abs/2402.12354
    """
    b_size = sum(p.numel() for name, p in part.parameters.items() if ".lora_B." in name)
    if ratio == 1 or not b_size:
        return [part.weights]
    sizes = [len(part.gradients) - b_size, b_size]
    groups = [{"params": [torch.nn.Parameter(weights)]} for weights in part.weights.detach().split(sizes)]
    for group, gradient in zip(groups, part.gradients.split(sizes), strict=True):
        group["params"][0].grad = gradient
    groups[1]["lr"] = part.learning_rate * ratio
    return groups


def nonblocking_adamw8bit(base: type) -> type:
    """bitsandbytes' 8-bit AdamW without its wait for the GPU after each parameter."""

    class AdamW8bit(base):
        @torch.no_grad()
        def step(self, closure=None):
            for number, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, index)
                    self.update_step(group, parameter, number, index)

    return AdamW8bit


def nonblocking_prodigy(base: type) -> type:
    """prodigyopt's Prodigy, https://arxiv.org/abs/2306.06101, for one parameter, with d kept on the GPU.

    The library reads two numbers from the GPU in each step.
    """

    class NonblockingProdigy(base):
        @torch.no_grad()
        def step(self, closure=None):
            (group,) = self.param_groups
            (weights,) = group["params"]
            state, gradient, d0, lr = self.state[weights], weights.grad, group["d0"], group["lr"]
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            beta3 = math.sqrt(beta2) if group["beta3"] is None else group["beta3"]
            if not state:
                state.update({name: torch.zeros_like(weights) for name in ("exp_avg", "exp_avg_sq", "s")})
                state.update(p0=weights.clone(), d=weights.new_tensor(d0), d_numerator=weights.new_zeros(()))
            if not lr:
                return
            d, group["k"] = state["d"], group["k"] + 1
            correction = math.sqrt(1 - beta2 ** group["k"]) / (1 - beta1 ** group["k"])
            dlr = d * (lr * correction if group["use_bias_correction"] else lr)
            if decay and not group["decouple"]:
                gradient.add_(weights, alpha=decay)
            progress, weight = torch.dot(gradient, state["p0"] - weights), d * dlr
            state["d_numerator"].mul_(beta3).addcmul_(weight, progress, value=1 / d0)
            scaled = gradient * d
            state["exp_avg"].lerp_(scaled, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
            weight = d * d if group["safeguard_warmup"] else weight
            state["s"].mul_(beta3).addcmul_(gradient, weight, value=1 / d0)
            estimate = state["d_numerator"] / torch.linalg.vector_norm(state["s"], 1) * group["d_coef"]
            state["d"] = torch.maximum(d, estimate.nan_to_num_(0.0))  # no gradient yet: 0 / 0
            denominator = state["exp_avg_sq"].sqrt().add_(state["d"], alpha=group["eps"])
            if decay and group["decouple"]:
                weights.addcmul_(weights, dlr, value=-decay)
            weights.addcdiv_(state["exp_avg"] * dlr, denominator, value=-1)
            group["d"] = state["d"]

    return NonblockingProdigy
