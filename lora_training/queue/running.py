"""Runs the trainings of a queue one after another, each as a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

from lora_training.console import print_status
from lora_training.errors import UserError
from lora_training.queue.jobs import problem_of, read_queue
from lora_training.report.comparison_page import write_comparison_page
from lora_training.report.formatting import format_duration, format_whole_percent
from lora_training.report.overview import training_seconds
from lora_training.report.run_folder import read_run_folder
from lora_training.report.run_state import has_owner
from lora_training.training.output_folder import read_recorded_settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lora_training.queue.jobs import Job

FORWARDED = [name for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
COLUMNS = ("run", "state", "advised step", "learned", "forgotten", "training")


class Ending(NamedTuple):
    """How a job's process has ended. code: its exit code; stopped_by: the queue's own signal, or 0."""

    code: int
    stopped_by: int = 0


def run_queue(files: list[str], command: list[str], settings: dict) -> int:
    """Trains what the files ask for; returns 0, 1 if a run has failed, or 128 + the signal that ended it.

    command: that starts a training, before its arguments. settings: of .env. Errors: UserError.
    """
    jobs, folder = read_queue(files)
    print_status(f"queue of {len(jobs)} runs: {', '.join(job.name for job in jobs)}")
    for job in jobs:
        if problem := problem_of(job, settings):
            print_status(f"warning: {job.name} will fail: {problem}; the other runs are trained")
    states = {job.name: "not begun" for job in jobs}
    stopped_by = 0
    for number, job in enumerate(jobs, 1):
        print_status(f"queue: {job.name}, run {number} of {len(jobs)}, to {job.output}")
        code, stopped_by = run_job([*command, *job.argv], job.output)
        states[job.name] = state_after(code, job.output)
        if states[job.name] == "failed":
            print_status(f"queue: {job.name} failed with exit code {code}; the queue goes on")
        if stopped_by:
            print_status("queue: stopped; the same command goes on with the runs that are not finished")
            break
    print_results(jobs, states, folder)
    if stopped_by:
        return 128 + stopped_by
    return int("failed" in states.values())


def run_job(command: list[str], output: Path) -> Ending:
    """Runs a training to its end. Signals that end the queue reach it first: it saves a checkpoint."""
    wait_for_owner(output)
    received: list[int] = []
    with subprocess.Popen(command, env=os.environ | {"STARTED_AS": "run_lora_train"}) as process:

        def receive(number: int, frame: object) -> None:
            received.append(number)
            if number != signal.SIGINT:  # which a terminal sends to both
                process.send_signal(number)

        with handling_signals(receive):
            while True:
                with contextlib.suppress(KeyboardInterrupt):
                    code = process.wait()
                    break
    return Ending(code if code >= 0 else 128 - code, received[-1] if received else 0)


@contextlib.contextmanager
def handling_signals(handler) -> Iterator[None]:
    """While inside, signals that end a program call a handler; afterwards they are handled as before."""
    names = [*FORWARDED, "SIGINT"]
    before = {name: signal.signal(getattr(signal, name), handler) for name in names}
    try:
        yield
    finally:
        for name, previous in before.items():
            signal.signal(getattr(signal, name), previous)


def wait_for_owner(output: Path) -> None:
    """Waits for a run that an earlier queue has started and that still writes to the folder."""
    if has_owner(output):
        print_status(f"queue: {output} is written to by a run that goes on; waiting for its end")
    while has_owner(output):
        time.sleep(2)


def state_after(code: int, output: Path) -> str:
    """What a run's exit code and its folder say of it."""
    if code == 0 and read_recorded_settings(output)[1]:
        return "finished"
    return "stopped" if code > 128 else "failed"


def print_results(jobs: list[Job], states: dict[str, str], folder: Path) -> None:
    """Prints a row for each run, and writes the page that compares those that have results."""
    rows, finished = [COLUMNS], []
    for job in jobs:
        cells = ["", "", "", ""]
        with contextlib.suppress(UserError, OSError):
            run = read_run_folder(job.output)
            shares = [run.last_value(name) for name in ("learned", "forgotten")]
            advised = "" if run.advised_step is None else f"{run.advised_step:,}"
            shown = ["" if share is None else format_whole_percent(share) for share in shares]
            cells = [advised, *shown, format_duration(training_seconds(run))]
            if states[job.name] == "finished":
                finished.append(job.output)
        rows.append((job.name, states[job.name], *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print_status("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if len(finished) > 1:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        print_status(f"compared  {write_comparison_page(finished, folder / 'compare.html')}")
