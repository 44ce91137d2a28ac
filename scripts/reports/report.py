"""Makes report.html of a training run: one file to look at, with everything that its output folder tells.

    python scripts/reports/report.py output/mine
    python scripts/reports/report.py output/mine -o elsewhere.html

Which step to take, pictures before, during and after, control prompts, curves, data, settings, files. It
reads nothing but the folder, so it works while the run goes on, after it, and on runs of older scripts; what
isn't there is left out. Exit status 2: no such run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, which has the library

from lora_training.exits import run_command
from lora_training.report.run_page import write_run_page


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Makes report.html of a training run from its output folder."
    )
    parser.add_argument("folder", type=Path, help="the output folder of a run, finished or not")
    output_help = "default: report.html in the folder"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=output_help)
    return parser.parse_args(argv)


@run_command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    print(write_run_page(args.folder, args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
