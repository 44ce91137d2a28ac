"""Makes one page of several training runs: what differs in their settings, curves, and pictures side by side.

    python scripts/reports/compare_runs.py output/rank4 output/rank16 output/rank64
    python scripts/reports/compare_runs.py output/a output/b -o a_or_b.html

Reads nothing but the output folders, as report.py does; what a run lacks is left out. Exit status 2: no such
run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, which has the library

from lora_training.exits import run_command
from lora_training.report.comparison_page import write_comparison_page


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Makes one page of several training runs from their output folders."
    )
    folders_help = "output folders of runs, finished or not"
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help=folders_help)
    file = Path("compare.html")
    output_help = f"default: {file}"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", default=file, help=output_help)
    return parser.parse_args(argv)


@run_command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(write_comparison_page(args.folders, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
