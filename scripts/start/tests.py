"""Runs the checks and tests: what run_tests.sh and run_tests.bat do.

    python scripts/start/tests.py [--quick] [arguments of pytest]

--quick leaves out the proofs that methods learn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: library and commands

from scripts.start.process import ROOT, become, program

CHECKS = (
    ("scripts/dev/compare_recipes.py",),
    ("-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-logo"),
    ("-m", "ruff", "check", "--quiet", "."),
    ("-m", "ruff", "format", "--check", "--quiet", "."),
)
SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    # the toys' matrices are small: two processes of one thread each do more than one of two
    "OMP_NUM_THREADS": "1",
}


def main(argv: list[str] | None = None) -> int:
    description = "Runs the checks and tests. Other arguments go to pytest."
    parser = argparse.ArgumentParser(prog=program(), description=description, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="all but the proofs that methods learn")
    parser.add_argument("--help_all", action="help", help=argparse.SUPPRESS)
    args, pytest_argv = parser.parse_known_args(argv)
    os.chdir(ROOT)
    for check in CHECKS:
        result = subprocess.run(
            [sys.executable, *check], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode:
            print(result.stdout, end="")
            return result.returncode
    pytest = ["-m", "pytest", "--numprocesses", "2", "--dist", "loadgroup"]
    chosen = ["-m", "not learn"] if args.quick else []
    return become([sys.executable, *pytest, *chosen, *pytest_argv], SETTINGS)


if __name__ == "__main__":
    sys.exit(main())
