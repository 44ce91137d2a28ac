"""--dry_run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.training.machine import peak_memory

if TYPE_CHECKING:
    from lora_training.training.run import Run


def rehearse(run: Run, train) -> None:
    """--dry_run: two steps at the largest bucket (the second is timed), a checkpoint; prints time and memory.

    train: the recipe's loop.
    """
    args, planned = run.args, run.max_steps
    batches, buckets = run.plan.epoch(0), run.data.buckets
    largest = max(batches, key=lambda batch: math.prod(buckets[batch[0].bucket]))
    batches[:] = [largest] * len(batches)
    run.plan_size = buckets[largest[0].bucket]
    run.max_steps = args.checkpointing_steps = min(2, planned)
    args.logging_steps, run.validation_steps = 1, {run.max_steps}
    train(run, 0)
    rows = [
        json.loads(line) for line in (Path(args.output_dir) / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    seconds = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row][-1]
    memory, size = peak_memory(run.accelerator.device) / 2**30, "{} x {}".format(*run.plan_size)
    print_status(f"dry run: largest bucket {size}, {seconds:.3f} s per step, peak memory {memory:.2f} GiB,")
    print_status(
        f"dry run: {planned} steps would take about {seconds * planned / 60:.1f} minutes; nothing was kept"
    )
