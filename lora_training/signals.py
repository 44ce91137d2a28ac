"""Signals that stop a run: answered at once outside the training loop, after the step's checkpoint inside it.

A command whose files are whole or absent at every moment calls `end_at_once_on_signals` instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

from lora_training.errors import Interrupted

# SIGINT is Ctrl-C; SIGBREAK, Ctrl-Break, is Windows' own
STOP_SIGNALS = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK") if hasattr(signal, name)]


class StopSignal:
    """Answers STOP_SIGNALS: at once outside the training loop, after the step's checkpoint inside it."""

    raised = 0  # the signal that was answered at once: libraries may make another error of the exception

    def __init__(self) -> None:
        self.number, self.in_loop = 0, False
        for name in STOP_SIGNALS:
            signal.signal(getattr(signal, name), self.receive)

    def receive(self, number: int, frame: object) -> None:
        if not self.in_loop or self.number:
            self.number = StopSignal.raised = number
            raise Interrupted(128 + number, f"stopped at once by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def default_signals_afterwards():
    """Gives signals back to Python and the system at its end, so that none interrupts the last lines."""
    try:
        yield
    finally:
        for name in STOP_SIGNALS:
            signal.signal(
                getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
            )


def end_at_once_on_signals(note: str) -> None:
    """From now on a stop signal ends the program with the line `note` and exit code 128 + its number.

    To be called before libraries are imported: they swallow what is raised meanwhile, so nothing is raised,
    and nothing is cleaned up. Lines on stdout are flushed one by one, so that none is lost.
    """

    def end_at_once(number: int, frame: object) -> None:
        line_end = "\n" if os.isatty(2) else ""  # after a progress bar
        program = Path(sys.argv[0]).name
        os.write(2, f"{line_end}{program}: stopped by {signal.Signals(number).name}; {note}\n".encode())
        os._exit(128 + number)

    sys.stdout.reconfigure(line_buffering=True)
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), end_at_once)
