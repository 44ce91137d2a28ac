"""--dry_run: what a training would take, from two steps at the largest bucket."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.files import read_metrics
from lora_training.training.machine import peak_memory

if TYPE_CHECKING:
    from lora_training.training.run import Run


def perform_dry_run(run: Run, train: Callable[[Run, int], None]) -> None:
    """Trains two steps at the largest bucket, with a checkpoint and one picture; prints time and memory.

    train: the recipe's loop.
    """
    planned_steps = run.max_steps
    use_largest_bucket(run)
    run.max_steps = min(2, planned_steps)
    run.validation_steps = {run.max_steps}
    draw_one_picture(run)
    run.args.checkpointing_steps = run.max_steps
    run.args.logging_steps = 1
    train(run, 0)
    report_dry_run(run, planned_steps)


def draw_one_picture(run: Run) -> None:
    """Leaves one picture to be drawn, after the last step: of the prompt whose picture is largest."""
    args, (width, height) = run.args, run.validation_size

    def pixels(number: int) -> int:
        own = args.prompt_settings[number] if args.prompt_settings else {}
        return own.get("width", width) * own.get("height", height)

    run.pictures.per_prompt, run.pictures.steps = 1, {run.max_steps}
    if run.sample_prompts:
        number = max(range(len(run.sample_prompts)), key=pixels)
        run.sample_prompts = [run.sample_prompts[number]]
        args.prompt_settings = args.prompt_settings[number : number + 1]


def use_largest_bucket(run: Run) -> None:
    """Makes every batch of the first epoch, and validation images, one of the bucket with most pixels."""
    batches, buckets = run.plan.epoch(0), run.data.buckets
    largest = max(batches, key=lambda batch: math.prod(buckets[batch[0].bucket]))
    batches[:] = [largest] * len(batches)
    run.validation_size = buckets[largest[0].bucket]


def report_dry_run(run: Run, planned_steps: int) -> None:
    """Prints the last step's time, the peak memory, and how long the planned training would take."""
    rows = read_metrics(run.args.output_dir)
    seconds = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row][-1]
    gib = peak_memory(run.accelerator.device) / 2**30
    width, height = run.validation_size
    step = f"largest bucket {width} x {height}, {seconds:.3f} s per step"
    picture = run.pictures.seconds_per_picture
    step += f", {picture:.1f} s per picture" if picture else ""
    print_status(f"dry run: {step}, peak memory {gib:.2f} GiB,")
    minutes = seconds * planned_steps / 60
    print_status(f"dry run: {planned_steps} steps would take about {minutes:.1f} minutes; nothing was kept")
