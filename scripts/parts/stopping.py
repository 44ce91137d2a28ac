"""What Ctrl-C and SIGTERM do to a command whose files are whole or not there at every moment."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path


def end_at_once(number: int, frame: object) -> None:
    """Says what happened and ends with exit code 130 or 143, whatever is being done.

    Nothing is raised, because libraries swallow what is raised while they are imported.
    """
    program, name = Path(sys.argv[0]).name, signal.Signals(number).name
    os.write(2, f"\n{program}: stopped by {name}; the same command goes on where it stopped\n".encode())
    os._exit(128 + number)


def answer_signals() -> None:
    """To be called before libraries are imported."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_at_once)
