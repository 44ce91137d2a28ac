"""The state of a run, and what its processes do together."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lora_training.console import print_status
from lora_training.errors import Interrupted
from lora_training.training.summary import print_summary

if TYPE_CHECKING:
    import argparse

    from accelerate import Accelerator

    from lora_training.base_model.components import Components
    from lora_training.data.batches import BatchPlan
    from lora_training.data.samples import TrainingData
    from lora_training.families import Family
    from lora_training.memory.cuda_graphs import CudaGraphs
    from lora_training.optim.guard import NonFiniteGuard
    from lora_training.optim.parts import TrainedPart
    from lora_training.signals import StopSignal
    from lora_training.text.prompts import Prompts
    from lora_training.text.tokens import TokenRows


@dataclass
class Run:
    """Everything that the loop uses; the recipe's `prepare_run` fills it from top to bottom."""

    args: argparse.Namespace
    accelerator: Accelerator
    stop: StopSignal
    components: Components = None
    findings: list[str] = field(default_factory=list)  # what in the data will hurt the result
    data: TrainingData = None
    plan: BatchPlan = None
    max_steps: int = 0
    validation_size: tuple[int, int] = (0, 0)  # (width, height) of validation images
    validation_steps: set[int] = field(default_factory=set)
    scheduler: object = None  # diffusers' scheduler of the noise that is trained on
    prompts: Prompts = None
    abstractions: dict[str, list[str]] = field(default_factory=dict)  # word in captions: its new tokens
    sample_prompts: list[str] = field(default_factory=list)
    control_prompts: list[str] = field(default_factory=list)
    token_rows: dict[str, TokenRows] = field(default_factory=dict)  # by encoder key
    lora_modules: dict[str, torch.nn.Module] = field(default_factory=dict)  # by name in the pipeline
    # --init_lora: weights by module name and peft's key
    initial_lora: dict[str, dict] = field(default_factory=dict)
    initial_states: dict[str, dict] = field(default_factory=dict)  # of each LoRA, before the first step
    dora_norms: dict | None = None  # --use_dora: what `neighbours_norms` has read of the base
    denoiser: torch.nn.Module = None
    parts: list[TrainedPart] = field(default_factory=list)
    guard: NonFiniteGuard = None
    cuda_graphs: CudaGraphs | None = None
    pictures: object | None = None  # validation's PictureBudget: which pictures are drawn
    skips_pictures: bool = False  # control.py asks for no pictures of a validation
    probe: object | None = None  # validation's Probe, which measures what was learned and forgotten

    @property
    def family(self) -> Family:
        return self.args.family

    @property
    def drawn_prompts(self) -> list[str]:
        """Every prompt of which pictures are drawn."""
        return [*self.sample_prompts, *self.control_prompts]

    @property
    def draws_comparison(self) -> bool:
        """Whether pictures are drawn before and after the training, for comparison.png."""
        return bool(self.sample_prompts) and not (self.args.skip_final_inference or self.args.dry_run)

    def autocast(self) -> contextlib.AbstractContextManager:
        """For DoRA, whose magnitudes stay in float32; all else computes in its modules' own precision."""
        return self.accelerator.autocast() if self.args.use_dora else contextlib.nullcontext()

    def trains_text_at(self, step: int) -> bool:
        """Whether step `step` trains something that text embeddings depend on."""
        return any(part.name != "denoiser" and step < part.last_step for part in self.parts)


def on_main_process(run: Run, function: Callable, *arguments: object, uses_denoiser: bool = False) -> None:
    """Calls a function on the main process while the others wait.

    uses_denoiser: every process calls it if the base is sharded, since each has a shard of every layer.
    """
    if run.accelerator.is_main_process or (uses_denoiser and run.components.sharded):
        function(*arguments)
    run.accelerator.wait_for_everyone()


def stop_run(run: Run, number: int, step: int) -> None:
    """Ends a run that signal `number` has stopped after a step, whose checkpoint is written.

    Errors: always Interrupted, with the exit code.
    """
    name = signal.Signals(number).name
    print_status(f"stopped by signal {number} ({name}) after step {step}; checkpoint-{step} is written")
    print_summary(run.args, run.accelerator.num_processes, stopped_at=step)
    raise Interrupted(128 + number)
