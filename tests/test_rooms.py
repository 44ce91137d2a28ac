"""The folders of scripts/: what stands in them directly are commands, old paths lead there, parts/ holds no command."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("rooms")]  # one worker asks every command once
SCRIPTS = ROOT / "scripts"
ROOMS = ("bases", "dataset", "lora", "measuring", "reports", "start", "toys")
COMMANDS = sorted(f.relative_to(SCRIPTS).as_posix() for room in ROOMS for f in (SCRIPTS / room).glob("*.py"))
STARTED = {"start/infer.py": "infer_lora.py", "start/prepare.py": "prepare_dataset.py"}  # which answers
MOVED = {f"{name}.py": f"lora/{name}.py" for name in ("convert_lora", "merge_lora", "inspect_lora")}
MOVED |= {
    f"{name}.py": f"measuring/{name}.py" for name in ("benchmark", "benchmark_prepare_dataset", "estimate_memory")
}
MOVED |= {"prepare_dataset.py": "dataset/prepare_dataset.py", "detect_family.py": "bases/detect_family.py"}
MOVED |= {"train_toy_base.py": "toys/train_toy_base.py", "toy_judge.py": "toys/train_judge.py"}
MOVED |= {"toy_world.py": "toys/write_sample_data.py"}


def ask(words: list[str], folder) -> tuple[int, str, str]:
    """Exit code, output and errors of a file of scripts/, run from another folder."""
    command = [sys.executable, str(SCRIPTS / words[0]), *words[1:]]
    plain = os.environ | {"COLUMNS": "100"}
    plain.pop("PYTHONPATH", None)
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, env=plain)
    return result.returncode, result.stdout, result.stderr


FORKING = """
import gc, os, runpy, sys
import torch  # what most of them wait for; each is then a program of its own, forked from here
gc.freeze()
for number, file in enumerate(sys.argv[1:]):
    sys.stdout.flush()
    if not (child := os.fork()):
        for stream, name in ((1, "said"), (2, "wrong")):
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
def answers(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    """What every command and every old path says to --help, in another folder."""
    elsewhere, names = tmp_path_factory.mktemp("elsewhere"), [*COMMANDS, *MOVED]
    plain = os.environ | {"COLUMNS": "100"}
    plain.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", FORKING, *(str(SCRIPTS / name) for name in names)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere, timeout=300, env=plain, check=True)
    codes = [int(code) for code in result.stdout.split()]
    said = [[(elsewhere / f"{n}.{kind}").read_text() for kind in ("said", "wrong")] for n in range(len(names))]
    return {name: (code, *texts) for name, code, texts in zip(names, codes, said, strict=True)}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_stands_in_a_room_is_a_command(name, answers):
    status, said, _ = answers[name]
    assert status == 0 and said.startswith(f"usage: {STARTED.get(name) or name.split('/')[1]}")
    tree = ast.parse((SCRIPTS / name).read_text(encoding="utf-8"))
    assert f"python scripts/{name}" in ast.get_docstring(tree)
    assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_old_paths_answer_as_their_commands(old, answers):
    assert answers[old][:2] == answers[MOVED[old]][:2]
    assert f"scripts/{MOVED[old]}" in ast.get_docstring(ast.parse((SCRIPTS / old).read_text(encoding="utf-8")))


def test_old_paths_take_arguments_and_give_the_exit_code(tmp_path):
    base = str(ROOT / "assets" / "toy_sdxl")
    assert ask(["detect_family.py", base], tmp_path)[:2] == (0, "sdxl\n")
    new = ask(["lora/inspect_lora.py", "nowhere.safetensors"], tmp_path)
    assert ask(["inspect_lora.py", "nowhere.safetensors"], tmp_path) == new
    assert new[0] == 2 and new[2] == "inspect_lora.py: error: nowhere.safetensors: no such file\n"


def test_parts_hold_no_command():
    parts = [*SCRIPTS.glob("parts/*.py"), *SCRIPTS.glob("*/parts/*.py")]
    assert len(parts) > 8
    for file in parts:
        text = file.read_text(encoding="utf-8")
        assert "__main__" not in text and "def main(" not in text and "sys.path" not in text, file
    folders = {f.name for f in SCRIPTS.iterdir() if f.is_dir()} - {"__pycache__"}
    assert folders == {*ROOMS, "parts"}
