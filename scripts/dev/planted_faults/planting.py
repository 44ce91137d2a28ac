"""Plants a fault in a copy of the project, and runs the tests that have to see it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lora_training.errors import UserError
from scripts.dev import ROOT
from scripts.dev.planted_faults.fault import Fault

TIMEOUT = 1800  # seconds for the tests of one fault
PYTEST_OPTIONS = (
    *("-q", "-x", "--tb=no", "-rfE", "-n", "0", "-o", "addopts="),
    *("-p", "no:warnings", "-p", "no:cacheprovider"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def faulty_texts(fault: Fault, root: Path) -> dict[Path, str]:
    """{file: its text with the fault}.

    Errors: UserError if the old text doesn't stand in each exactly once.
    """
    files = sorted(root.glob(fault.files))
    if not files:
        raise UserError(f"{fault.name}: there is no {fault.files}")
    texts = {}
    for file in files:
        text = file.read_text(encoding="utf-8")
        if text.count(fault.old) != 1:
            problem = f"stands {text.count(fault.old)} times in {file.relative_to(root)}, not once"
            raise UserError(f"{fault.name}: {fault.old!r} {problem}")
        texts[file] = text.replace(fault.old, fault.new)
    return texts


def files_defining(test: str, root: Path) -> list[Path]:
    """The files of tests/ that define a test. Errors: UserError if there is none."""
    name = shlex.split(test)[0]
    pattern = re.compile(rf"^\s*def {name}\(", re.MULTILINE)
    files = sorted((root / "tests").rglob("test_*.py"))
    matches = [file for file in files if pattern.search(file.read_text(encoding="utf-8"))]
    if not matches:
        raise UserError(f"no test is called {name}")
    return matches


def check_fault(fault: Fault, root: Path) -> None:
    """Errors: UserError if a fault's text or one of its tests isn't there."""
    faulty_texts(fault, root)
    for test in fault.tests:
        files_defining(test, root)


def copy_repository(target: Path) -> None:
    """Copies what git knows of, as it stands in the working tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listing.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def run_test(test: str, folder: Path) -> tuple[bool, str]:
    """(whether a test passes in a copy, the first case of it that fails).

    Errors: UserError if pytest can't run it.
    """
    name, *options = shlex.split(test)
    nodes = [f"{file.relative_to(folder)}::{name}" for file in files_defining(test, folder)]
    command = [sys.executable, "-m", "pytest", *nodes, *options, *PYTEST_OPTIONS]
    environment = os.environ | ENVIRONMENT
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment, timeout=TIMEOUT
    )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode not in (0, 1) or (result.returncode == 1 and failed is None):
        output = " ".join(result.stdout.split())[-300:]
        raise UserError(f"{test}: pytest ended with {result.returncode}: {output}")
    return result.returncode == 0, failed.group(1).removeprefix("tests/") if failed else ""


@contextlib.contextmanager
def planted(fault: Fault, folder: Path) -> Iterator[None]:
    """While inside, the fault stands in a copy of the project. Errors: SyntaxError if it's no Python."""
    texts = faulty_texts(fault, folder)
    originals = {file: file.read_text(encoding="utf-8") for file in texts}
    try:
        for file, text in texts.items():
            compile(text, f"{file.name} with {fault.name!r}", "exec")
            file.write_text(text, encoding="utf-8")
        yield
    finally:
        for file, text in originals.items():
            file.write_text(text, encoding="utf-8")


def try_fault(fault: Fault, folder: Path) -> dict[str, object]:
    """Plants one fault in a copy, runs its tests, and takes it out again. Returns its row of results."""
    began, caught_by = time.perf_counter(), ""
    with planted(fault, folder):
        for test in fault.tests:
            passed, caught_by = run_test(test, folder)
            if not passed:
                break
    return {"fault": fault.name, "caught": caught_by, "seconds": round(time.perf_counter() - began)}
