"""Signals, faults and errors end a run with one line and the right exit code."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import QUICKEST, ROOT, SAMPLE, load_script, run_here

from lora_training import data
from lora_training.base_model import components

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(
    "library_error",
    [OSError("can't open file"), RuntimeError("a"), None],
    ids=["OSError", "RuntimeError", "none"],
)
@pytest.mark.parametrize("function", ["import_class", "prepare_examples", "add_trained_parts"])
def test_a_signal_is_answered_whatever_a_library_makes_of_it(
    tmp_path, monkeypatch, capsys, function, library_error
):
    """Some turn every exception into one of their own; some go on as if nothing had been."""
    owners = {"import_class": components, "prepare_examples": data}
    owner = owners.get(function) or load_script(QUICKEST.script)
    original = getattr(owner, function)

    def interrupted(*arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # Python answers between two instructions
                pass
        except BaseException:
            if library_error:
                raise library_error from None
        return original(*arguments)

    monkeypatch.setattr(owner, function, interrupted)
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, "--max_train_steps", 9) == 143
    printed = capsys.readouterr()
    assert "error" not in printed.err and "Traceback" not in printed.err + printed.out
    if library_error is None:  # it stops at its first step
        assert [path.name for path in (tmp_path / "x").glob("checkpoint-*")] == ["checkpoint-1"]


def fail_with(error: Exception):
    """A function that raises an error whatever it is called with."""

    def fail(*arguments):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied", "/somewhere/picture.png"),
        OSError(errno.EIO, "Input/output error", "/somewhere/cache"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
)
def test_what_a_disk_refuses_is_one_line(tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(load_script(QUICKEST.script), "execute", fail_with(error))
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE) == 1
    line = capsys.readouterr().err.strip()
    assert "\n" not in line and f"{error.filename or tmp_path / 'x'}: {error.strerror}" in line
    assert not (tmp_path / "x" / "crash.log").exists()


def test_a_process_that_ends_is_named_by_the_others(tmp_path, monkeypatch, capsys):
    for error in (
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error"),
        RuntimeError("x/gloo/y: Timed out"),
        torch.distributed.DistBackendError("NCCL"),
    ):
        monkeypatch.setattr(load_script(QUICKEST.script), "execute", fail_with(error))
        assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE) == 1
        assert "another process of this run has ended" in capsys.readouterr().err


def test_a_fault_of_ours_is_one_line_and_a_crash_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load_script(QUICKEST.script), "train", lambda *arguments: 1 / 0)
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a fault of this script (ZeroDivisionError: division by zero)" in line and "crash.log" in line
    assert "ZeroDivisionError" in (tmp_path / "x" / "crash.log").read_text()


def test_a_fault_before_the_arguments_are_known_is_one_line(recipe, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "parse_args", lambda argv: 1 / 0)
    assert recipe.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "a fault of this script (ZeroDivisionError: division by zero)" in line and "crash.log" in line


@pytest.mark.parametrize("name", ["a\nb", "a\u2028b", "a\r\n--x"])
def test_an_error_about_a_name_with_a_line_end_is_one_line_that_names_the_flag(tmp_path, capsys, name):
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, "--validation_prompts_file", name) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "--validation_prompts_file a" in error


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("train_*.py")))
def test_ctrl_c_while_the_library_is_imported_is_no_traceback(tmp_path, name):
    """In the first tenth of a second no handler stands."""
    shutil.copy(ROOT / name, tmp_path)
    library = tmp_path / "lora_training" / "__init__.py"
    library.parent.mkdir()
    library.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nfor _ in range(1000): pass\n")
    result = subprocess.run([sys.executable, str(tmp_path / name)], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")
