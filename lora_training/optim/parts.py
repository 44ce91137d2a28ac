"""Parameters that are trained together, in flat buffers."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lora_training.errors import UserError, one_line
from lora_training.optim.optimizers import make_optimizer

if TYPE_CHECKING:
    import argparse

ADAPTER = re.compile(
    r"\.(?=(?:lora|hada|lokr)_)"
)  # where, in the name of a parameter of these, the layer's name ends

LINEAR_FACTORS = (
    ".lora_B.",
    ".hada_w2_b.",
    ".lokr_w1.",
)  # one of each layer, to which its update is proportional


@dataclass
class TrainedPart:
    """Parameters that are trained together: the denoiser's LoRA, the text encoders' LoRA, or the new tokens' rows.

    They lie in one flat float32 buffer, `weights`, and so do gradients and moments, so that optimizer, clipping, moving
    average, sum over processes and checkpoint are one operation each. Where a module computes in half precision, its
    parameters are views into a `shadow` of that buffer, which is cast once a step. It is trained while step < last_step.
    """

    name: str
    parameters: dict[str, object]  # as the modules have them
    learning_rate: float
    weight_decay: float
    last_step: int
    rate: float = 0.0  # the learning rate of the last step
    weights: object = None  # (N,) float32, a Parameter
    gradients: object = None  # (N,) float32, its gradient
    shadow: object = None  # (N,) the weights in the modules' precision; None where that is float32
    fresh: object = None  # (N,) gradients of the last micro-batch, in the same precision
    initial: object = None  # (N,) on the CPU, the weights at the start
    spreads: list[float] = field(
        default_factory=list
    )  # of new tokens: each table's standard deviation at the start
    optimizer: object = None
    schedule: object = None
    ema: object = None

    def allocate(self, dtype=None) -> None:
        """Makes the buffers and points the modules' parameters into them. dtype: the modules' precision; None: float32.

        LoRA's A matrices come first, so that those of one attention follow each other, its B matrices last.
        """
        self.parameters = dict(sorted(self.parameters.items(), key=lambda item: ".lora_B." in item[0]))
        values = torch.cat([p.detach().flatten().float() for p in self.parameters.values()])
        self.weights, self.gradients, self.initial = (
            torch.nn.Parameter(values),
            torch.zeros_like(values),
            values.cpu(),
        )
        self.weights.grad, self.initial = self.gradients, self.initial.clone()
        if self.name == "embeddings":
            self.spreads = [rows.std().item() for rows in self.split(self.initial).values()]
        read, written = values, self.gradients
        if dtype not in (None, torch.float32):
            self.shadow, self.fresh = read, written = values.to(dtype), self.gradients.to(dtype)
        weights, gradients = self.split(read), self.split(written)
        for name, parameter in self.parameters.items():
            parameter.grad, parameter.data = None, weights[name]
            parameter.grad = gradients[name]

    def split(self, flat) -> dict[str, object]:
        """A flat tensor -> its stretch for each parameter, in that parameter's shape."""
        sizes = [p.numel() for p in self.parameters.values()]
        named = zip(self.parameters.items(), flat.split(sizes), strict=True)
        return {name: stretch.view(parameter.shape) for (name, parameter), stretch in named}

    def accumulate_gradients(self) -> None:
        """Adds a micro-batch's gradients to the others; to be called after each backward pass."""
        if self.fresh is not None:
            self.gradients.add_(self.fresh)
            self.fresh.zero_()

    def assign(self, weights) -> None:
        """Takes flat weights, and lets the modules see them."""
        self.weights.data.copy_(weights)
        self.publish()

    def publish(self) -> None:
        """Lets the modules see the weights; to be called after each change."""
        if self.shadow is not None:
            self.shadow.copy_(self.weights.detach())

    def step(self) -> None:
        """One step of optimizer, schedule and moving average; gradients start again at zero."""
        self.rate = self.group()["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.gradients.zero_()
        if self.spreads:
            self.pull_back()
        if self.ema is not None:
            self.ema.step([self.weights])
        self.publish()

    def pull_back(self) -> None:
        """Draws new tokens' rows a tenth of the way (in logarithms) to the spread they began with: Adam makes them grow,
        and an encoder reads rows of the size of its own.
        """
        views = [self.split(self.weights.data)]
        views += [self.split(s["z"]) for s in self.optimizer.state.values() if "z" in s]  # schedule-free's
        for spread, *tensors in zip(self.spreads, *(view.values() for view in views), strict=False):
            factor = (spread / tensors[0].std()).pow(0.1)
            for tensor in tensors:
                tensor.mul_(factor)

    def group(self) -> dict:
        """The optimizer's settings: the learning rate in use, lr, and Prodigy's estimate d, which multiplies it."""
        return self.optimizer.param_groups[0]

    def load_state_dict(self, saved: dict, ema_decay: float) -> None:
        """Takes what `training_state` has of this part. Rates and decays are this run's own, where they have changed."""
        from diffusers.training_utils import EMAModel

        self.assign(saved["weights"])
        self.initial = saved["initial"]
        if saved["optimizer"] is not None:
            own = "weight_decay betas eps initial_lr beta3 decouple use_bias_correction safeguard_warmup warmup_steps"
            mine = [{k: v for k, v in g.items() if k in own.split()} for g in self.optimizer.param_groups]
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"] | {"base_lrs": self.schedule.base_lrs})
            rate = self.schedule.lr_lambdas[0](self.schedule.last_epoch)
            for group, values in zip(self.optimizer.param_groups, mine, strict=True):
                group.update(values, lr=values["initial_lr"] * rate)
        if self.ema is not None:  # frozen, newly asked for, or gone on with
            self.ema = None if saved["optimizer"] is None else EMAModel([self.weights], decay=ema_decay)
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"] | {"decay": ema_decay})
            self.ema.to(self.weights.device)

    def freeze(self) -> None:
        """Ends the training of this part: no gradients, no optimizer state; it stays at its average, if it has one."""
        if type(self.optimizer).__name__.endswith("ScheduleFree"):
            self.optimizer.eval()
        if self.ema is not None:
            self.ema.copy_to([self.weights])
        self.publish()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.gradients = self.fresh = self.weights.grad = self.optimizer = self.schedule = self.ema = None


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


@contextlib.contextmanager
def restored_afterwards(parts: list[TrainedPart]):
    """What is done to parameters inside is undone afterwards, exactly, where a swap back would round."""
    kept = [part.weights.detach().clone() for part in parts]
    try:
        yield
    finally:
        for part, weights in zip(parts, kept, strict=True):
            part.assign(weights)


@contextlib.contextmanager
def averaged_weights(parts: list[TrainedPart]):
    """While inside, parameters are what should be saved and shown: moving averages, where there are any."""
    free = [p.optimizer for p in parts if type(p.optimizer).__name__.endswith("ScheduleFree")]
    with restored_afterwards(parts):
        for part in parts:
            if part.ema is not None:
                part.ema.copy_to([part.weights])
        for optimizer in free:
            optimizer.eval()
        for part in parts:
            part.publish()
        try:
            yield
        finally:
            for optimizer in free:
                optimizer.train()
