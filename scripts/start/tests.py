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

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.start.parts.process import ROOT, become

CHECKS = (
    ("scripts/sync_shared.py",),
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
    parser = argparse.ArgumentParser(description="Runs the checks and tests.", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="all but the proofs that methods learn")
    args, words = parser.parse_known_args(argv)
    os.chdir(ROOT)
    for check in CHECKS:
        if code := subprocess.call([sys.executable, *check]):
            return code
    pytest = ["-m", "pytest", "--numprocesses", "2", "--dist", "loadgroup"]
    chosen = ["-m", "not learn"] if args.quick else []
    return become([sys.executable, *pytest, *chosen, *words], SETTINGS)


if __name__ == "__main__":
    sys.exit(main())
