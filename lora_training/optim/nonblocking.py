"""Optimizers of libraries, without their waits for the GPU."""

from __future__ import annotations

import math

import torch


def nonblocking_8bit(base: type) -> type:
    """bitsandbytes' optimizers without their wait for the GPU after each parameter; paged memory needs it."""

    class Nonblocking8bit(base):
        @torch.no_grad()
        def step(self, closure=None):
            if self.is_paged:
                return super().step(closure)
            for number, group in enumerate(self.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, index)
                    self.update_step(group, parameter, number, index)

    return Nonblocking8bit


def batched_muon(base: type) -> type:
    """torch's Muon, https://kellerjordan.github.io/posts/muon/, for all matrices of one shape at once.

    The library launches some twenty kernels for each matrix, of which a LoRA has hundreds.
    """

    class BatchedMuon(base):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                matrices, momentum = group["params"], group["momentum"]
                gradients = [matrix.grad for matrix in matrices]
                for matrix in matrices:
                    if not self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                updates = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
                torch._foreach_lerp_(updates, gradients, 1 - momentum)
                if group["nesterov"]:
                    updates = torch._foreach_lerp(gradients, updates, momentum)
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                for shape in dict.fromkeys(matrix.shape for matrix in matrices):
                    places = [k for k, matrix in enumerate(matrices) if matrix.shape == shape]
                    directions = orthogonalized(torch.stack([updates[k] for k in places]), group)
                    rate = group["lr"] * shape_factor(shape, group["adjust_lr_fn"])
                    alike = [matrices[k] for k in places]
                    torch._foreach_add_(alike, list(directions.to(alike[0].dtype)), alpha=-rate)

    return BatchedMuon


def orthogonalized(matrices: torch.Tensor, group: dict) -> torch.Tensor:
    """Matrices (K, M, N) -> nearly the nearest orthogonal ones, in bf16, by Newton and Schulz's iteration."""
    a, b, c = group["ns_coefficients"]
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if is_tall else matrices).bfloat16()
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def shape_factor(shape: torch.Size, rule: str | None) -> float:
    """What Muon multiplies the rate by for a matrix of this shape."""
    rows, columns = shape
    if rule == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def nonblocking_prodigy(base: type) -> type:
    """prodigyopt's Prodigy, https://arxiv.org/abs/2306.06101, for one parameter, with d kept on the GPU.

    The library reads two numbers from the GPU in each step.
    """

    class NonblockingProdigy(base):
        @torch.no_grad()
        def step(self, closure=None):
            (group,) = self.param_groups
            (weights,) = group["params"]
            state, gradient, lr = self.state[weights], weights.grad, group["lr"]
            if not state:
                start_state(state, weights, group)
            if not lr:
                return
            (beta1, beta2), decay, d, d0 = group["betas"], group["weight_decay"], state["d"], group["d0"]
            group["k"] += 1
            correction = math.sqrt(1 - beta2 ** group["k"]) / (1 - beta1 ** group["k"])
            dlr = d * (lr * correction if group["use_bias_correction"] else lr)
            if decay and not group["decouple"]:
                gradient.add_(weights, alpha=decay)
            beta3 = math.sqrt(beta2) if group["beta3"] is None else group["beta3"]
            sliced, p0 = gradient[:: group["slice_p"]], state["p0"]
            progress, weight = torch.dot(sliced, p0 - weights[:: group["slice_p"]]), d * dlr
            state["d_numerator"].mul_(beta3).addcmul_(weight, progress, value=1 / d0)
            scaled = gradient * d
            state["exp_avg"].lerp_(scaled, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
            weight = d * d if group["safeguard_warmup"] else weight
            state["s"].mul_(beta3).addcmul_(sliced, weight, value=1 / d0)
            estimate = state["d_numerator"] / torch.linalg.vector_norm(state["s"], 1) * group["d_coef"]
            group["d"] = state["d"] = grown(state, estimate.nan_to_num_(0.0), group)  # no gradient yet: 0 / 0
            denominator = state["exp_avg_sq"].sqrt().add_(state["d"], alpha=group["eps"])
            if decay and group["decouple"]:
                weights.addcmul_(weights, dlr, value=-decay)
            direction = state["exp_avg"] if beta1 else gradient * state["d"]  # without momentum, as of now
            weights.addcdiv_(direction * dlr, denominator, value=-1)

    return NonblockingProdigy


def start_state(state: dict, weights: torch.Tensor, group: dict) -> None:
    """Prodigy's state before the first step. Errors: ValueError for arguments that can't work here."""
    if group["fsdp_in_use"]:
        raise ValueError("fsdp_in_use: leave it out, each process has all trained weights")
    every = group["slice_p"]
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"slice_p is a whole number from 1 on, and not {every!r}")
    state.update({name: torch.zeros_like(weights) for name in ("exp_avg", "exp_avg_sq")})
    state.update(s=torch.zeros_like(weights[::every]), p0=weights[::every].clone())
    state.update(d=weights.new_tensor(group["d0"]), d_numerator=weights.new_zeros(()))


def grown(state: dict, estimate: torch.Tensor, group: dict) -> torch.Tensor:
    """Prodigy's next d: the largest estimate so far, approached by at most growth_rate a step."""
    d, growth_rate = state["d"], group["growth_rate"]
    if growth_rate == math.inf:
        return torch.maximum(d, estimate)
    state["d_max"] = torch.maximum(state.get("d_max", d), estimate)
    first = torch.where(d == group["d0"], torch.maximum(d, estimate), d)
    return torch.minimum(state["d_max"], first * growth_rate)
