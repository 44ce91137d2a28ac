"""Training scripts as processes, forked from one that has imported the libraries: importing takes long.

Only imported by name: by the fork server, and by tests that start such processes. These are one group,
"processes", for pytest's workers, so that a single server is started.
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
PIPELINES = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux")
LAZY = (  # modules that these packages import when they are asked for by name
    *(getattr(diffusers, f"{name}Pipeline") for name in PIPELINES),
    *(transformers.CLIPTextModelWithProjection, transformers.T5EncoderModel, transformers.AutoTokenizer),
)
conversion_mapping.get_checkpoint_conversion_mapping("clip_text_model")  # compiles hundreds of patterns, once
gc.freeze()  # runs collect garbage: there is none in the libraries


def run(
    script: str, argv: list[str], environment: dict[str, str], log: str, folder: str, file_limit: int | None
) -> None:
    """Runs a training script as the main program of this process, in a folder, with its output in a file.

    The script finds what is beside it, and nothing else of the project's. With a file_limit it can write no
    file of more bytes, which stands in for a full disk.
    """
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.update(environment)
    os.chdir(folder)
    folders = [Path(name) for name in sys.path if name]
    others = [f for f in folders if not f.is_relative_to(ROOT) or f.is_relative_to(sys.prefix)]
    sys.path[:] = [str(Path(script).parent), *map(str, others)]
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
    """Starts a script in a folder; returns the process, which has exitcode, join and kill."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ready_process"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the server finds modules by this alone
        forkserver.ensure_running()
    log.parent.mkdir(parents=True, exist_ok=True)
    arguments = [str(argument) for argument in argv]
    settings = (arguments, environment, str(log), str(folder), file_limit)
    process = context.Process(target=run, args=(str(script), *settings))
    process.start()
    return process


def launch(
    script: Path, argv: list[object], environment: dict[str, str], folder: Path, processes: int = 2
) -> str:
    """Runs a script in so many gloo processes, with torchrun's environment; returns what the first prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        if torch.accelerator.is_available():  # else the script has to see by itself that it is one of several
            variables |= {"ACCELERATE_USE_CPU": "true"}
        variables = {name: str(value) for name, value in variables.items()} | environment
        log = folder / f"process-{rank}.log"
        started.append((start(script, argv, variables, log), log))
    for process, log in started:
        process.join(300)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0, log.read_text()[-3000:]
    return started[0][1].read_text()
