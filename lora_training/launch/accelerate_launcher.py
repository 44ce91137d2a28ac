"""What a configuration of accelerate starts on this machine, checked before anything is started.

Errors that would else appear as a traceback of the launcher are UserErrors: a configuration for GPUs without
GPUs, DeepSpeed that isn't installed, a first machine that doesn't answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import socket
import time

from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.files import read_config_file

START_TIMEOUT = 60  # seconds in which all machines have to be there


def launcher_parser(program: str) -> argparse.ArgumentParser:
    """The parser of `accelerate launch`. program: its name in messages."""
    from accelerate.commands.launch import launch_command_parser

    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of settings that have defaults
    parser = launch_command_parser()
    parser.prog = program
    return parser


def resolve_configuration(args: argparse.Namespace) -> argparse.Namespace:
    """The launcher's arguments, filled in from its configuration. Errors: UserError, or accelerate's own."""
    from accelerate.commands import launch

    if args.config_file:
        read_config_file(args.config_file, "--config_file")
    return launch._validate_launch_command(argparse.Namespace(**vars(args)))[0]


def needs_processes(resolved: argparse.Namespace) -> bool:
    """Whether the configuration has to be started by accelerate, and not as a single process."""
    return bool(uses_gpus(resolved) or resolved.tpu or resolved.mpirun_hostfile)


def uses_gpus(resolved: argparse.Namespace) -> bool:
    """Whether the configuration spreads a training over several GPUs."""
    return bool(resolved.multi_gpu or resolved.use_fsdp or resolved.use_deepspeed or resolved.use_megatron_lm)


def count_gpus() -> int:
    """The GPUs, or other accelerators, that torch sees."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def check_machine(resolved: argparse.Namespace, gpus: int) -> None:
    """Errors: UserError if this machine, with so many GPUs, lacks what the configuration needs."""
    name = resolved.config_file or "the configuration of `accelerate config`"
    if resolved.cpu or resolved.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return
    processes_here = max(1, resolved.num_processes // max(1, resolved.num_machines or 1))
    if resolved.use_deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            f"{name} is for DeepSpeed, which isn't installed: `pip install deepspeed`, or another"
            " configuration"
        )
    if gpus == 0 and (uses_gpus(resolved) or resolved.gpu_ids not in (None, "all")):
        raise UserError(
            f"{name} is for GPUs, and there is none here: use config/accelerate_config_cpu.yaml, or none at"
            " all"
        )
    if uses_gpus(resolved) and processes_here > gpus:
        raise UserError(
            f"{name} starts {processes_here} processes here, and there are {gpus} GPUs:"
            f" --num_processes {gpus} starts fewer"
        )


def check_first_machine(resolved: argparse.Namespace, timeout: float = START_TIMEOUT) -> None:
    """With several machines, the first needs an address that others can reach, and has to answer.

    Errors: UserError, on the other machines after `timeout` seconds.
    """
    if (resolved.num_machines or 1) < 2:
        return
    host, port = resolved.main_process_ip, int(resolved.main_process_port or 29500)
    if not resolved.machine_rank:
        if host in (None, "localhost") or host.startswith("127."):
            raise UserError(
                f"main_process_ip {host} is out of the other machines' reach: give this machine's address"
            )
        return
    print_status(f"waiting for the first machine, {host}:{port}")
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > deadline:
            way_out = "start it there first (machine_rank 0), and see main_process_ip and main_process_port"
            raise UserError(f"the first machine, {host}:{port}, doesn't answer ({reason}): {way_out}")
        time.sleep(1)


def single_process_command(resolved: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of a configuration that needs a single process."""
    from accelerate.commands.launch import prepare_simple_launcher_cmd_env

    return prepare_simple_launcher_cmd_env(resolved)


def launch_processes(args: argparse.Namespace, machines: int) -> int:
    """Starts the processes by accelerate and waits for them. machines: their number, for messages.

    Returns the exit code of the one that ended first with an error. Errors: UserError if not all machines are
    there.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # the script itself prints what was wrong
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    args.rdzv_conf = args.rdzv_conf or f"timeout={START_TIMEOUT}"
    try:
        launch_command(args)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except DistError as error:
        reason = one_line(error, 200)
        raise UserError(
            f"not all of {machines} machines were there within {START_TIMEOUT} s ({reason})"
        ) from None
    except SignalException as stop:
        return 128 + stop.sigval
    except KeyboardInterrupt:
        return 130
    return 0
