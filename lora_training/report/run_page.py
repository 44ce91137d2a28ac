"""report.html of a run: one file to look at, with everything that the run's output folder tells.

Which step to take, pictures before, during and after, control prompts, curves, data, settings, files. It
reads nothing but the folder, so it can be made while the run goes on, after it, and of runs of older scripts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.errors import one_line
from lora_training.html_page import page_head, write_page
from lora_training.report import curves, layout, overview, run_details, samples
from lora_training.report.pictures import PagePictures
from lora_training.report.run_folder import read_run_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    return write_page(file, run_page_parts(run, file))


def run_page_parts(run: RunFolder, file: Path) -> Iterator[str]:
    """The page from top to bottom. file: where it will be."""
    selection = samples.SampleSelection(run)
    pictures = PagePictures(selection.count)
    sections = [
        overview.verdict_section(run),
        samples.before_and_after_section(run, selection, pictures),
        samples.over_steps_section(selection, pictures),
        samples.control_section(selection, pictures),
        curves.curves_section(run),
        run_details.data_section(run),
        run_details.settings_section(run),
        run_details.command_section(run),
        run_details.files_section(run, file),
    ]
    yield page_head(f"{run.name}: training run", layout.STYLE)
    yield overview.heading(run)
    yield layout.contents(sections)
    yield overview.summary_cards(run)
    yield from sections
    yield f"<script>{layout.SCRIPT}</script>\n"
