"""Makes a forked process one of the project's programs."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import signal
import sys
import types
from pathlib import Path

from scripts.dev import ROOT
from scripts.dev.attacks.forked_runs import Job

# of addresses, for each process: to one that would take the machine's memory there is none
MEMORY = 16 << 30


@functools.cache
def compile_program(program: str):
    """A program's code; the training scripts would be compiled thousands of times otherwise."""
    file = ROOT / program
    return compile(file.read_text(encoding="utf-8"), str(file), "exec")


def run_program(job: Job, log: Path, environment: dict[str, str]) -> None:
    """Runs a job's program as the main one of this process, and ends the process.

    log: the files of its output and errors, without endings.
    """
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for stream, ending in ((1, "out"), (2, "err")):
        file = log.with_suffix(f".{ending}")
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.environ.update(environment)
    os.chdir(log.parent)
    if job.torchrun:
        start_torchrun(job, environment["MASTER_PORT"])
    code = run_as_main(job)
    endings = (sys.stdout.flush, sys.stderr.flush, functools.partial(os._exit, code))
    for end in endings:
        with contextlib.suppress(Exception):
            end()


def start_torchrun(job: Job, port: str) -> None:
    """Goes on as torchrun, which starts the job's program."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(job.processes), "--master_port", port]
    os.execv(sys.executable, [sys.executable, *launcher, str(ROOT / job.program), *job.argv])


def run_as_main(job: Job) -> int:
    """Runs the program as Python runs a file; returns its exit code."""
    forget_library()
    path = str(ROOT / job.program)
    sys.argv, sys.path[0] = [path, *job.argv], str(Path(path).parent)
    sys.stdout = os.fdopen(os.dup(1), "w")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = path
    try:
        exec(compile_program(job.program), main.__dict__)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def forget_library() -> None:
    """Has the project's library imported anew: some of its modules read the environment of their process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lora_training"]:
        del sys.modules[name]
