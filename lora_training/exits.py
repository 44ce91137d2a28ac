"""How a program of this project ends: exit codes, and errors of one line.

0 done, 1 failed, 2 wrong arguments or input, 128 + the number of a signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

from lora_training.console import print_status
from lora_training.errors import Interrupted, UserError, one_line
from lora_training.files import last_checkpoint_note, list_checkpoints
from lora_training.signals import StopSignal


class Outcome:
    """The exit code of a run, and where its files are, once that is known."""

    def __init__(self) -> None:
        self.code = 0
        self.output_dir: Path | None = None


@contextlib.contextmanager
def exit_code():
    """Gives an `Outcome`; whatever is raised inside is told in one line and becomes its exit code.

    A fault of ours ends with one line too, which names the file that has its traceback.
    """
    outcome = Outcome()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(
            AttributeError, OSError
        ):  # in a notebook, or where it is another file by now
            stream.reconfigure(errors="replace")  # for captions that a console (Windows: cp1252) can't show
    try:
        yield outcome
    except UserError as error:
        # one that a loader's process has raised comes with its stack
        outcome.code = report_error(" ".join(str(error).split("UserError: ")[-1].split()), 2)
    except Interrupted as stop:
        outcome.code = report_interruption(*stop.args, output=outcome.output_dir)
    except KeyboardInterrupt:  # before the signals were answered
        print_status("stopped before anything was done")
        outcome.code = 130
    except Exception as error:
        outcome.code = report_error(explain(error, outcome.output_dir), 1)


def report_interruption(code: int, *lines: str, output: Path | None) -> int:
    """Says that a run was stopped, and what it can go on from; returns the exit code."""
    StopSignal.raised = 0
    for line in lines:
        print_status(line)
    for folder in list_checkpoints(output)[:1] if lines and output else []:
        print_status(f"{folder} is there: --resume_from_checkpoint latest goes on")
    return code


def explain(error: Exception, output: Path | None) -> str:
    """What happened and what to try, for an error that isn't a person's; the traceback of any other goes to a file."""
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error):
        return (
            "out of memory; try, in this order, --gradient_checkpointing, --cache_latents, --mixed_precision bf16,"
            " --optimizer adamw8bit, --quantize_base nf4, a lower --train_batch_size or --resolution"
        )
    if type(error).__name__.startswith("Dist") or "/gloo/" in str(error):
        return "another process of this run has ended, which this one was waiting for"
    if isinstance(error, OSError) and error.errno:  # a full disk, a folder that is no more, missing rights
        where = error.filename or output or ""
        return f"{where}: {error.strerror}{last_checkpoint_note(output) if output else ''}"
    return f"a fault of this script ({one_line(error)}); {write_crash_log(output)} has the traceback"


def write_crash_log(output: Path | None) -> Path:
    """Writes the traceback of the error being handled to the output folder, or to a temporary one."""
    for folder in (output, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, TypeError):
            log = folder / "crash.log"
            log.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
            break
    return log


def report_error(why: str, code: int) -> int:
    """Says why the run ends. Beside a first process that says it too, the launcher ends this one while it waits."""
    number, StopSignal.raised = StopSignal.raised, 0
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(10)
    if number:
        print_status(f"stopped at once by {signal.Signals(number).name}")
        return 128 + number
    print(f"{Path(sys.argv[0]).name}: error: {why}", file=sys.stderr)
    return code
