"""Runs programs of the project in processes that are forked from this one, which has the libraries.

Importing them takes longer than what the programs do with tiny models.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "diffusers",
    "peft",
    "safetensors.torch",
    "torch",
    "transformers",
)
LAZY_NAMES = {  # what these import when they are asked for it by name
    "diffusers": (
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "StableDiffusion3Pipeline",
        "FluxPipeline",
    ),
    "transformers": ("CLIPTextModelWithProjection", "T5EncoderModel", "AutoTokenizer"),
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
}
GRACE = 10  # seconds that processes have to end after a signal, as with torchrun


@dataclass
class Job:
    """A program to run, and the signal that ends it before its time, if it gets that far."""

    program: str  # path within the repository
    argv: list[str]
    limit: float = 120.0  # seconds until it counts as hung
    processes: int = 1  # that train together, with the environment that torchrun gives
    torchrun: bool = False  # started by torchrun itself, which imports everything anew
    after: float | None = None  # seconds until the signal
    signal: int = signal.SIGKILL
    victim: int = 0  # the process that SIGKILL ends; the others then get SIGTERM, as from torchrun


@dataclass
class JobResult:
    """How a job has ended: by process its exit code (128 + the number of a signal) and what it printed."""

    codes: list[int] = field(default_factory=list)
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    seconds: float = 0.0
    timed_out: bool = False
    was_signalled: bool = False


Case = Generator[Job, JobResult, object]


def preload() -> None:
    """Imports what the programs import."""
    os.environ.update(ENVIRONMENT)
    for name in LIBRARIES:
        module = importlib.import_module(name)
        for lazy_name in LAZY_NAMES.get(name, ()):
            getattr(module, lazy_name)
    gc.collect()
    gc.freeze()


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RunningJob:
    """A job's processes. run_program(job, log, environment): makes a forked process the job's program."""

    def __init__(self, job: Job, folder: Path, run_program: Callable) -> None:
        self.job, self.result, self.started = job, JobResult(), time.monotonic()
        self.signalled_at: float | None = None  # seconds after the start
        self.survivors_signalled = False
        port, count = free_port(), 1 if job.torchrun else job.processes
        self.logs = [folder / f"process-{rank}" for rank in range(count)]
        self.alive: dict[int, int] = {}  # process id: rank
        for rank, log in enumerate(self.logs):
            environment = launcher_environment(rank, job.processes, port) if job.processes > 1 else {}
            pid = os.fork()
            if pid == 0:
                try:
                    run_program(job, log, environment)
                finally:
                    os._exit(1)
            self.alive[pid] = rank
        self.pids = list(self.alive)
        self.result.codes = [0] * len(self.pids)

    def send(self, number: int, pids: list[int]) -> None:
        """Sends a signal to those of these processes that still run."""
        for pid in pids:
            if pid in self.alive:
                os.kill(pid, number)

    def poll(self) -> bool:
        """Sends the signals that are due; returns whether all processes have ended."""
        elapsed = time.monotonic() - self.started
        if self.job.after is not None and self.signalled_at is None and elapsed >= self.job.after:
            self.signalled_at, self.result.was_signalled = elapsed, True
            self.send_planned_signal()
        if self.signalled_at is not None and len(self.pids) > 1:
            self.end_survivors(elapsed)
        if elapsed > self.job.limit:
            self.result.timed_out = True
            self.send(signal.SIGKILL, self.pids)
        self.collect_exit_codes()
        if self.alive:
            return False
        for pid in self.pids:  # what it has started and left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.result.seconds = elapsed
        for log in self.logs:
            self.result.out.append(read_log(log.with_suffix(".out")))
            self.result.err.append(read_log(log.with_suffix(".err")))
        return True

    def send_planned_signal(self) -> None:
        """Sends the job's signal: SIGKILL to its victim, others to all processes."""
        job = self.job
        if job.torchrun and job.signal == signal.SIGKILL:
            for child in psutil.Process(self.pids[0]).children()[job.victim : job.victim + 1]:
                child.kill()
        elif job.signal == signal.SIGKILL:
            self.send(job.signal, [self.pids[job.victim]])
        else:
            self.send(job.signal, self.pids)

    def end_survivors(self, elapsed: float) -> None:
        """What torchrun does with the other processes, if sooner."""
        one_has_ended = len(self.alive) < len(self.pids)
        if one_has_ended and self.job.signal == signal.SIGKILL and not self.survivors_signalled:
            self.survivors_signalled = True
            self.send(signal.SIGTERM, self.pids)
        if elapsed > self.signalled_at + GRACE:
            self.send(signal.SIGKILL, self.pids)

    def collect_exit_codes(self) -> None:
        """Takes the exit codes of processes that have ended."""
        for pid in list(self.alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                self.result.codes[self.alive.pop(pid)] = code if code >= 0 else 128 - code


def launcher_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives a process."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in (ranks | address).items()}


def read_log(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def run_cases(
    cases: list[Callable[[Path], Case]],
    at_once: int,
    on_result: Callable[[int, object], None],
    run_program: Callable,
) -> None:
    """Runs cases, at most so many processes at once.

    A case gets a folder that is removed after it; it yields jobs, gets their results, and returns its own
    result, which `on_result` gets with the case's index. run_program: as RunningJob takes it.
    """
    pending, active = list(enumerate(cases))[::-1], {}

    def next_job(index: int, generator: Case, result: JobResult | None, folder: str) -> RunningJob | None:
        try:
            return RunningJob(generator.send(result), Path(folder), run_program)
        except StopIteration as end:
            on_result(index, end.value)
            return None

    while pending or active:
        if pending and sum(running.job.processes for *_, running in active.values()) < at_once:
            index, case = pending.pop()
            folder = tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True)
            generator = case(Path(folder.name))
            active[index] = (folder, generator, next_job(index, generator, None, folder.name))
        for index, (folder, generator, running) in list(active.items()):
            if running is not None and running.poll():
                running = next_job(index, generator, running.result, folder.name)
                active[index] = (folder, generator, running)
            if running is None:
                folder.cleanup()
                del active[index]
        time.sleep(0.005)
