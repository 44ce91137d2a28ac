"""The steps at which a run is validated, and the prompts that are drawn then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.data.captions import prepend_trigger
from lora_training.files import read_metrics

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example
    from lora_training.training.run import Run


def validation_schedule(args: argparse.Namespace, max_steps: int, steps_per_epoch: float) -> set[int]:
    """The steps after which validation runs: as the flags say, else about five times; always at the end."""
    every = args.validation_steps or (
        max(1, round(args.validation_epochs * steps_per_epoch))
        if args.validation_epochs
        else max(1, max_steps // 5)
    )
    return set(range(every, max_steps, every)) | {max_steps}


def is_due(run: Run, step: int) -> bool:
    """Whether a step's validation is still to be done, or to be finished: its row in metrics.jsonl is the
    last that it writes.
    """
    if step not in run.validation_steps:
        return False
    return not any(row["step"] == step and "learned" in row for row in read_metrics(run.args.output_dir))


def default_prompts(args: argparse.Namespace, examples: list[Example]) -> list[str]:
    """What pictures show: the validation prompts, else two captions."""
    if args.num_validation_images == 0 or (args.skip_final_inference and not args.validation_prompt):
        return []
    captions = [prepend_trigger(e.captions[0], e.set_args.trigger_word) for e in examples if not e.held_out]
    return list(args.validation_prompt or dict.fromkeys(captions))[: None if args.validation_prompt else 2]
