"""Clipping, loss scaling, and gradients that aren't finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lora_training.optim.parts import TrainedPart


class NonFiniteGuard:
    """Clips gradients, keeps non-finite ones from the weights, and scales the loss for fp16.

    torch's clipping and GradScaler wait for the GPU at each step; this doesn't, but for `allows_step` in
    fp16.
    """

    def __init__(self, device, half: bool) -> None:
        self.half = half
        self.scale = torch.tensor(2.0**14 if half else 1.0, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # the last step's gradients
        self.good = torch.zeros((), device=device)  # steps since the scale last changed
        # non-finite steps in a row that no lower scale would mend
        self.bad_run = torch.zeros((), device=device)
        self.bad_total = torch.zeros((), device=device)

    def apply(self, parts: list[TrainedPart], accelerator, max_norm: float):
        """Sums gradients over processes, unscales and clips them; a non-finite one makes all of them zero.

        max_norm: 0 turns clipping off. Returns the norm before clipping, a tensor.
        """
        for part in parts:
            if accelerator.num_processes > 1:
                part.gradients.copy_(accelerator.reduce(part.gradients, reduction="sum"))
            if self.half:
                part.gradients.div_(self.scale)
        norms = [torch.linalg.vector_norm(part.gradients) for part in parts]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        finite = norm < math.inf  # not where it is NaN either
        factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0).nan_to_num_(0.0) if max_norm else finite.float()
        for part in parts:
            part.gradients.nan_to_num_(0.0, 0.0, 0.0).mul_(factor)
        if self.half:
            grow = self.good >= 1000
            self.scale = torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale / 2)
            self.good = torch.where(finite & ~grow, self.good + 1, 0.0)
        self.finite, counts = finite, ~finite & (self.scale < 1) if self.half else ~finite
        self.bad_run = torch.where(finite, 0.0, self.bad_run + counts)
        self.bad_total = self.bad_total + (~finite)
        return norm

    def allows_step(self) -> bool:
        """Whether this step is taken.

        On a GPU only fp16, which overflows now and then, is worth waiting for the answer; in other precisions
        a gradient that isn't finite has become zero.
        """
        return bool(self.finite) if self.half or not self.scale.is_cuda else True

    def state_dict(self) -> dict:
        """Its counts and scale, for a checkpoint."""
        return {name: value.cpu() for name, value in vars(self).items() if torch.is_tensor(value)}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave."""
        for name, value in state.items():
            getattr(self, name).copy_(value)
