"""Signals that stop a run: answered at once outside the training loop, after the step's checkpoint inside it."""

from __future__ import annotations

import contextlib
import signal

from lora_training.errors import Interrupted

STOP_SIGNALS = [
    n for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK") if hasattr(signal, n)
]  # the last: Windows


class StopSignal:
    """Answers STOP_SIGNALS (Ctrl-C, and Ctrl-Break on Windows): at once outside the loop, after the step's checkpoint inside it."""

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
    """After it, signals are Python's and the system's again: none is an exception in what is said at the end."""
    try:
        yield
    finally:
        for name in STOP_SIGNALS:
            signal.signal(
                getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
            )
