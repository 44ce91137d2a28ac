"""The net under a command: what nobody expected ends as one line too."""

from __future__ import annotations

import functools
import sys
import tempfile
import traceback
from pathlib import Path


def netted(main):
    """A command's main whose unexpected errors are one line that names the file with the traceback, and exit code 1."""

    @functools.wraps(main)
    def work(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except Exception as error:
            program = Path(main.__code__.co_filename)
            log = Path(tempfile.gettempdir()) / f"{program.stem}-crash.log"
            log.write_text(traceback.format_exc(), encoding="utf-8", errors="replace")
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            line = f"{program.name}: error: a fault of this program ({what}); {log} has the traceback"
            print(line.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
            return 1

    return work
