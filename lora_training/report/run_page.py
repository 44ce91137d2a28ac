"""report.html while a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.errors import one_line

if TYPE_CHECKING:
    from lora_training.training.run import Run


def write_report(run: Run) -> None:
    """--report: makes report.html of what is in the output folder so far.

    A fault there never ends a training.
    """
    if run.args.report:
        import runpy

        try:
            page = run.args.script.parent / "scripts" / "reports" / "report.py"
            runpy.run_path(str(page))["write_report"](Path(run.args.output_dir))
        except Exception as error:
            print_status(f"warning: report.html could not be written: {one_line(error)}")
