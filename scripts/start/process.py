"""How a job is started: as which Python, under which name.

It runs before any package is there, and in whatever Python a machine has, if only to say that that one is too
old: so it needs the standard library alone, and has no annotations that Python 3.6 can't read.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WINDOWS = os.name == "nt"
STARTED_AS = os.environ.pop("STARTED_AS", None)  # the wrapper's name, for this process alone


def program() -> str:
    """The name for messages: the wrapper's, which set_up.py leaves, or this file's."""
    return STARTED_AS or Path(sys.argv[0]).name


def report_error(message: str) -> int:
    """Prints a mistake that a person can mend as one line; returns the exit code for it."""
    print(f"{program()}: error: {message}", file=sys.stderr)
    return 2


def become(command, environment=None) -> int:
    """Goes on as another program, so that signals reach it.

    On Windows, which can't do that, it waits for the program and returns its exit code.
    """
    sys.stdout.flush()
    environment = {**os.environ, **(environment or {})}
    if not WINDOWS:
        os.execve(command[0], command, environment)
    environment.setdefault("PYTHONUTF8", "1")  # captions in a console of another code page
    process = subprocess.Popen(command, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the program gets Ctrl-C too, and saves a checkpoint
            continue
