"""How a program of this project ends: exit codes, and errors of one line.

0 done, 1 failed, 2 wrong arguments or input, 128 + the number of a signal. A training script wraps its work
in `exit_code`; a command decorates its `main` with `run_command`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import LineLog, print_status, printable
from lora_training.errors import Interrupted, UserError, is_out_of_memory, one_line
from lora_training.files import last_checkpoint_note, list_checkpoints
from lora_training.libraries import silence_image_libraries
from lora_training.signals import StopSignal

if TYPE_CHECKING:
    from collections.abc import Callable


class Outcome:
    """The exit code of a run, and where its files are, once that is known."""

    def __init__(self) -> None:
        self.code = 0
        self.output_dir: Path | None = None
        self.crash_log = "crash.log"  # gets a traceback; in the output folder, or in a temporary one


@contextlib.contextmanager
def exit_code(program: str | None = None, user_errors: tuple[type[Exception], ...] = ()):
    """Gives an `Outcome`; whatever is raised inside is printed as one line and becomes its exit code.

    The line of an unexpected error names the file that has its traceback. program: what the
    line begins with, the running file's name by default. user_errors: errors that, like UserError, a person
    can mend (exit code 2).
    """
    outcome = Outcome()
    silence_image_libraries()  # whose warnings stand before the one line
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(
            AttributeError, OSError
        ):  # in a notebook, or where it is another file by now
            stream.reconfigure(errors="replace")  # for captions that a console (Windows: cp1252) can't show
    try:
        yield outcome
    except UserError as error:
        # one that a loader's process has raised comes with its stack
        message = " ".join(str(error).split("UserError: ")[-1].split())
        outcome.code = report_error(message, 2, program)
    except Interrupted as stop:
        outcome.code = report_interruption(*stop.args, output=outcome.output_dir)
    except KeyboardInterrupt:  # before the signals were answered
        print_status("stopped before anything was done")
        outcome.code = 130
    except user_errors as error:
        message = describe_os_error(error, outcome.output_dir) or one_line(error)
        outcome.code = report_error(message, 2, program)
    except Exception as error:
        outcome.code = report_error(explain(error, outcome), 1, program)
    finally:
        LineLog.close(outcome.code)


def run_command(main: Callable[[list[str] | None], int]) -> Callable[[list[str] | None], int]:
    """Decorates a command's `main`, which returns its exit code: errors end with one line as in `exit_code`.

    UserError and OSError (a missing file, a full disk) have exit code 2, a fault of the command 1. --help_all
    is --help, since a command has few flags.
    """
    file = Path(main.__code__.co_filename)

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        argv = [
            "--help" if each == "--help_all" else each for each in (sys.argv[1:] if argv is None else argv)
        ]
        with exit_code(file.name, user_errors=(OSError,)) as outcome:
            outcome.crash_log = f"{file.stem}-crash.log"
            outcome.code = main(argv)
        return outcome.code

    return run


def report_interruption(code: int, *lines: str, output: Path | None) -> int:
    """Says that a run was stopped, and what it can go on from; returns the exit code."""
    StopSignal.raised = 0
    for line in lines:
        print_status(line)
    for folder in list_checkpoints(output)[:1] if lines and output else []:
        print_status(f"{folder} is there: --resume_from_checkpoint latest goes on")
    return code


def explain(error: Exception, outcome: Outcome) -> str:
    """What happened and what to try; the traceback of what nobody expected goes to a file."""
    output = outcome.output_dir
    if is_out_of_memory(error):
        return (
            "out of memory; try, in this order, --gradient_checkpointing, --cache_latents,"
            " --mixed_precision bf16, --optimizer adamw8bit, --quantize_base nf4,"
            " a lower --train_batch_size or --resolution"
        )
    if type(error).__name__.startswith("Dist") or "/gloo/" in str(error):
        return "another process of this run has ended, which this one was waiting for"
    if os_error := describe_os_error(error, output):
        return f"{os_error}{last_checkpoint_note(output) if output else ''}"
    problem = one_line(f"{type(error).__name__}: {error}")
    return f"a fault of this script ({problem}); {write_crash_log(outcome)} has the traceback"


def describe_os_error(error: Exception, output: Path | None = None) -> str | None:
    """The file and what is wrong with it (a full disk, missing rights); None for errors of another kind."""
    if isinstance(error, OSError) and error.errno:
        return f"{error.filename or output or ''}: {error.strerror}".removeprefix(": ")
    return None


def write_crash_log(outcome: Outcome) -> Path:
    """Writes the command and the error's traceback to the output folder, or to a temporary one."""
    text = f"{sys.argv}\nPython {sys.version}\n\n{traceback.format_exc()}"
    for folder in (outcome.output_dir, Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, TypeError):
            log = folder / outcome.crash_log
            log.write_text(text, encoding="utf-8", errors="backslashreplace")
            break
    return log


def report_error(why: str, code: int, program: str | None = None) -> int:
    """Says why a program ends, and returns its exit code.

    Processes beside the first one, which says it too, wait: the launcher ends them.
    """
    number, StopSignal.raised = StopSignal.raised, 0
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(10)
    if number:
        print_status(f"stopped at once by {signal.Signals(number).name}")
        return 128 + number
    line = f"{program or Path(sys.argv[0]).name}: error: {why}"
    LineLog.add(line)
    print(printable(line), file=sys.stderr)
    return code
