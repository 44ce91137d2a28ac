"""The state of a run."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import argparse

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
    """Everything that the loop uses; `prepare_run` fills it from top to bottom."""

    args: argparse.Namespace
    accelerator: object
    stop: StopSignal
    components: Components = None
    findings: list[str] = field(default_factory=list)  # what will hurt in the data
    data: TrainingData = None
    plan: BatchPlan = None
    max_steps: int = 0
    plan_size: tuple[int, int] = (0, 0)  # width and height of validation images
    validation_steps: set[int] = field(default_factory=set)
    scheduler: object = None
    prompts: Prompts = None
    abstractions: dict[str, list[str]] = field(default_factory=dict)
    sample_prompts: list[str] = field(default_factory=list)
    control_prompts: list[str] = field(default_factory=list)
    rows: dict[str, TokenRows] = field(default_factory=dict)  # by encoder key
    lora_modules: dict[str, object] = field(default_factory=dict)  # pipeline name -> module
    start: dict[str, dict] = field(
        default_factory=dict
    )  # --init_lora: weights by pipeline name and peft's key
    initial_states: dict = field(default_factory=dict)
    norms: dict | None = None  # --use_dora: what `neighbours_norms` found
    denoiser: object = None
    parts: list[TrainedPart] = field(default_factory=list)
    guard: NonFiniteGuard = None
    graphs: CudaGraphs | None = None
    probe: object | None = None  # what training has changed is measured by it

    @property
    def family(self) -> Family:
        return self.args.family

    @property
    def drawn_prompts(self) -> list[str]:
        """Every prompt of which pictures are drawn."""
        return [*self.sample_prompts, *self.control_prompts]

    @property
    def compares(self) -> bool:
        """Whether the run draws pictures before and after, for comparison.png."""
        return bool(self.sample_prompts) and not self.args.skip_final_inference

    def autocast(self):
        """For DoRA, whose magnitudes stay in float32; everything else computes in its modules' own precision."""
        return self.accelerator.autocast() if self.args.use_dora else contextlib.nullcontext()

    def trains_text_at(self, step: int) -> bool:
        """Whether step `step` trains something that text embeddings depend on."""
        return any(p.name != "denoiser" and step < p.last_step for p in self.parts)


def on_main_process(run: Run, work, *arguments, draws: bool = False) -> None:
    """Runs something on the main process while the others wait.

    draws: it draws pictures, which takes all where the base is sharded.
    """
    if run.accelerator.is_main_process or (draws and run.components.sharded):
        work(*arguments)
    run.accelerator.wait_for_everyone()


def stop_requested(run: Run, step: int) -> int:
    """The number of the signal that any process has received, or 0; agreed between processes, every ten
    steps.
    """
    if run.accelerator.num_processes == 1:
        return run.stop.number
    if step % 10:
        return 0
    numbers = run.accelerator.gather(torch.tensor([run.stop.number], device=run.accelerator.device))
    return int(numbers.max())
