"""Parameters that are trained together, in flat buffers."""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import dataclass, field

import torch

from lora_training.errors import UserError, one_line


@dataclass
class TrainedPart:
    """Parameters that are trained together: the denoiser's LoRA, the text encoders' LoRA, or the new tokens'
    rows.

    They lie in one flat float32 buffer, `weights`, and so do gradients and moments, so that optimizer,
    clipping, moving average, sum over processes and checkpoint are one operation each. Where a module
    computes in half precision, its parameters are views into a `shadow` of that buffer, which is cast once a
    step. The part is trained while step < last_step.
    """

    name: str
    parameters: dict[str, object]  # as the modules have them
    learning_rate: float
    weight_decay: float
    last_step: int
    current_lr: float = 0.0  # the learning rate of the last step
    weights: object = None  # (N,) float32, a Parameter
    gradients: object = None  # (N,) float32, its gradient
    shadow: object = None  # (N,) the weights in the modules' precision; None where that is float32
    micro_gradients: object = None  # (N,) of the last micro-batch, in the shadow's precision
    # what the optimizer has: Parameters in `weights`, each with its gradient in `gradients`
    pieces: list[tuple[object, object]] = field(default_factory=list)
    initial: object = None  # (N,) on the CPU, the weights at the start
    initial_stds: list[float] = field(default_factory=list)  # of new tokens: each table's standard deviation
    rate_factors: dict[str, float] = field(default_factory=dict)  # --lr_pattern's, by parameter; default 1
    optimizer: object = None
    schedule: object = None
    ema: object = None

    def allocate(self, dtype=None) -> None:
        """Makes the buffers and points the modules' parameters into them.

        dtype: the modules' precision; None: float32.

        LoRA's A matrices come first, so that those of one attention follow each other, its B matrices last;
        where --lr_pattern gives them several rates, those of one rate after another, the usual one first.
        """

        def order(name: str) -> tuple:
            factor = self.rate_factors.get(name, 1.0)
            return factor != 1, factor, ".lora_B." in name

        self.parameters = {name: self.parameters[name] for name in sorted(self.parameters, key=order)}
        values = torch.cat([p.detach().flatten().float() for p in self.parameters.values()])
        self.weights, self.gradients = torch.nn.Parameter(values), torch.zeros_like(values)
        self.pieces = [(self.weights, self.gradients)]
        self.attach_gradients()
        self.initial = values.cpu().clone()
        if self.name == "embeddings":
            self.initial_stds = [rows.std().item() for rows in self.views(self.initial).values()]
        module_weights, module_gradients = values, self.gradients
        if dtype not in (None, torch.float32):
            self.shadow = module_weights = values.to(dtype)
            self.micro_gradients = module_gradients = self.gradients.to(dtype)
        weights, gradients = self.views(module_weights), self.views(module_gradients)
        for name, parameter in self.parameters.items():
            parameter.grad, parameter.data = None, weights[name]
            parameter.grad = gradients[name]

    def views(self, flat) -> dict[str, object]:
        """A flat tensor (N,) -> {name: its stretch for that parameter, in the parameter's shape}."""
        sizes = [p.numel() for p in self.parameters.values()]
        named = zip(self.parameters.items(), flat.split(sizes), strict=True)
        return {name: stretch.view(parameter.shape) for (name, parameter), stretch in named}

    def attach_gradients(self) -> None:
        """Gives the optimizer's parameters their gradients, which some optimizers take away."""
        for parameter, gradient in self.pieces:
            parameter.grad = gradient

    def accumulate_gradients(self) -> None:
        """Adds a micro-batch's gradients to the others; to be called after each backward pass."""
        if self.micro_gradients is not None:
            self.gradients.add_(self.micro_gradients)
            self.micro_gradients.zero_()

    def assign(self, weights) -> None:
        """Takes flat weights, and lets the modules see them."""
        self.weights.data.copy_(weights)
        self.update_shadow()

    def update_shadow(self) -> None:
        """Copies the weights to where the modules see them; to be called after each change."""
        if self.shadow is not None:
            self.shadow.copy_(self.weights.detach())

    def step(self) -> None:
        """One step of optimizer, schedule and moving average; gradients start again at zero."""
        self.current_lr = self.optimizer_settings()["lr"]
        self.optimizer.step()
        self.attach_gradients()
        self.schedule.step()
        self.gradients.zero_()
        if self.initial_stds:
            self.pull_to_initial_std()
        if self.ema is not None:
            self.ema.step([self.weights])
        self.update_shadow()

    def pull_to_initial_std(self) -> None:
        """Scales new tokens' rows a tenth of the way (in logarithms) back to their standard deviation at the
        start.

        Adam makes rows grow, and an encoder reads rows of the size of its own.
        """
        rows = list(self.views(self.weights.data).values())
        states = [self.optimizer.state.get(parameter, {}) for parameter, _ in self.pieces]
        averages = averages_by_itself(self.optimizer)  # then it has other weights, z
        second = [state["z"] for state in states if averages and "z" in state]
        if len(second) == 1:
            second = list(self.views(second[0].view(-1)).values())
        for number, initial_std in enumerate(self.initial_stds):
            factor = (initial_std / rows[number].std()).pow(0.1)
            for tensor in (rows[number], *second[number : number + 1]):
                tensor.mul_(factor)

    def optimizer_settings(self) -> dict:
        """The optimizer's settings, of which lr is the learning rate in use."""
        return self.optimizer.param_groups[0]

    def step_size_estimate(self):
        """What Prodigy and D-Adaptation have found and multiply the learning rate by, a tensor; else None."""
        settings = self.optimizer_settings()
        if "d" not in settings or not {"d0", "growth_rate"} & settings.keys():  # torch's Adafactor clips at d
            return None
        estimate = settings["d"]
        if not torch.is_tensor(estimate):
            return torch.full((), estimate, device=self.weights.device)
        return estimate.detach().float().reshape(())

    def load_state_dict(self, saved: dict, ema_decay: float) -> None:
        """Takes what `training_state` has of this part; rates and other settings stay those of this run."""
        from diffusers.training_utils import EMAModel

        self.assign(saved["weights"])
        self.initial = saved["initial"]
        if saved["optimizer"] is not None:
            self.load_optimizer(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"] | {"base_lrs": self.schedule.base_lrs})
            factor = self.schedule.lr_lambdas[0](self.schedule.last_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        if self.ema is not None:  # frozen, newly asked for, or continued
            self.ema = None if saved["optimizer"] is None else EMAModel([self.weights], decay=ema_decay)
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"] | {"decay": ema_decay})
            self.ema.to(self.weights.device)

    def load_optimizer(self, saved: dict) -> None:
        """Takes the state of an optimizer; its arguments stay those of this run.

        Errors: UserError for arguments that need another state.
        """
        names = {"initial_lr", *arguments_of(type(self.optimizer))} - {"lr", "params"}
        groups = self.optimizer.param_groups
        settings = [{key: group[key] for key in names & group.keys()} for group in groups]
        try:
            pairs = zip(saved["param_groups"], settings, strict=True)
            changed = {key for old, new in pairs for key in old.keys() & new if old[key] != new[key]}
            if fixed := changed & {"d0"}:  # what has been summed up is in units of it
                raise ValueError(f"{', '.join(fixed)} can't change any more")
            for state in [copy.deepcopy(saved), saved] if changed - {"initial_lr"} else [saved]:
                weights = self.weights.detach().clone()
                self.optimizer.load_state_dict(state)
                for group, own in zip(self.optimizer.param_groups, settings, strict=True):
                    group.update(own)
                if state is not saved:  # a step for trial, on a copy
                    self.optimizer.step()
                    self.attach_gradients()
                    self.gradients.zero_()
                    self.assign(weights)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            advice = "set --optimizer_args and --loraplus_lr_ratio as they were, or --overwrite begins anew"
            raise UserError(f"its optimizer's state doesn't fit ({one_line(error)}): {advice}") from None

    def freeze(self) -> None:
        """Ends the training of this part: no gradients, no optimizer state; it stays at its average, if it
        has one.
        """
        if averages_by_itself(self.optimizer):
            self.optimizer.eval()
        if self.ema is not None:
            self.ema.copy_to([self.weights])
        self.update_shadow()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.gradients = self.micro_gradients = self.weights.grad = None
        self.pieces = []
        self.optimizer = self.schedule = self.ema = None


def arguments_of(optimizer_class: type) -> list[str]:
    """The names of a class's arguments; one that takes any has weight_decay, too."""
    parameters = inspect.signature(optimizer_class).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return [*parameters, *(["weight_decay"] if takes_any else [])]


def averages_by_itself(optimizer) -> bool:
    """Whether an optimizer is schedule-free: it has other weights for training than for use."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


@contextlib.contextmanager
def restored_afterwards(parts: list[TrainedPart]):
    """What is done to parameters inside is undone afterwards, exactly, where a swap back would round."""
    saved = [part.weights.detach().clone() for part in parts]
    try:
        yield
    finally:
        for part, weights in zip(parts, saved, strict=True):
            part.assign(weights)


@contextlib.contextmanager
def averaged_weights(parts: list[TrainedPart]):
    """While inside, parameters are what should be saved and shown: moving averages, where there are any."""
    schedule_free = [part.optimizer for part in parts if averages_by_itself(part.optimizer)]
    with restored_afterwards(parts):
        for part in parts:
            if part.ema is not None:
                part.ema.copy_to([part.weights])
        for optimizer in schedule_free:
            optimizer.eval()
        for part in parts:
            part.update_shadow()
        try:
            yield
        finally:
            for optimizer in schedule_free:
                optimizer.train()
