"""Programs of the project as processes that are forked from this one, which has the libraries: importing them takes longer than
what the programs do with tiny models.
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
LAZY = {  # what these import when they are asked for it by name
    "diffusers": ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"),
    "transformers": ("CLIPTextModelWithProjection", "T5EncoderModel", "AutoTokenizer"),
}
MEMORY = 16 << 30  # of addresses, for each process: one that would take the machine's memory is told that there is none


@dataclass
class Job:
    """A program to run, and the signal with which it ends before its time, if it gets that far."""

    program: str  # path within the repository
    words: list[str]
    limit: float = 120.0  # seconds until it counts as hung
    processes: int = 1  # that train together, told what torchrun tells its own
    torchrun: bool = False  # started by torchrun itself, which imports everything anew
    after: float | None = None  # seconds until the signal
    signal: int = signal.SIGKILL
    victim: int = 0  # the process that SIGKILL ends; the others then get what torchrun gives them, SIGTERM


@dataclass
class Ended:
    """How a job has ended: by process its exit code (128 + the number of a signal) and what it said."""

    codes: list[int] = field(default_factory=list)
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    seconds: float = 0.0
    hung: bool = False
    hit: bool = False  # by the job's signal


Case = Generator[Job, Ended, object]


def preload() -> None:
    """Imports what the programs import."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline", OMP_NUM_THREADS="1")
    for name in LIBRARIES:
        module = importlib.import_module(name)
        for lazy in LAZY.get(name, ()):
            getattr(module, f"{lazy}Pipeline" if name == "diffusers" else lazy)
    gc.collect()
    gc.freeze()


class Running:
    """A job's processes."""

    def __init__(self, job: Job, folder: Path, become: Callable) -> None:
        self.job, self.ended, self.begun, self.sent, self.logs = job, Ended(), time.monotonic(), None, []
        self.told = False  # those that the signal has left alive, that it is over
        self.left = {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(1 if job.torchrun else job.processes):
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes, "LOCAL_WORLD_SIZE": job.processes}
            told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = folder / f"process-{rank}"
            self.logs.append(log)
            pid = os.fork()
            if pid == 0:
                try:
                    become(job, log, {k: str(v) for k, v in told.items()} if job.processes > 1 else {})
                finally:
                    os._exit(1)
            self.left[pid] = rank
        self.pids = list(self.left)
        self.ended.codes = [0] * len(self.pids)

    def send(self, number: int, pids: list[int]) -> None:
        """A signal to those processes that still run."""
        for pid in pids:
            if pid in self.left:
                os.kill(pid, number)

    def look(self) -> bool:
        """Sends what is due; returns whether all processes have ended."""
        job, spent = self.job, time.monotonic() - self.begun
        if job.after is not None and self.sent is None and spent >= job.after:
            self.sent, self.ended.hit = spent, True
            if job.torchrun and job.signal == signal.SIGKILL:
                for child in psutil.Process(self.pids[0]).children()[job.victim : job.victim + 1]:
                    child.kill()
            else:
                self.send(job.signal, [self.pids[job.victim]] if job.signal == signal.SIGKILL else self.pids)
        if self.sent is not None and len(self.pids) > 1:  # as torchrun does, if sooner
            if len(self.left) < len(self.pids) and job.signal == signal.SIGKILL and not self.told:
                self.told = True
                self.send(signal.SIGTERM, self.pids)
            if spent > self.sent + 10:
                self.send(signal.SIGKILL, self.pids)
        if spent > job.limit:
            self.ended.hung = True
            self.send(signal.SIGKILL, self.pids)
        for pid in list(self.left):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
                self.ended.codes[self.left.pop(pid)] = code if code >= 0 else 128 - code
        if self.left:
            return False
        for pid in self.pids:  # what it has started and left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self.ended.seconds = spent
        for log in self.logs:
            self.ended.out.append(log.with_suffix(".out").read_text(encoding="utf-8", errors="replace"))
            self.ended.err.append(log.with_suffix(".err").read_text(encoding="utf-8", errors="replace"))
        return True


def run_cases(
    cases: list[Callable[[Path], Case]], at_once: int, done: Callable[[int, object], None], become: Callable
) -> None:
    """Runs cases, at most so many processes at once. A case is given a folder that goes after it; it yields jobs, gets how they
    ended, and returns its verdict, which `done` gets with the case's place in the list. become(job, log, environment) makes a
    forked process the job's program.
    """
    waiting, active = list(enumerate(cases))[::-1], {}
    while waiting or active:
        if waiting and sum(running.job.processes for *_, running in active.values()) < at_once:
            place, case = waiting.pop()
            folder = tempfile.TemporaryDirectory(prefix="attack-", ignore_cleanup_errors=True)
            work = case(Path(folder.name))
            active[place] = (folder, work, step(work, None, folder.name, place, done, become))
        for place, (folder, work, running) in list(active.items()):
            if running is not None and running.look():
                active[place] = (folder, work, step(work, running.ended, folder.name, place, done, become))
            if active[place][2] is None:
                folder.cleanup()
                del active[place]
        time.sleep(0.005)


def step(work: Case, ended: Ended | None, folder: str, place: int, done: Callable, become: Callable):
    """A case's next job, running; None if it is over, and its verdict handed on."""
    try:
        return Running(work.send(ended), Path(folder), become)
    except StopIteration as end:
        done(place, end.value)
        return None
