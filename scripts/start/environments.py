"""Python environments, and the packages that they have.

As all that set_up.py needs, it uses the standard library alone and can be read by Python 3.6.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from scripts.start.process import ROOT, WINDOWS

OLDEST_PYTHON = (3, 11)
NEWER_PYTHONS = ("python3.13", "python3.12", "python3.11")  # where `python3` is older
NOT_ON_WINDOWS = '; sys_platform != "win32"'  # the one marker that the requirements files have
LIST_MISSING = f"""
import importlib.metadata, sys
if sys.version_info < {OLDEST_PYTHON}: print("Python of {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or later")
for requirement in sys.argv[1:]:
    name, _, pin = requirement.partition("==")
    try: version = importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError: version = None
    if version is None or pin not in ("", version): print(name)
"""


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


def new_enough_python():
    """A Python of this system that can run the project: this one, or one of NEWER_PYTHONS; or None."""
    if sys.version_info[:2] >= OLDEST_PYTHON:
        return sys.executable
    return next(filter(None, map(shutil.which, NEWER_PYTHONS)), None)


def packages(files, pins: bool = False) -> list:
    """What requirements files ask for, with or without versions."""
    lines = [line for file in files for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if not (WINDOWS and line.endswith(NOT_ON_WINDOWS))]
    requirements = [line.split("#")[0].split(";")[0].strip() for line in lines]
    return [each if pins else re.split(r"[=<>!~\[ ]", each, maxsplit=1)[0] for each in requirements if each]


def missing_in(python: Path, names: list) -> list:
    """The packages that an interpreter doesn't have, NAME==VERSION in this version; all if it doesn't run."""
    command = [str(python), "-c", LIST_MISSING, *names]
    try:
        answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return names
    return names if answer.returncode else answer.stdout.decode().splitlines()
