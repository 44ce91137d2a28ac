"""Optimizers as other people's libraries have them, for --optimizer by dotted name."""

from __future__ import annotations

import torch


class Layerwise(torch.optim.Optimizer):
    """Each layer's step is as long as its weights or, from zero, one times the rate; it drops gradients."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0, least_dimensions=1, most_dimensions=4) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dimensions = range(least_dimensions, most_dimensions + 1)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in self.dimensions:
                    raise ValueError(f"a parameter has {parameter.dim()} dimensions")
                if parameter.grad is not None and parameter.grad.any():
                    length = parameter.norm() or 1.0
                    parameter.sub_(parameter.grad / parameter.grad.norm() * length * group["lr"])
                parameter.grad = None


class Averaging(torch.optim.Optimizer):
    """Plain descent on z, of which x is the average; its steps are refused in another mode than training."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "training": False, "k": 0})

    def set_mode(self, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                group["training"] = training
                for parameter in group["params"]:
                    if state := self.state.get(parameter):  # y, the weights in training, is z itself
                        parameter.data.copy_(state["z"] if training else state["x"])

    def train(self) -> None:
        self.set_mode(True)

    def eval(self) -> None:
        self.set_mode(False)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            if not group["training"]:
                raise RuntimeError("not in training mode")
            group["k"] += 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(z=parameter.clone(), x=parameter.clone())
                parameter.sub_(parameter.grad, alpha=group["lr"])
                state["z"].copy_(parameter)
                state["x"].lerp_(parameter, 1 / group["k"])


class Watching(torch.optim.SGD):
    """Only looks at the first gradients."""

    looks = 0

    def step(self, closure=None):
        self.looks += 1
        return super().step(closure) if self.looks > 3 else None


class Idle(torch.optim.SGD):
    """Never changes a weight."""

    def step(self, closure=None):
        return None


class Unsaved(torch.optim.SGD):
    """Has a state that no checkpoint keeps."""

    def state_dict(self):
        return {**super().state_dict(), "made_by": Unsaved}


class Undecayed(torch.optim.Rprop):
    """Has no weight decay."""
