"""The library's interface: what recipes use of it has a number, and one that needs another says so."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib
import importlib.metadata
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAMILIES, ROOT

import lora_training

pytestmark = pytest.mark.unit

RECIPES = [family.script for family in FAMILIES.values()]
SCRIPTS = [*RECIPES, "infer_lora.py"]
INTERFACE = 1
SIGNATURES = "f4e4abb5b5bff427"  # of everything that recipes use of the library, as interface 1 has it


def used_names(script: Path) -> set[tuple[str, str]]:
    """(module, name) of what a script uses of the library, such as `data.load_sets` or `print_status`."""
    tree, packages, names = ast.parse(script.read_text(encoding="utf-8")), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "lora_training":
            packages |= {alias.name: f"lora_training.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("lora_training."):
            names |= {(node.module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        owner = node.value if isinstance(node, ast.Attribute) else None
        if isinstance(owner, ast.Name) and owner.id in packages:
            names.add((packages[owner.id], node.attr))
    return names


def describe_call(function) -> str:
    """A function's parameters: kind, name and default of each; annotations are no part of the interface."""
    parameters = inspect.signature(function).parameters.values()
    empty = inspect.Parameter.empty
    defaults = ["" if p.default is empty else f"={p.default!r}" for p in parameters]
    return ", ".join(f"{p.kind.name} {p.name}{default}" for p, default in zip(parameters, defaults))


def describe(value) -> list[str]:
    """What callers rely on: a function's parameters; a class's fields, constructor and public methods."""
    if not inspect.isclass(value):
        return [describe_call(value)] if callable(value) else describe(type(value))
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    lines = [f"field {field.name}" for field in fields]
    for name, member in sorted(vars(value).items()):
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(member, property):
            lines.append(f"property {name}")
        elif inspect.isfunction(member):
            lines.append(f"{name}: {describe_call(member)}")
    return lines


def test_a_changed_signature_has_a_new_number():
    names = set().union(*(used_names(ROOT / script) for script in RECIPES))
    assert len(names) > 60
    lines = []
    for module, name in sorted(names):
        value = getattr(importlib.import_module(module), name)
        lines += [f"{module}.{name} {line}" for line in describe(value)]
    signatures = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    advice = (
        "raise lora_training.INTERFACE, the number in the recipes and in this file, and the hash beside it"
    )
    assert (lora_training.INTERFACE, signatures) == (INTERFACE, SIGNATURES), advice


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_ask_for_the_librarys_number(name):
    calls = [node for node in ast.walk(ast.parse((ROOT / name).read_text())) if isinstance(node, ast.Call)]
    asked = [call.args[0].value for call in calls if getattr(call.func, "id", None) == "require_interface"]
    assert asked == [INTERFACE]


def run_alone(script: Path) -> tuple[int, list[str]]:
    """(exit code, lines on stderr) of a script that finds nothing but what is beside it."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, str(script), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=script.parent, env=environment)
    assert result.returncode == 0 or not result.stdout
    return result.returncode, result.stderr.splitlines()


@pytest.fixture
def copied(tmp_path):
    """Copies a script alone into a folder. Where the library is installed, none is ever without it."""
    if any(found.name == "lora_training" for found in importlib.metadata.distributions()):
        pytest.skip("the library is installed in this environment")
    return lambda name: Path(shutil.copy(ROOT / name, tmp_path))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_the_library_says_so_in_a_line(name, copied):
    code, lines = run_alone(copied(name))
    assert code != 0 and len(lines) == 1
    assert lines[0].startswith(f"{name}: error: ") and "lora_training" in lines[0]
    assert "pip install" in lines[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_beside_another_interface_says_so_in_a_line(name, copied):
    script, library = copied(name), "lora_training/__init__.py"
    text = (ROOT / library).read_text()
    assert text.count(f"INTERFACE = {INTERFACE}") == 1
    (script.parent / "lora_training").mkdir()
    (script.parent / library).write_text(text.replace(f"INTERFACE = {INTERFACE}", "INTERFACE = 99"))
    code, lines = run_alone(script)
    assert code != 0 and len(lines) == 1
    assert lines[0].startswith(f"{name}: error: ") and "interface 99" in lines[0]
    assert f"needs {INTERFACE}" in lines[0] and "pip install" in lines[0]
