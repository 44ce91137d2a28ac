"""Guards against a training that learns nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from lora_training.adapter_names import ADAPTER
from lora_training.console import print_status
from lora_training.errors import UserError

if TYPE_CHECKING:
    from lora_training.optim.parts import TrainedPart
    from lora_training.training.run import Run


class GradientCheck:
    """Watches which parameters get a gradient in the first steps.

    A part that gets none is an error, a layer that gets none a warning. The first steps are an epoch, at
    least 2 and at most 50: a LoRA's second matrix has no gradient in the first one, and the captions of a new
    token may come late.
    """

    def __init__(self, run: Run, first_step: int, active: list[TrainedPart]) -> None:
        self.run = run
        steps_per_epoch = math.ceil(run.plan.per_epoch / run.args.gradient_accumulation_steps)
        watched_steps = min(max(2, steps_per_epoch), 50)
        self.last_step = min(first_step + watched_steps, run.max_steps) - 1
        self.has_gradient: dict[str, torch.Tensor] = {}  # by part: (N,) bool
        if self.last_step > first_step:
            for part in active:
                self.has_gradient[part.name] = torch.zeros_like(part.gradients, dtype=torch.bool)

    def observe(self, step: int, active: list[TrainedPart]) -> None:
        """Notes the gradients of a step; after the last of the first steps, checks each part."""
        if not self.has_gradient:
            return
        for part in active:
            self.has_gradient[part.name] |= part.gradients != 0
        if step == self.last_step:
            for part in active:
                if not self.run.guard.bad_total:  # a loss that isn't finite has a message of its own
                    self.check_part(part)
            self.has_gradient.clear()

    def check_part(self, part: TrainedPart) -> None:
        """Warns of layers that got no gradient. Errors: UserError if the whole part got none."""
        has_gradient = self.has_gradient[part.name]
        if not has_gradient.any():
            tokens = "do the captions contain --token_abstraction?"
            advice = tokens if part.name == "embeddings" else "is the loss constant?"
            raise UserError(f"no gradient reaches the {part.name}, so nothing would be learned: {advice}")
        layers: dict[str, bool] = {}
        for name, stretch in part.views(has_gradient).items():
            layer = ADAPTER.split(name)[0]
            layers[layer] = bool(stretch.any()) or layers.get(layer, False)
        idle = [layer for layer, learns in layers.items() if not learns]
        if idle:
            count = f"{len(idle)} of {len(layers)} layers"
            print_status(f"warning: {count} of the {part.name} get no gradient, such as {idle[0]}")


def check_weights_changed(run: Run) -> None:
    """Errors: UserError if the weights of a part are those of the start."""
    for part in run.parts:
        if torch.equal(part.weights.detach().cpu(), part.initial):
            raise UserError(f"the {part.name} did not change in {run.max_steps} steps: nothing was learned")
