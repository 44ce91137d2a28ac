"""Training scripts as processes of their own, forked from one that has the libraries: importing them takes longer than a test.

Only imported by name: by the fork server, and by tests that start such processes. These are one group, "processes", for
pytest's workers, so that a single server is started.
"""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import resource
import socket
import sys
from multiprocessing import forkserver
from pathlib import Path

import accelerate  # noqa: F401
import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import diffusers
import peft  # noqa: F401
import pytest
import torch
import transformers
from transformers import conversion_mapping

ROOT = Path(__file__).resolve().parent.parent
LAZY = (  # modules that these packages import when they are asked for by name
    *(getattr(diffusers, f"{name}Pipeline") for name in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")),
    *(transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel, transformers.AutoTokenizer),
)  # fmt: skip
conversion_mapping.get_checkpoint_conversion_mapping("clip_text_model")  # compiles hundreds of patterns, once
gc.freeze()  # runs collect garbage: there is none in the libraries


def run(
    script: str, argv: list[str], environment: dict[str, str], log: str, folder: str, file_limit: int | None
) -> None:
    """Runs a training script as the main program of this process, in a folder, with its output in a file. The script
    finds what is beside it, and nothing else of the project's.

    With a file_limit it can write no file of more bytes, which stands in for a full disk.
    """
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(environment)
    os.chdir(folder)
    mine = [p for p in sys.path if Path(p).is_relative_to(ROOT) and not Path(p).is_relative_to(sys.prefix)]
    sys.path[:] = [str(Path(script).parent), *(p for p in sys.path if p and p not in mine)]
    sys.argv = [script, *argv]
    spec = importlib.util.spec_from_file_location(Path(script).stem, script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sys.exit(module.main(argv))


def start(
    script: Path,
    argv: list[object],
    environment: dict[str, str],
    log: Path,
    folder: Path = ROOT,
    file_limit: int | None = None,
):
    """Starts a script in a folder with these arguments; returns the process, which has exitcode, join and kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ready_process"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the server finds modules by this alone
        forkserver.ensure_running()
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [str(word) for word in argv]
    process = context.Process(target=run, args=(str(script), words, environment, str(log), str(folder), file_limit))
    process.start()
    return process


def launch(script: Path, argv: list[object], environment: dict[str, str], folder: Path, processes: int = 2) -> str:
    """Runs a script in so many gloo processes, told what torchrun tells its own; returns what the first has said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if torch.accelerator.is_available():  # else the script has to see by itself that it is one run of several
            told |= {"ACCELERATE_USE_CPU": "true"}
        log = folder / f"process-{rank}.log"
        started.append((start(script, argv, {k: str(v) for k, v in told.items()} | environment, log), log))
    for process, log in started:
        process.join(300)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0, log.read_text()[-3000:]
    return started[0][1].read_text()
