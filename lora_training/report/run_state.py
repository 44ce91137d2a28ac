"""How a run is doing, from its output folder alone: at work or ended, how far, how long still."""

from __future__ import annotations

import math
import re
import socket
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

from lora_training.console import STARTED
from lora_training.report.formatting import format_duration
from lora_training.report.run_folder import is_number, read_text

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.report.run_folder import RunFolder

LAST_LINES = 6
RECENT_LOGS = 20  # whose seconds per step say how long the rest takes
SILENT_SECONDS = 600  # after which a run on another machine counts as ended
OWNER = re.compile(r"process (\d+) on (.+) since ")


class RunState(NamedTuple):
    """How a run is doing. name: "running", "finished", "failed" or "stopped"; about: a line of numbers."""

    name: str
    about: str
    share: float  # of the steps that are done
    error: str  # of a failed run
    warnings: list[str]
    last_lines: str


def read_state(run: RunFolder) -> RunState:
    """The state of a run's folder as it is now."""
    lines = last_lines(run.path / "log.txt")
    total = total_steps(run)
    name = state_name(run, lines)
    about = [f"step {run.last_step:,}" + (f" of {total:,}" if total >= run.last_step > 0 else "")]
    seconds = run.metrics.get("seconds_per_step", [])[-RECENT_LOGS:]
    recent = [value for _, value in seconds if math.isfinite(value)]
    if recent:
        pace = statistics.median(recent)
        about.append(f"{pace:.3g} s per step")
        if name == "running" and total > run.last_step:
            about.append(f"{format_duration(pace * (total - run.last_step))} left")
    for number, what in (("loss", "loss {:.4g}"), ("memory_gib", "{:.1f} GiB")):
        value = run.last_value(number)
        if value is not None:
            about.append(what.format(value))
    return RunState(
        name,
        " · ".join(about),
        min(1.0, run.last_step / total) if total else float(name == "finished"),
        error_of(lines) if name == "failed" else "",
        list(dict.fromkeys(warning for line in lines if (warning := warning_of(line)))),
        "\n".join(lines[-LAST_LINES:]),
    )


def state_name(run: RunFolder, lines: list[str]) -> str:
    """Whether the run is at work, has finished, has failed, or was stopped."""
    if has_owner(run.path):
        return "running"
    if run.is_finished:
        return "finished"
    return "failed" if error_of(lines) else "stopped"


def has_owner(folder: Path) -> bool:
    """Whether the process that writes to the folder lives; one on another machine: whether it is heard of."""
    import psutil

    owner = folder / ".lock_owner"
    found = OWNER.match(read_text(owner))
    if not found:
        return False
    process, host = int(found[1]), found[2]
    try:
        if host == socket.gethostname():
            started, has_ended = psutil.Process(process).create_time(), psutil.STATUS_ZOMBIE
            is_same = started <= owner.stat().st_mtime + 1  # rather than a later one of its number
            return is_same and psutil.Process(process).status() != has_ended
        written = [file.stat().st_mtime for file in folder.iterdir() if file.is_file()]
        return time.time() - max(written) < SILENT_SECONDS
    except (psutil.Error, OSError):
        return False


def total_steps(run: RunFolder) -> int:
    """How many steps the run is to have; 0 if its folder doesn't tell."""
    total = run.data.get("steps", run.settings.values.get("max_train_steps"))
    return int(total) if is_number(total) else 0


def last_lines(file: Path) -> list[str]:
    """The lines of the last start in a log; of a long one the last 64 KiB."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 2**16))
            text = stream.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if line[9:].startswith(STARTED)]
    return lines[starts[-1] :] if starts else lines


def error_of(lines: list[str]) -> str:
    """The error that ended a run, without the time; empty if its last line is none."""
    last = lines[-1] if lines else ""
    return last.partition(": error: ")[2]


def warning_of(line: str) -> str:
    """A warning without time and keyword; empty for another line."""
    text = line.partition(" ")[2]
    return text.removeprefix("warning: ") if text.startswith("warning: ") else ""
