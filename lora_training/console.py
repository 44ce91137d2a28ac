"""Lines and progress bars on the first process's terminal or log."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from pathlib import Path

QUIET = int(os.environ.get("RANK", "0")) > 0  # the first process alone prints

STARTED = "started: "  # the first line of each start in a run's log


def printable(text: str) -> str:
    """Text that any file and terminal takes: what is no character, as in some file names, is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def summarize_names(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


class LineLog:
    """A file that keeps what is printed, each line with its time, for who watches a run from elsewhere."""

    file: Path | None = None
    notifier = None  # --notify's `Notifier`, which gets each line, too

    @classmethod
    def add(cls, text: str) -> None:
        """Appends a line, where a file is kept; a full disk ends no run here."""
        if cls.notifier:
            cls.notifier.receive(text)
        if cls.file and not QUIET:
            with contextlib.suppress(OSError), cls.file.open("a", encoding="utf-8") as stream:
                stream.write(f"{time.strftime('%H:%M:%S')} {printable(text)}\n")

    @classmethod
    def close(cls, code: int) -> None:
        """Ends it with the program. code: the program's exit code."""
        if cls.notifier:
            cls.notifier.end(code)
        cls.file = cls.notifier = None


def print_status(text: str) -> None:
    """Prints a line above the bars; in a log file, below them."""
    if QUIET:
        return
    LineLog.add(text)
    with progress.get_lock():
        visible, is_terminal = [bar for bar in progress.bars if bar.is_visible], sys.stderr.isatty()
        for bar in visible:
            if is_terminal:
                bar.clear(nolock=True)
            else:
                bar.fp.write("\n")
            bar.is_visible = False
        print(text, flush=True)
        for bar in visible if is_terminal else []:
            bar.refresh(nolock=True)


class progress(tqdm):
    """A bar on the first process for what takes more than two seconds; without a total, the time that has
    passed.

    A thread refreshes it while the work itself is silent, in a log file every 15 seconds. options: tqdm's.
    """

    appears_after = 2.0  # seconds
    bars: list = []  # all that are open
    refresher = None  # the thread
    is_visible = False

    def __init__(self, what: str, total: int | None = None, **options) -> None:
        is_terminal = sys.stderr.isatty()
        self.refresh_seconds = self.appears_after / 2 if is_terminal else 15
        usual = {
            "delay": self.appears_after,
            "leave": not is_terminal,
            "mininterval": self.refresh_seconds / 2,
        }
        options = usual | options
        if not total:
            options["bar_format"] = "{desc} {elapsed}"
        if is_terminal:  # tqdm draws nothing in one without a size, as some containers have
            options["ncols"], options["nrows"] = shutil.get_terminal_size()
        else:
            options["position"] = 0  # a log file has no way back up
        super().__init__(desc=what, total=total, disable=QUIET, **options)
        if not self.disable:
            self.due = time.time() + options["delay"]
            # threads don't outlive a fork
            if progress.refresher is None or not progress.refresher.is_alive():
                progress.refresher = threading.Thread(target=refresh_bars, daemon=True)
                progress.refresher.start()
            self.bars.append(self)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar."""
        self.is_visible, self.due = True, time.time() + self.refresh_seconds
        return super().display(msg, pos)

    def close(self) -> None:
        """Takes the bar away."""
        self.bars[:] = [bar for bar in self.bars if bar is not self]  # tqdm's are equal in the same place
        if self.is_visible:
            self.last_print_t = time.time()  # so that tqdm knows, too
        super().close()


def refresh_bars() -> None:
    """Draws bars again that have stood still; runs for ever in a thread."""
    while True:
        time.sleep(min(0.25, progress.appears_after / 8))
        with progress.get_lock():
            for bar in [bar for bar in progress.bars if time.time() >= bar.due]:
                bar.refresh(nolock=True)
