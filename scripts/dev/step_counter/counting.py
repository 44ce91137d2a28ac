"""Runs programs on the fake device, each in a forked process, and gives back what was counted."""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from scripts.dev.step_counter.fake_device import pretend_cuda
from scripts.dev.step_counter.meter import Meter, StepCounted
from scripts.dev.step_counter.programs import Program

LOG_CHARACTERS = 4000  # of a failed program's output


def count_step(make_program: Callable[[Path], Program], work: Path) -> dict:
    """The counts of one step of a program, or {"error": why it was not reached, "log": its output}.

    make_program: writes the program's inputs into the work folder, and says how it is run. It is called in
    the program's process.
    """
    log, results = work / "log", work / "counts.json"
    process = os.fork()
    if process == 0:
        try:
            redirect_output(log)
            results.write_text(json.dumps(run(make_program, work)), encoding="utf-8")
        except BaseException:
            traceback.print_exc()
        finally:  # torch's own end knows no such device
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(process, 0)
    counts = {"error": "the process ended"}
    if results.exists():
        counts = json.loads(results.read_text(encoding="utf-8"))
    if "error" in counts:
        counts["log"] = log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:]
    return counts


def redirect_output(log: Path) -> None:
    """Sends this process's output to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def run(make_program: Callable[[Path], Program], work: Path) -> dict:
    """Runs the program in this process, up to the end of the counted step."""
    program = make_program(work)
    meter = Meter(program.denoisers, program.root)
    pretend_cuda(meter)
    program.prepare()
    sys.argv = [str(program.script), *program.argv]
    sys.path = [str(program.script.parent), *sys.path]  # as Python itself does
    os.chdir(work)
    problem = "the program ended before its step could be counted"
    try:
        with meter:
            runpy.run_path(str(program.script), run_name="__main__")
    except StepCounted:
        return meter.counted
    except SystemExit as end:
        problem += f" (exit code {end.code})"
    except Exception as error:
        traceback.print_exc()
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return {"error": problem}
