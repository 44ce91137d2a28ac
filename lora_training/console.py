"""Lines and progress bars on the first process's terminal or log."""

from __future__ import annotations

import os
import shutil
import sys
import time

from tqdm import tqdm

QUIET = int(os.environ.get("RANK", "0")) > 0  # the first process alone prints


def printable(text: str) -> str:
    """Text that any file and terminal takes: what is no character, as in a file name that isn't UTF-8, is
    spelled out.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def summarize_names(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def print_status(text: str) -> None:
    """Prints a line above the bars; in a log file, below them."""
    if QUIET:
        return
    with progress.get_lock():
        bars, terminal = [bar for bar in progress.shown if bar.drawn], sys.stderr.isatty()
        for bar in bars:
            bar.clear(nolock=True) if terminal else bar.fp.write("\n")
            bar.drawn = False
        print(text, flush=True)
        for bar in bars if terminal else []:
            bar.refresh(nolock=True)


class progress(tqdm):
    """A bar on the first process for what takes more than two seconds; without a total, the time that has
    passed.

    A thread keeps the time moving while the work itself is silent, in a log file every 15 seconds. options:
    tqdm's.
    """

    noticed, shown, mover = 2.0, [], None  # seconds until a wait is noticed; all bars; the thread
    drawn = False  # whether this one is in sight

    def __init__(self, what: str, total: int | None = None, **options) -> None:
        terminal = sys.stderr.isatty()
        self.pause = self.noticed / 2 if terminal else 15
        options = {"delay": self.noticed, "leave": not terminal, "mininterval": self.pause / 2} | options
        form = {} if total else {"bar_format": "{desc} {elapsed}"}
        columns, lines = (
            shutil.get_terminal_size()
        )  # tqdm draws nothing in one without, as some containers have
        form |= (
            {"ncols": columns, "nrows": lines} if terminal else {"position": 0}
        )  # a log file has no way back up
        super().__init__(desc=what, total=total, disable=QUIET, **form, **options)
        if not self.disable:
            import threading

            self.due = time.time() + options["delay"]
            if progress.mover is None or not progress.mover.is_alive():  # threads don't outlive a fork
                progress.mover = threading.Thread(target=refresh_bars, daemon=True)
                progress.mover.start()
            self.shown.append(self)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar."""
        self.drawn, self.due = True, time.time() + self.pause
        return super().display(msg, pos)

    def close(self) -> None:
        """Takes the bar away."""
        self.shown[:] = [bar for bar in self.shown if bar is not self]  # tqdm's are equal in the same place
        if self.drawn:
            self.last_print_t = time.time()  # so that tqdm knows, too
        super().close()


def refresh_bars() -> None:
    """Draws bars again that have stood still, for ever."""
    while True:
        time.sleep(min(0.25, progress.noticed / 8))
        with progress.get_lock():
            for bar in [bar for bar in progress.shown if time.time() >= bar.due]:
                bar.refresh(nolock=True)
