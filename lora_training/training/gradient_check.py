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
    """Sees in the first steps which parameters get a gradient; errors if a part, warns if a layer, gets none.

    It looks for an epoch (2 to 50 steps): a LoRA's second matrix has none in the first step, and a token's
    captions may come late.
    """

    def __init__(self, run: Run, first_step: int, active: list[TrainedPart]) -> None:
        self.run = run
        epoch = math.ceil(run.plan.per_epoch / run.args.gradient_accumulation_steps)
        self.last = min(first_step + min(max(2, epoch), 50), run.max_steps) - 1
        parts = active if self.last > first_step else []
        self.seen = {p.name: torch.zeros_like(p.gradients, dtype=torch.bool) for p in parts}

    def observe(self, step: int, active: list[TrainedPart]) -> None:
        """Notes the gradients of a step, and judges after the last of the first steps."""
        if not self.seen:
            return
        for part in active:
            self.seen[part.name] |= part.gradients != 0
        if step == self.last:
            for part in active:
                if not self.run.guard.bad_total:  # a loss that isn't finite has a message of its own
                    self.judge(part)
            self.seen.clear()

    def judge(self, part: TrainedPart) -> None:
        """The verdict on one part."""
        if not self.seen[part.name].any():
            tokens = "do the captions contain --token_abstraction?"
            advice = tokens if part.name == "embeddings" else "is the loss constant?"
            raise UserError(f"no gradient reaches the {part.name}, so nothing would be learned: {advice}")
        layers: dict[str, bool] = {}
        for name, seen in part.views(self.seen[part.name]).items():
            layer = ADAPTER.split(name)[0]
            layers[layer] = bool(seen.any()) | layers.get(layer, False)
        if idle := [layer for layer, works in layers.items() if not works]:
            print_status(
                f"warning: {len(idle)} of {len(layers)} layers of the {part.name} get no gradient, such as {idle[0]}"
            )


def check_results(run: Run) -> None:
    """Errors if what was trained is no different from where it began."""
    for part in run.parts:
        if torch.equal(part.weights.detach().cpu(), part.initial):
            raise UserError(f"the {part.name} did not change in {run.max_steps} steps: nothing was learned")
