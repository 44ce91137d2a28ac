"""scripts/start/set_up.py: which Python a job gets, and what is installed for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from scripts.start import environments, installing, process, set_up

pytestmark = pytest.mark.unit


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project in place of this one."""
    for module in (environments, installing, set_up):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_interpreters_of_environments_on_each_system(tmp_path):
    for variables, windows, expected in (
        ({}, False, None),
        ({"VIRTUAL_ENV": "v"}, False, "v/bin/python"),
        ({"VIRTUAL_ENV": "v"}, True, "v/Scripts/python.exe"),
        ({"CONDA_PREFIX": "c"}, False, "c/bin/python"),
        ({"CONDA_PREFIX": "c"}, True, "c/python.exe"),
    ):
        python = environments.active_python(variables, windows)
        assert (python and python.as_posix()) == expected


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("uv", [None, "/bin/uv"])
def test_commands_of_the_set_up(tmp_path, monkeypatch, uv, windows):
    monkeypatch.setattr(installing, "needs_other_torch", lambda windows: windows)
    python = str(tmp_path / ("Scripts/python.exe" if windows else "bin/python"))
    make, install = installing.install_commands(tmp_path, "requirements.txt", uv, windows)
    assert make == (
        ["/bin/uv", "venv", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    ) + [str(tmp_path)]
    assert (
        install[-2:] == ["-r", str(ROOT / "requirements.txt")]
        and python in install
        and "--quiet" not in install
    )
    assert ("--torch-backend" in install) == bool(uv and windows)


def test_an_active_environment_without_the_packages_is_not_used(project, monkeypatch, capsys):
    (project / "requirements.txt").write_text("# pins\npytest==1\nno-such-package==2  # why\n")
    (project / ".venv").mkdir()
    made = []
    monkeypatch.setattr(installing.subprocess, "call", lambda command: made.append(command) or 0)
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)
    python = set_up.find_python(("requirements.txt",), {"VIRTUAL_ENV": sys.prefix})
    assert python == environments.python_in(project / ".venv") and [c[1:3] for c in made] == [
        ["-m", "venv"],
        ["-m", "pip"],
    ]
    assert "the active environment lacks no-such-package: using .venv instead" in capsys.readouterr().out


def test_what_an_environment_lacks_by_name_and_by_version(project):
    version = ".".join(str(pytest.__version__).split(".")[:3])
    (project / "r.txt").write_text(
        f"# pins\npytest=={version}  # here\nruff==0.0.1\nnone-such; python_version > '3'\n\n"
    )
    assert environments.packages(["r.txt"]) == ["pytest", "ruff", "none-such"]
    python = environments.python_in(Path(sys.prefix))
    assert environments.missing_in(python, environments.packages(["r.txt"])) == ["none-such"]
    assert environments.missing_in(python, environments.packages(["r.txt"], pins=True)) == [
        "ruff",
        "none-such",
    ]
    assert environments.missing_in(project / "no python", ["a", "b"]) == ["a", "b"]


def test_the_set_up_uses_nothing_but_the_standard_library():
    """Isolated from packages, and from this project's environment, it still shows its help."""
    command = [sys.executable, "-I", "-S", str(ROOT / "scripts/start/set_up.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "run_lora_train" in result.stdout, result.stderr


def test_a_job_is_waited_for_where_a_process_cannot_become_another(monkeypatch):
    monkeypatch.setattr(process, "WINDOWS", True)
    code = (
        "import os, sys; sys.exit(7 if os.environ['PYTHONUTF8'] == '1' and os.environ['MORE'] == 'x' else 1)"
    )
    assert process.become([sys.executable, "-c", code], {"MORE": "x"}) == 7


def test_an_old_python_takes_a_newer_one_or_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "OLDEST_PYTHON", (99, 0))
    monkeypatch.setattr(installing, "needs_other_torch", lambda windows: False)
    monkeypatch.setattr(environments.shutil, "which", {"python3.12": "/bin/python3.12"}.get)
    assert installing.install_commands(tmp_path, "requirements.txt", None)[0][0] == "/bin/python3.12"
    assert "99.0" in installing.install_commands(tmp_path, "requirements.txt", "uv")[0]
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)
    with pytest.raises(installing.SetUpError, match="Python 99.0 or later is needed; found 3"):
        installing.install_commands(tmp_path, "requirements.txt", None)


def test_packages_that_uv_sync_has_taken_away_are_installed_again(project, monkeypatch):
    """The stamp in .venv said that they were there."""
    venv, calls = project / ".venv", []
    python, packages = environments.python_in(venv), venv / "lib" / "python3.12" / "site-packages"
    for folder in (python.parent, packages):
        folder.mkdir(parents=True, exist_ok=True)
    python.touch()
    (project / "r.txt").write_text("pytest==1\n")
    monkeypatch.setattr(installing, "missing_in", lambda python, names: names)
    monkeypatch.setattr(installing, "install", lambda venv, file, uv: calls.append(file))
    for _ in range(2):
        installing.fill(venv, ["r.txt"], None)
    assert calls == ["r.txt"]
    (packages / "other.py").touch()
    later = (venv / ".ready-r.txt").stat().st_mtime + 1
    os.utime(packages, (later, later))
    installing.fill(venv, ["r.txt"], None)
    assert calls == ["r.txt"] * 2
