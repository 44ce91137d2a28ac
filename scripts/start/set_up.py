#!/usr/bin/env python3
"""Finds or makes a Python that has this project's packages and starts a job with it: for the run_* wrappers.

    python scripts/start/set_up.py run_lora_train [flags of the job]

An active virtual or conda environment that has the packages of requirements.txt is used as it is; else .venv
is made, and filled once, with uv where that is installed. It runs before any package is there, so it needs
the standard library only. Nothing is installed for a help: docs/help has them.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: library and commands

from scripts.start.environments import active_python, missing_in, packages, python_in
from scripts.start.installing import SetUpError, fill
from scripts.start.process import ROOT, become, report_error

HELP_FLAGS = {"-h", "--help", "--help_all"}
JOBS = {  # wrapper: what it starts, and what has to be installed for it
    "run_lora_train": ("scripts/start/train.py", ("requirements.txt",)),
    "run_lora_infer": ("scripts/start/infer.py", ("requirements.txt",)),
    "run_prepare_dataset": ("scripts/start/prepare.py", ("requirements.txt",)),
    "run_tests": ("scripts/start/tests.py", ("requirements.txt", "requirements-dev.txt")),
    "environment": ("", ("requirements.txt",)),
}


def find_python(files, variables) -> Path:
    """The interpreter that has everything: the active environment's, else that of .venv, which is filled."""
    active = active_python(variables)
    if active is not None:
        missing = missing_in(active, packages(files))
        if not missing:
            return active
        names = ", ".join(missing[:4]) + (", …" if missing[4:] else "")
        print(f"the active environment lacks {names}: using .venv instead", flush=True)
    return fill(ROOT / ".venv", files, shutil.which("uv"))


def ready_python(files, variables):
    """The interpreter of the active environment or of .venv, if it has the packages already; or None."""
    for python in (active_python(variables), python_in(ROOT / ".venv")):
        if python is not None and not missing_in(python, packages(files)):
            return python
    return None


def stored_help(wrapper: str, job_argv) -> str:
    """The help of a job as docs/help has it, for where the packages aren't there to make it."""
    names = [wrapper + "_all"] if "--help_all" in job_argv else []
    files = [ROOT / "docs" / "help" / (name + ".txt") for name in [*names, wrapper]]
    return next(file for file in files if file.is_file()).read_text(encoding="ascii")


def main(argv=None) -> int:
    description = "Finds or makes a Python with this project's packages, and starts a job."
    parser = argparse.ArgumentParser(description=description)
    what = "what is started; `environment`: nothing, the interpreter is printed"
    parser.add_argument("wrapper", choices=sorted(JOBS), help=what)
    parser.add_argument("job_argv", nargs=argparse.REMAINDER, metavar="...", help="flags of the job")
    args = parser.parse_args(argv)
    script, files = JOBS[args.wrapper]
    try:
        if script and HELP_FLAGS & set(args.job_argv):
            python = ready_python(files, os.environ)
            if python is None:
                print(stored_help(args.wrapper, args.job_argv), end="")
                return 0
        else:
            python = find_python(files, os.environ)
    except SetUpError as error:
        return report_error(str(error))
    except KeyboardInterrupt:
        return 130
    if not script:
        print(python)
        return 0
    return become([str(python), str(ROOT / script), *args.job_argv], {"STARTED_AS": args.wrapper})


if __name__ == "__main__":
    sys.exit(main())
