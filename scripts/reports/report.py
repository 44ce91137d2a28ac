"""Makes report.html of a training run: one file to look at, with everything that the run's output folder tells.

    python scripts/reports/report.py output/mine
    python scripts/reports/report.py output/mine -o elsewhere.html

Which step to take, pictures before, during and after, control prompts, curves, data, settings, files. It reads nothing but the folder, so it
works while the run goes on, after it, and on runs of older scripts; what isn't there is left out. Exit status 2: no such run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts import page
from scripts.parts.netted import netted
from scripts.reports.parts import sections
from scripts.reports.parts.pictures import Pictures
from scripts.reports.parts.run_folder import FolderError, Run, read_run


def parts_of_report(run: Run, file: Path) -> Iterator[str]:
    """The page from top to bottom."""
    shown = sections.Shown(run)
    pictures = Pictures(shown.count)
    body = [
        sections.verdict(run),
        sections.before_and_after(run, shown, pictures),
        sections.over_steps(run, shown, pictures),
        sections.controls(run, shown, pictures),
        sections.curves(run),
        sections.data_summary(run),
        sections.settings_tables(run),
        sections.origin(run),
        sections.file_list(run, file),
    ]
    yield page.head(f"{run.name}: training run", sections.STYLE)
    yield sections.heading(run)
    yield sections.contents(body)
    yield sections.cards(run)
    yield from body
    yield f"<script>{sections.SCRIPT}</script>\n"


def write_report(folder: Path, file: Path | None = None) -> Path:
    """Writes the report of an output folder, to its report.html unless told otherwise. Returns the file. Errors: FolderError
    for a folder that isn't there or holds no run, OSError where nothing can be written.
    """
    folder = Path(folder)
    run, file = read_run(folder), file or folder / "report.html"
    return page.write_page(file, parts_of_report(run, file))


@netted
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes report.html of a training run from its output folder.")
    parser.add_argument("folder", type=Path, help="the output folder of a run, finished or not")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: report.html in the folder")
    args = parser.parse_args(argv)
    try:
        print(write_report(args.folder, args.output))
    except (FolderError, OSError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
