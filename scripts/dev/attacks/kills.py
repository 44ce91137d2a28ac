"""Cases: a run that is killed at any moment, and goes on to its end."""

from __future__ import annotations

import functools
import random
import signal
from pathlib import Path

from scripts.dev.attacks.forked_runs import Case, Job, JobResult
from scripts.dev.attacks.runs import DATA, KILLED, KILLED_LENGTH, train_argv, training_script
from scripts.dev.attacks.verdicts import find_damaged_result, find_difference, find_failure, last_line

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TORCHRUN_SHARE = 0.2  # of runs of several processes; the others are forked, with torchrun's environment
TORCHRUN_START = 12  # seconds in which it imports everything anew


def attack_by_kills(stage: Path, family: str, rng: random.Random, folder: Path) -> Case:
    """A run that is killed once or twice, and is then compared with an unbroken one."""
    name = rng.choice(sorted(KILLED))
    flags, processes = KILLED[name]
    unbroken, output = stage / family / f"unbroken {name}", folder / f"unbroken {name}"
    usual_seconds = float((unbroken / "done").read_text())
    torchrun = processes > 1 and rng.random() < TORCHRUN_SHARE
    argv = train_argv(family, output, "-d", DATA, *flags, *KILLED_LENGTH)
    argv += ["--resume_from_checkpoint", "latest"]
    limit = 300 if torchrun else 120
    make_job = functools.partial(
        Job, training_script(family), argv, processes=processes, torchrun=torchrun, limit=limit
    )
    kills, wrong = [], None
    for _ in range(rng.choice((1, 2, 2))):
        number = rng.choice(SIGNALS)
        seconds = rng.uniform(0.1, usual_seconds) + TORCHRUN_START * torchrun
        result = yield make_job(after=seconds, signal=number, victim=rng.randrange(processes))
        if not result.was_signalled:
            break
        name_of_signal = signal.Signals(number).name
        kills.append(f"{name_of_signal} after {seconds:.2f} s: {result.codes} {last_line(result)}")
        if not torchrun:  # which has codes and tracebacks of its own
            wrong = wrong or find_failure(result, codes_after(number, processes))
        wrong = wrong or (find_damaged_result(output) if output.exists() else None)
    result = yield make_job()
    wrong = wrong or find_wrong_end(result, torchrun) or find_difference(unbroken, output)
    return {
        "command": [training_script(family), *argv],
        "kills": kills,
        "variant": f"{name}, torchrun" if torchrun else name,
        "code": max(result.codes),
        "wrong": wrong,
        "message": last_line(result),
        "seconds": result.seconds,
    }


def codes_after(number: int, processes: int) -> tuple[int, ...]:
    """Exit codes that may follow a signal; 1: another process of the run has ended."""
    return (0, 128 + number, 128 + signal.SIGTERM, 128 + signal.SIGKILL, *[1] * (processes > 1))


def find_wrong_end(result: JobResult, torchrun: bool) -> str | None:
    """What is wrong with how the last run has ended."""
    if any(result.codes):
        return f"exit code {result.codes}: {last_line(result)}"
    return None if torchrun else find_failure(result)
