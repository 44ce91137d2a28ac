"""A training script carried elsewhere: with the library in one file, or with a copy of it beside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE, SD15, quick_flags, run_here, same_weights

from scripts import bundle

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("processes")]

FLAGS = ("-d", SAMPLE, "--max_train_steps", 2, "--report")


def run_python(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    """Python with these arguments in a folder, from which it sees nothing of the project."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


def has_page(output: Path) -> bool:
    """Whether the run's page was made of its template, with style and script."""
    page = (output / "report.html").read_text(encoding="utf-8")
    return all(text in page for text in ("<h2>Curves</h2>", ".legend {", "querySelectorAll('.plot')"))


def test_one_file_trains_as_the_script_does(tmp_path, capsys):
    file, elsewhere = tmp_path / "bundle.pyz", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert bundle.main([str(ROOT / SD15.script), "--output", str(file)]) == 0
    assert f"python {file} --help" in capsys.readouterr().out
    result = run_python(file, *quick_flags(SD15, tmp_path / "bundled", *FLAGS), folder=elsewhere)
    assert result.returncode == 0, result.stderr
    assert run_here(SD15, tmp_path / "plain", *FLAGS) == 0
    assert same_weights(tmp_path / "bundled", tmp_path / "plain")
    assert has_page(tmp_path / "bundled") and has_page(tmp_path / "plain")


def test_a_bundle_of_no_script_is_refused(tmp_path, capsys):
    assert bundle.main([str(tmp_path / "none.py")]) == 2
    assert "none.py: no such Python file" in capsys.readouterr().err


def test_a_copy_of_script_and_library_runs(tmp_path):
    """`cp -r lora_training train_lora_sd15.py THERE`; a line in the copy shows which library is used."""
    from ready_process import start

    script = Path(shutil.copy(ROOT / SD15.script, tmp_path))
    library = shutil.copytree(
        ROOT / "lora_training", tmp_path / "lora_training", ignore=shutil.ignore_patterns("__pycache__")
    )
    with open(library / "__init__.py", "a", encoding="utf-8") as file:
        file.write('\nprint("the copy")\n')
    answer = run_python(script, "--help", folder=tmp_path)
    assert answer.returncode == 0 and answer.stdout.startswith(f"the copy\nusage: {SD15.script}")
    log = tmp_path / "log"
    flags = quick_flags(SD15, tmp_path / "out", *FLAGS, "--max_train_steps", 1)
    process = start(script, flags, {}, log, tmp_path)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert "the copy" in log.read_text()
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()
    assert has_page(tmp_path / "out")
