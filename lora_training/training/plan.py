"""How long a run is and when it is validated, and the lines that say so."""

from __future__ import annotations

import math
import signal
from collections import Counter
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.errors import Interrupted
from lora_training.training.schedule import validation_schedule
from lora_training.training.summary import print_summary

if TYPE_CHECKING:
    from lora_training.training.run import Run


def plan_steps(run: Run) -> None:
    """The number of steps, those after which validation runs, and the size of validation images: the fullest
    bucket's.
    """
    args, steps_per_epoch = run.args, run.plan.per_epoch / run.args.gradient_accumulation_steps
    run.max_steps = args.max_train_steps or math.ceil(args.num_train_epochs * steps_per_epoch)
    if args.num_validation_images or args.validation_split:
        run.validation_steps = validation_schedule(args, run.max_steps, steps_per_epoch)
    run.plan_size = run.data.buckets[Counter(e.bucket for e in run.data.examples).most_common(1)[0][0]]


def report_plan(run: Run) -> None:
    """Says how many images, batches and steps there are."""
    args, processes = run.args, run.accelerator.num_processes
    batch = (
        f"{args.train_batch_size} x {processes} processes x {args.gradient_accumulation_steps} accumulated"
    )
    print_status(
        f"{len(run.plan.buckets)} images, {run.plan.per_epoch} batches per epoch, {run.max_steps} steps, batch {batch}"
    )


def report_parts(run: Run) -> None:
    """Says what is trained, how long and how fast."""
    for part in run.parts:
        millions = part.weights.numel() / 1e6
        print_status(
            f"training {part.name}: {millions:.3f} million parameters, steps 1 to {part.last_step},"
            f" learning rate {part.learning_rate:g}"
        )
    if run.args.deepspeed:
        state = sum(part.weights.numel() for part in run.parts) * 8 / 2**20
        print_status(
            f"DeepSpeed's launcher: trained as with DDP; the optimizer's state ({state:.0f} MiB) isn't split, and"
            " config/accelerate_config_fsdp2.yaml splits the base"
        )


def stop_run(run: Run, number: int, step: int) -> None:
    """Ends a run that signal `number` has stopped after a step, whose checkpoint is written.

    Errors: always Interrupted.
    """
    name = signal.Signals(number).name
    print_status(f"stopped by signal {number} ({name}) after step {step}; checkpoint-{step} is written")
    print_summary(run.args, run.accelerator.num_processes, step)
    raise Interrupted(128 + number)
