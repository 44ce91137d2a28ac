"""The end of a run: its results written, shown and uploaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import progress
from lora_training.report.results import push_to_hub, save_results
from lora_training.report.run_page import write_report
from lora_training.training.output_folder import FINISHED
from lora_training.training.run import on_main_process
from lora_training.training.summary import print_summary

if TYPE_CHECKING:
    from lora_training.training.run import Run


def finish(run: Run) -> None:
    """Writes what follows the weights, says where everything is, and marks the run as finished.

    The mark is a comment in config.yaml.
    """
    args = run.args
    with progress("writing the results"):
        on_main_process(run, save_results, run)
        on_main_process(run, write_report, run)
        run.accelerator.end_training()
    print_summary(args)
    if run.accelerator.is_main_process:
        if args.push_to_hub:
            with progress("uploading"):
                push_to_hub(args)
        with Path(args.output_dir, "config.yaml").open("a", encoding="utf-8") as file:
            file.write(f"{FINISHED}{run.max_steps}\n")
