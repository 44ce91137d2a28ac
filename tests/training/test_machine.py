"""What differs from system to system: the unit of memory, the shell of a command, files that are locked."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import QUICKEST, ROOT, SAMPLE, metrics, run_here

from lora_training.training.machine import peak_memory
from lora_training.training.summary import command_line

pytestmark = pytest.mark.run


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_peak_memory_in_each_systems_unit(system, monkeypatch):
    """ru_maxrss is KiB on Linux and bytes on macOS; Windows has no such call."""
    import resource

    monkeypatch.setattr(sys, "platform", system)
    peak = (3 << 20) * (1 if system == "linux" else 1024)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=peak))
    if system == "win32":
        monkeypatch.setitem(sys.modules, "resource", None)
        monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(peak_wset=3 << 30))
    assert peak_memory(torch.device("cpu")) == 3 << 30


def test_commands_are_those_of_the_systems_own_shell(monkeypatch, tmp_path):
    arguments = (ROOT, "run_lora_infer", "infer_lora.py", [], Path("output/it's mine"), "--prompt", "a cat")
    monkeypatch.chdir(ROOT)
    argv = shlex.split(command_line(*arguments))
    assert argv == ["bash", "run_lora_infer.sh", "output/it's mine", "--prompt", "a cat"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", "win32")
    assert command_line(*arguments).endswith("""infer_lora.py "output/it's mine" --prompt "a cat\"""")


def test_rows_wait_while_a_spreadsheet_holds_them(monkeypatch, tmp_path):
    """Windows locks a file that is open elsewhere: training goes on, and the rows are written when it is
    free.
    """
    output, open_file, refused = tmp_path / "x", Path.open, []

    def open_unless_locked(file, *rest, **options):
        if file.name == "metrics.jsonl" and "a" in rest and len(refused) < 3:
            refused.append(file)
            raise PermissionError(13, "The process cannot access the file")
        return open_file(file, *rest, **options)

    monkeypatch.setattr(Path, "open", open_unless_locked)
    assert run_here(QUICKEST, output, "-d", SAMPLE, "--max_train_steps", 5) == 0
    assert len(refused) == 3 and [row["step"] for row in metrics(output)] == [1, 2, 3, 4, 5]
