"""The files of scripts/: commands answer from anywhere, old paths lead to new ones, modules are none."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("commands")]  # one worker asks every command once
SCRIPTS = ROOT / "scripts"
FOLDERS = {"bases", "dataset", "dev", "lora", "measuring", "reports", "start"}
SOURCES = {
    file.relative_to(SCRIPTS).as_posix(): file.read_text(encoding="utf-8") for file in SCRIPTS.rglob("*.py")
}
MOVED = {  # paths of old commands, which still work: where they stand now
    **{f"{name}.py": f"lora/{name}.py" for name in ("convert_lora", "merge_lora", "inspect_lora")},
    "detect_family.py": "bases/detect_family.py",
    "estimate_memory.py": "measuring/estimate_memory.py",
    "prepare_dataset.py": "dataset/prepare_dataset.py",
}
COMMANDS = sorted(name for name, source in SOURCES.items() if 'if __name__ == "__main__"' in source)
MODULES = sorted(SOURCES.keys() - set(COMMANDS) - set(MOVED))
ANSWERING = {"start/infer.py": "infer_lora.py", "start/prepare.py": "prepare_dataset.py"}  # which they start


def run_command(argv: list[str], folder) -> tuple[int, str, str]:
    """Exit code, output and errors of a file of scripts/, run from another folder."""
    command = [sys.executable, str(SCRIPTS / argv[0]), *argv[1:]]
    environment = os.environ | {"COLUMNS": "100"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, env=environment)
    return result.returncode, result.stdout, result.stderr


FORKING = """
import gc, os, runpy, sys
import torch  # what most of them wait for; each is then a program of its own, forked from here
gc.freeze()
for number, file in enumerate(sys.argv[1:]):
    sys.stdout.flush()
    if not (child := os.fork()):
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv, sys.path[0] = [file, "--help"], os.path.dirname(file)
        try:
            runpy.run_path(file, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the half second in which torch is tidied up
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """How every command and every old path answers --help, in another folder: exit code, output, errors."""
    folder, names = tmp_path_factory.mktemp("elsewhere"), [*COMMANDS, *MOVED]
    environment = os.environ | {"COLUMNS": "100"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", FORKING, *(str(SCRIPTS / name) for name in names)]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, timeout=300, env=environment, check=True
    )
    codes = [int(code) for code in result.stdout.split()]
    texts = [[(folder / f"{n}.{kind}").read_text() for kind in ("out", "err")] for n in range(len(names))]
    return {name: (code, *text) for name, code, text in zip(names, codes, texts, strict=True)}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_answer_from_any_folder_and_say_how_they_are_called(name, help_texts):
    code, output, _ = help_texts[name]
    assert code == 0 and output.startswith(f"usage: {ANSWERING.get(name) or name.rpartition('/')[2]}")
    tree = ast.parse(SOURCES[name])
    assert f"python scripts/{name}" in ast.get_docstring(tree)
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_paths_answer_as_their_commands(old, help_texts):
    assert help_texts[old][:2] == help_texts[MOVED[old]][:2]
    assert f"scripts/{MOVED[old]}" in ast.get_docstring(ast.parse(SOURCES[old]))


def test_old_paths_take_arguments_and_give_the_exit_code(tmp_path):
    base = str(ROOT / "assets" / "toy_sdxl")
    assert run_command(["detect_family.py", base], tmp_path)[:2] == (0, "sdxl\n")
    new = run_command(["lora/inspect_lora.py", "nowhere.safetensors"], tmp_path)
    assert run_command(["inspect_lora.py", "nowhere.safetensors"], tmp_path) == new
    assert new[0] == 2 and new[2] == "inspect_lora.py: error: nowhere.safetensors: no such file\n"


def test_other_files_are_modules_and_no_commands():
    assert len(MODULES) > 20
    for name in MODULES:
        for line in ("if __name__", "def main(", "sys.path.insert"):
            assert line not in SOURCES[name], name
    assert {file.name for file in SCRIPTS.iterdir() if file.is_dir()} - {"__pycache__"} == FOLDERS


def test_no_line_of_a_command_is_too_long():
    for name, source in SOURCES.items():
        assert all(len(line) <= 110 for line in source.splitlines()), name
        assert source.count("\n") <= 400, name


def test_pages_name_commands_that_are_there():
    """In README, docs/ and the docstrings; docs/moves.md also has the old ones."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "assets").rglob("README.md")]
    pages += [*(ROOT / "scripts").rglob("README.md")]
    texts = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages}
    texts.pop("docs/moves.md", None)
    for name, text in (texts | SOURCES).items():
        for path in re.findall(r"\bscripts/[\w/]+\.py\b", text):
            assert (ROOT / path).is_file(), f"{name} names {path}"


def test_moves_lead_to_commands_that_are_there():
    rows = (ROOT / "docs" / "moves.md").read_text(encoding="utf-8").splitlines()
    moves = [re.findall(r"`([^`]+)`", row) for row in rows if row.startswith("| `")]
    assert len(moves) > 10
    for old, new in moves:
        assert (ROOT / new).is_file(), new
        assert (old.removeprefix("scripts/") in MOVED) == (ROOT / old).is_file(), old
