"""How commands end: exit codes, one line on stderr, and signals that end them at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile

import pytest
from conftest import ROOT

from lora_training.errors import UserError
from lora_training.exits import run_command

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--rank 0: must be\n1 or more"), 2, "test_exits.py: error: --rank 0: must be 1 or more"),
        (FileNotFoundError(2, "No such file", "x.png"), 2, "test_exits.py: error: x.png: No such file"),
        (OSError("a disk without a number"), 2, "test_exits.py: error: a disk without a number"),
    ],
)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(error, code, line, capsys):
    @run_command
    def main(argv=None):
        raise error

    assert main([]) == code
    assert capsys.readouterr().err == f"{line}\n"


def test_a_fault_is_one_line_that_names_the_log_of_its_traceback(capsys, monkeypatch, tmp_path):
    @run_command
    def main(argv=None):
        return 1 // len(argv)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert main(["x"]) == 1  # its own exit code
    assert main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    log = tmp_path / "test_exits-crash.log"
    assert "a fault of this script" in line and str(log) in line
    assert "ZeroDivisionError" in log.read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM for others")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_at_once_with_a_note(number):
    """Whatever is being done, also where everything that is raised is swallowed."""
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from lora_training.signals import end_at_once_on_signals
end_at_once_on_signals("finished images stay")
print("ready")
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors.strip() == f"-c: stopped by {number.name}; finished images stay"
