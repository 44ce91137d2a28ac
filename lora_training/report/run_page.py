"""report.html of a run: one file to look at, with everything that the run's output folder tells.

Which step to take, pictures before, during and after, control prompts, curves, data, settings, files. It
reads nothing but the folder, so it can be made while the run goes on, after it, and of runs of older scripts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.errors import one_line
from lora_training.html_page import write_page
from lora_training.report.curves import run_plots
from lora_training.report.overview import progress_notes, read_verdict, summary_cards
from lora_training.report.run_details import data_summary, file_rows, setting_tables
from lora_training.report.run_folder import read_run_folder
from lora_training.report.samples import page_samples

if TYPE_CHECKING:
    from lora_training.report.pictures import LinkedPictures, PagePictures
    from lora_training.report.run_folder import RunFolder
    from lora_training.training.run import Run


def write_report(run: Run) -> None:
    """--report: makes report.html of what is in the output folder so far.

    A fault there never ends a training.
    """
    if run.args.report:
        try:
            write_run_page(Path(run.args.output_dir))
        except Exception as error:
            print_status(f"warning: report.html could not be written: {one_line(error)}")


def write_run_page(folder: Path, file: Path | None = None) -> Path:
    """Writes the page of an output folder, to its report.html if no other file is named. Returns the file.

    Errors: UserError for a folder that isn't there or holds no run, OSError where nothing can be written.
    """
    folder = Path(folder)
    run, file = read_run_folder(folder), file or folder / "report.html"
    return write_page(file, "run.html", files=file_rows(run, file), **page_values(run))


def page_values(run: RunFolder, pictures: PagePictures | LinkedPictures | None = None) -> dict[str, object]:
    """What the page of a run shows, but for the files. pictures: how they come onto it, else inside it."""
    return {
        "run": run,
        "notes": progress_notes(run),
        "cards": summary_cards(run),
        "verdict": read_verdict(run),
        "samples": page_samples(run, pictures),
        "plots": run_plots(run),
        "data": data_summary(run),
        "settings": setting_tables(run),
    }
