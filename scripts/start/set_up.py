#!/usr/bin/env python3
"""Finds or makes a Python that has this project's packages and starts a job with it: what the run_* wrappers call.

    python scripts/start/set_up.py run_lora_train [flags of the job]

An active virtual or conda environment that has the packages of requirements.txt is used as it is; else .venv is made, and
filled once, with uv where that is installed. It runs before any package is there, so it needs the standard library only.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.start.parts.process import ROOT, WINDOWS, become, complain

OLDEST_PYTHON = (3, 11)
NEWER_PYTHONS = ("python3.13", "python3.12", "python3.11")  # where `python3` is older
JOBS = {  # wrapper: what it starts, and what has to be installed for it
    "run_lora_train": ("scripts/start/train.py", ("requirements.txt",)),
    "run_lora_infer": ("scripts/start/infer.py", ("requirements.txt",)),
    "run_prepare_dataset": ("scripts/start/prepare.py", ("requirements.txt",)),
    "run_tests": ("scripts/start/tests.py", ("requirements.txt", "requirements-dev.txt")),
    "environment": ("", ("requirements.txt",)),
}
LIST_MISSING = f"""
import importlib.metadata, sys
if sys.version_info < {OLDEST_PYTHON}: print("Python of {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or later")
for word in sys.argv[1:]:
    name, _, pin = word.partition("==")
    try: found = importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError: found = None
    if found is None or pin not in ("", found): print(name)
"""


class SetUpError(Exception):
    """What stands in the way, and the way out."""


def python_in(folder: Path, windows: bool = WINDOWS) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if windows else "bin/python")


def active_python(variables, windows: bool = WINDOWS):
    """The interpreter of the environment that is active, as its variables say; or None."""
    if variables.get("VIRTUAL_ENV"):
        return python_in(Path(variables["VIRTUAL_ENV"]), windows)
    if variables.get("CONDA_PREFIX"):
        folder = Path(variables["CONDA_PREFIX"])
        return folder / "python.exe" if windows else python_in(folder, windows)
    return None


def packages(files, pins: bool = False) -> list:
    """What requirements files ask for, with or without versions."""
    lines = [line for file in files for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    wanted = [line.split("#")[0].split(";")[0].strip() for line in lines]
    return [name if pins else re.split(r"[=<>!~\[ ]", name, maxsplit=1)[0] for name in wanted if name]


def missing_in(python: Path, names: list) -> list:
    """Those packages that an interpreter doesn't have, NAME==VERSION in this version; all of them if it doesn't run."""
    try:
        answer = subprocess.run(
            [str(python), "-c", LIST_MISSING, *names], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return names
    return names if answer.returncode else answer.stdout.decode().splitlines()


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and subprocess.call(["nvidia-smi"], stdout=subprocess.DEVNULL) == 0


def install_commands(venv: Path, file: str, uv, windows: bool = WINDOWS) -> list:
    """The commands that make the environment, where it isn't there, and fill it from a requirements file."""
    python, commands = python_in(venv, windows), []
    if not python.exists():
        base = sys.executable
        if sys.version_info[:2] < OLDEST_PYTHON:
            base = "%d.%d" % OLDEST_PYTHON if uv else next(filter(None, map(shutil.which, NEWER_PYTHONS)), None)  # noqa: UP031
        if base is None:
            found = ".".join(map(str, sys.version_info[:3]))
            raise SetUpError("Python %d.%d or later is needed; found %s" % (*OLDEST_PYTHON, found))  # noqa: UP031
        commands.append([uv, "venv", "--python", base, str(venv)] if uv else [base, "-m", "venv", str(venv)])
    if uv:
        # PyPI's torch has CUDA on Linux, and no GPU at all on Windows, nor AMD's anywhere
        other_torch = ["--torch-backend", "auto"] if needs_other_torch(windows) else []
        return [*commands, [uv, "pip", "install", "--python", str(python), *other_torch, "-r", str(ROOT / file)]]
    return [*commands, [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-r", str(ROOT / file)]]


def needs_other_torch(windows: bool = WINDOWS) -> bool:
    """Whether this machine's GPU needs another build of torch than PyPI has."""
    return (windows and has_nvidia_gpu()) or shutil.which("rocminfo") is not None


def fill(venv: Path, files, uv) -> Path:
    """Makes .venv and installs what its stamps don't name yet; returns its interpreter."""
    python = python_in(venv)
    for file in files:
        stamp, wanted = venv / f".ready-{file}", (ROOT / file).read_text(encoding="utf-8")
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted and python.exists():
            continue
        if not missing_in(python, packages([file], pins=True)):  # of a set-up that left no such stamp
            stamp.write_text(wanted, encoding="utf-8")
            continue
        print(f"setting up: {file} into {venv.name} (once; some minutes)", flush=True)
        for command in install_commands(venv, file, uv):
            if subprocess.call(command):
                shown = " ".join(map(str, command))
                debian = ""
                if "venv" in command:
                    debian = "; on Debian and Ubuntu, `apt install python3-venv` first"
                    shutil.rmtree(str(venv), ignore_errors=True)  # a half-made one would be taken for whole
                raise SetUpError(f"the set-up ended at `{shown}`, see above; start again to go on with it{debian}")
        stamp.write_text(wanted, encoding="utf-8")
        if not uv and needs_other_torch():
            print(
                "note: this torch may not see your GPU: install the build that pytorch.org/get-started names",
                flush=True,
            )
    return python


def find_python(files, variables) -> Path:
    """The interpreter that has everything: the active environment's, else .venv's, which is made and filled."""
    active = active_python(variables)
    if active is not None:
        missing = missing_in(active, packages(files))
        if not missing:
            return active
        lacking = ", ".join(missing[:4]) + (", …" if missing[4:] else "")
        print(f"the active environment lacks {lacking}: using .venv instead", flush=True)
    return fill(ROOT / ".venv", files, shutil.which("uv"))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description="Finds or makes a Python with this project's packages, and starts a job."
    )
    parser.add_argument(
        "wrapper", choices=sorted(JOBS), help="what is started; `environment`: nothing, the interpreter is printed"
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, help="flags of the job")
    args = parser.parse_args(argv)
    script, files = JOBS[args.wrapper]
    asks_for_help = args.wrapper == "run_lora_train" and {"-h", "--help", "--help_all"} & set(args.words)
    try:
        if asks_for_help and sys.version_info >= OLDEST_PYTHON:  # which no package is needed for
            python = sys.executable
        else:
            python = str(find_python(files, os.environ))
    except SetUpError as error:
        return complain(str(error))
    except KeyboardInterrupt:
        return 130
    if not script:
        print(python)
        return 0
    return become([python, str(ROOT / script), *args.words], {"STARTED_AS": args.wrapper})


if __name__ == "__main__":
    sys.exit(main())
