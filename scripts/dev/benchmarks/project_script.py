"""The project's training script as a measured program: run as it is, from its first line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from unittest.mock import patch

import safetensors
import torch

from lora_training import training
from lora_training.base_model import quantized
from lora_training.libraries import import_training_libraries
from lora_training.lora import adapters
from scripts.dev.benchmarks.cases import flags_to_argv
from scripts.dev.benchmarks.programs import flatten, fresh_process, initialize_lora
from scripts.dev.benchmarks.step_clock import Clock
from scripts.dev.recipes import load_recipe

RECORDED_STEPS = 3  # the first ones, whose gradients are compared


class GradientsRecorded(BaseException):
    """Ends a run of which only the first gradients are needed."""


@dataclass
class FirstSteps:
    """The inputs of a run's first step, and the gradients by step."""

    batch: dict | None = None
    embeds: dict | None = None
    # (N,) float32 on the CPU, in the order of names
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)


def parse_arguments(family: str, argv: list[str], flags: list[str]) -> argparse.Namespace:
    """The script's parsed arguments. Errors: SystemExit after a line on stderr, UserError."""
    learning_rate = "1" if "optimizer=prodigy" in flags else "1e-8"  # so small that steps can be compared
    argv = [*argv, "--report_to", "none", "--num_validation_images", "0", "--learning_rate", learning_rate]
    args = load_recipe(family).parse_args([*argv, *flags_to_argv(flags)])
    import_training_libraries()
    return args


def run_project_script(
    args: argparse.Namespace, clock: Clock, record: FirstSteps, only_gradients: bool = False
) -> None:
    """Runs the training script to the clock's last tick, or until the gradients are recorded."""
    recipe = load_recipe(args.family.name)
    add_lora, batch_loss, backward = adapters.add_lora, recipe.batch_loss, recipe.backward
    compute_loss = recipe.compute_loss

    def add_comparable_lora(module, *rest) -> None:
        add_lora(module, *rest)
        initialize_lora(module)

    def recorded_batch_loss(run, batch, embeds):
        if record.batch is None:
            record.batch = {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
            record.embeds = {k: v.clone() for k, v in embeds.items()}
        return batch_loss(run, batch, embeds)

    def recorded_backward(run, batch, step, micro_step):
        loss = backward(run, batch, step, micro_step)
        if step < RECORDED_STEPS and step not in record.gradients:
            (part,) = run.parts
            record.gradients[step] = flatten(part.views(part.gradients))
            if only_gradients and step == RECORDED_STEPS - 1:
                raise GradientsRecorded
        return loss

    def stamped_loss(*inputs):
        clock.stamp("forward")
        return compute_loss(*inputs)

    with (
        patch.object(adapters, "add_lora", add_comparable_lora),
        patch.object(recipe, "batch_loss", recorded_batch_loss),
        patch.object(recipe, "backward", recorded_backward),
        patch.object(recipe, "compute_loss", stamped_loss),
        patch.object(quantized, "safe_open", safetensors.safe_open),  # the one that makes weights up
        fresh_process(),
        training.open_output_folder(args),
    ):
        recipe.execute(args)
