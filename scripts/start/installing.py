"""Makes a virtual environment and fills it, once.

As all that set_up.py needs, it uses the standard library alone and can be read by Python 3.6.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from scripts.start import environments
from scripts.start.environments import missing_in, new_enough_python, packages, python_in
from scripts.start.process import ROOT, WINDOWS


class SetUpError(Exception):
    """What stands in the way, and the way out."""


def fill(venv: Path, files, uv) -> Path:
    """Makes .venv and installs what its stamps don't name yet; returns its interpreter."""
    python = python_in(venv)
    for file in files:
        stamp, requirements = venv / f".ready-{file}", (ROOT / file).read_text(encoding="utf-8")
        if python.exists() and is_current(stamp, requirements):
            continue
        if missing_in(python, packages([file], pins=True)):  # else it was filled without leaving a stamp
            install(venv, file, uv)
        stamp.write_text(requirements, encoding="utf-8")
    return python


def is_current(stamp: Path, requirements: str) -> bool:
    """Whether a stamp is of these requirements, and no package came or went since, as by `uv sync`."""
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != requirements:
        return False
    folders = [*stamp.parent.glob("lib/python*/site-packages"), *stamp.parent.glob("Lib/site-packages")]
    return all(folder.stat().st_mtime <= stamp.stat().st_mtime for folder in folders)


def install(venv: Path, file: str, uv) -> None:
    """Installs what a requirements file asks for. Errors: SetUpError with the command that has failed."""
    print(f"setting up: {file} into {venv.name} (once; some minutes)", flush=True)
    for command in install_commands(venv, file, uv):
        if subprocess.call(command):
            debian = ""
            if "venv" in command:
                debian = "; on Debian and Ubuntu, `apt install python3-venv` first"
                shutil.rmtree(str(venv), ignore_errors=True)  # a half-made one would be taken for whole
            text = " ".join(map(str, command))
            way_out = f"see above; start again to go on with it{debian}"
            raise SetUpError(f"the set-up ended at `{text}`, {way_out}")
    if not uv and needs_other_torch():
        way_out = "install the build that pytorch.org/get-started names"
        print(f"note: this torch may not see your GPU: {way_out}", flush=True)


def install_commands(venv: Path, file: str, uv, windows: bool = WINDOWS) -> list:
    """The commands that make the environment, where it isn't there, and fill it from a requirements file.

    uv: its path, or None for venv and pip.
    """
    python = python_in(venv, windows)
    commands = [] if python.exists() else [make_command(venv, uv)]
    if uv:
        # PyPI's torch has CUDA on Linux, and no GPU at all on Windows, nor AMD's anywhere
        other_torch = ["--torch-backend", "auto"] if needs_other_torch(windows) else []
        install = [uv, "pip", "install", "--python", str(python), *other_torch]
    else:
        install = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    return [*commands, [*install, "-r", str(ROOT / file)]]


def make_command(venv: Path, uv) -> list:
    """The command that makes the environment. Errors: SetUpError without a Python that is new enough."""
    oldest = ".".join(map(str, environments.OLDEST_PYTHON))
    if uv:  # which fetches a Python, where there is none
        is_new = sys.version_info[:2] >= environments.OLDEST_PYTHON
        return [uv, "venv", "--python", sys.executable if is_new else oldest, str(venv)]
    base = new_enough_python()
    if base is None:
        version = ".".join(map(str, sys.version_info[:3]))
        raise SetUpError(f"Python {oldest} or later is needed; found {version}")
    return [base, "-m", "venv", str(venv)]


def needs_other_torch(windows: bool = WINDOWS) -> bool:
    """Whether this machine's GPU needs another build of torch than PyPI has."""
    return (windows and has_nvidia_gpu()) or shutil.which("rocminfo") is not None


def has_nvidia_gpu() -> bool:
    """Whether this machine has a working NVIDIA GPU."""
    program = shutil.which("nvidia-smi")
    return program is not None and subprocess.call([program], stdout=subprocess.DEVNULL) == 0
