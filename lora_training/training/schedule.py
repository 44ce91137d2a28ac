"""How many steps a run has, and after which of them it is validated."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.files import read_metrics

if TYPE_CHECKING:
    import argparse

    from lora_training.optim.parts import TrainedPart
    from lora_training.training.run import Run

STEPS_PER_PICTURE, AUTO_STEPS = 100, (800, 3000)  # of --max_train_steps auto
LEAST_MULTIPLIER = 0.1  # of a step size that an optimizer finds; far below, nothing is learned


def plan_steps(run: Run) -> None:
    """Sets the number of steps, those after which validation runs, and the size of validation images."""
    args, data = run.args, run.data
    steps_per_epoch = run.plan.per_epoch / args.gradient_accumulation_steps
    if args.max_train_steps == "auto":
        args.max_train_steps = steps_by_pictures(run)
    run.max_steps = args.max_train_steps or math.ceil(args.num_train_epochs * steps_per_epoch)
    if args.num_validation_images or args.validation_split:
        run.validation_steps = validation_schedule(args, run.max_steps, steps_per_epoch)
    image_counts = Counter(example.bucket for example in data.examples)
    fullest_bucket = image_counts.most_common(1)[0][0]
    run.validation_size = data.buckets[fullest_bucket]


def steps_by_pictures(run: Run) -> int:
    """--max_train_steps auto: so many that each picture is seen about STEPS_PER_PICTURE times; says so."""
    pictures = len({run.data.examples[index].digest for index in run.plan.buckets})
    samples = run.plan.size * run.args.gradient_accumulation_steps
    least, most = AUTO_STEPS
    steps = min(most, max(least, math.ceil(STEPS_PER_PICTURE * pictures / samples)))
    rule = f"{STEPS_PER_PICTURE} for each of {pictures} pictures, {samples} in a step, {least:,} to {most:,}"
    print_status(f"--max_train_steps auto: {steps} steps ({rule}); give a number to set your own")
    return steps


def validation_schedule(args: argparse.Namespace, max_steps: int, steps_per_epoch: float) -> set[int]:
    """The steps after which validation runs: as the flags say, else about five times; always the last."""
    if args.validation_steps:
        interval = args.validation_steps
    elif args.validation_epochs:
        interval = max(1, round(args.validation_epochs * steps_per_epoch))
    else:
        interval = max(1, max_steps // 5)
    return set(range(interval, max_steps, interval)) | {max_steps}


def validation_is_due(run: Run, step: int) -> bool:
    """Whether the validation after `step` is still to be done, or to be finished.

    The last thing that it writes is its row in metrics.jsonl.
    """
    if step not in run.validation_steps:
        return False
    rows = read_metrics(run.args.output_dir)
    return not any(row["step"] == step and "learned" in row for row in rows)


def report_plan(run: Run) -> None:
    """Prints how many images, batches and steps there are."""
    args, plan = run.args, run.plan
    processes, accumulated = run.accelerator.num_processes, args.gradient_accumulation_steps
    batch = f"{args.train_batch_size} x {processes} processes x {accumulated} accumulated"
    epoch = f"{len(plan.buckets)} images, {plan.per_epoch} batches per epoch"
    print_status(f"{epoch}, {run.max_steps} steps, batch {batch}")


def report_parts(run: Run) -> None:
    """Prints what is trained, how long and how fast."""
    for part in run.parts:
        size = f"{part.weights.numel() / 1e6:.3f} million parameters"
        steps = f"steps 1 to {part.last_step}, learning rate {part.learning_rate:g}"
        print_status(f"training {part.name}: {size}, {steps}")
        warn_of_rate(part, run.args)
    if run.args.deepspeed:
        mib = sum(part.weights.numel() for part in run.parts) * 8 / 2**20
        state = f"the optimizer's state ({mib:.0f} MiB) isn't split"
        way_out = "config/accelerate_config_fsdp2.yaml splits the base"
        print_status(f"DeepSpeed's launcher: trained as with DDP; {state}, and {way_out}")


def warn_of_rate(part: TrainedPart, args: argparse.Namespace) -> None:
    """Warns of a learning rate that is never reached, or with which little is learned."""
    if args.lr_warmup_steps > part.last_step:
        until = f"the {part.name} is trained for {part.last_step} steps"
        print_status(f"warning: --lr_warmup_steps {args.lr_warmup_steps}: {until}, never at its full rate")
    if part.step_size_estimate() is not None and part.learning_rate < LEAST_MULTIPLIER:
        what = f"{args.optimizer} finds its own step size for the {part.name}, and"
        print_status(f"warning: {what} the learning rate of {part.learning_rate:g} multiplies it: use 1")
