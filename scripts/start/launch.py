"""Starts a training script as `accelerate launch` does, with the script's own exit code and no traceback of the launcher.

    python scripts/start/launch.py --config_file config/accelerate_config_multi_gpu.yaml train_lora_sdxl.py [flags]

It takes the flags of `accelerate launch`. What can't work is said before anything is started: a configuration for GPUs without
GPUs, DeepSpeed that isn't installed, a first machine that doesn't answer.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.start.parts.env_file import export, settings_of
from scripts.start.parts.process import ROOT, become, complain
from scripts.start.parts.words import StartError, read_values

PATIENCE = 60  # seconds in which all machines have to be there


def count_gpus() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def check_machine(args: argparse.Namespace, gpus: int) -> None:
    """Refuses what a configuration wants and this machine hasn't. args: accelerate's, with its configuration filled in."""
    name = args.config_file or "the configuration of `accelerate config`"
    if args.cpu or args.use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return
    several = args.multi_gpu or args.use_fsdp or args.use_deepspeed or args.use_megatron_lm
    here = max(1, args.num_processes // max(1, args.num_machines or 1))
    if args.use_deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise StartError(
            f"{name} is for DeepSpeed, which isn't installed: `pip install deepspeed`, or another configuration"
        )
    if (several or args.gpu_ids not in (None, "all")) and gpus == 0:
        raise StartError(
            f"{name} is for GPUs, and there is none here: use config/accelerate_config_cpu.yaml, or none at all"
        )
    if several and here > gpus:
        raise StartError(
            f"{name} starts {here} processes here, and there are {gpus} GPUs: --num_processes {gpus} starts fewer"
        )


def check_peers(args: argparse.Namespace, patience: float = PATIENCE) -> None:
    """With several machines, on the first: others must be able to reach it. On the others: waits until it answers."""
    if (args.num_machines or 1) < 2:
        return
    place, end = (args.main_process_ip, int(args.main_process_port or 29500)), time.monotonic() + patience
    if not args.machine_rank:
        if place[0] in (None, "localhost") or place[0].startswith("127."):
            raise StartError(
                f"main_process_ip {place[0]} is out of the other machines' reach: give this machine's address"
            )
        return
    print(f"waiting for the first machine, {place[0]}:{place[1]}", flush=True)
    while True:
        try:
            socket.create_connection(place, timeout=5).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > end:
            way_out = "start it there first (machine_rank 0), and see main_process_ip and main_process_port"
            raise StartError(f"the first machine, {place[0]}:{place[1]}, doesn't answer ({reason}): {way_out}")
        time.sleep(1)


def launch(args: argparse.Namespace) -> int:
    """Starts the processes and waits for them; returns the exit code of the one that ended first with an error."""
    from accelerate.commands import launch as accelerate_launch
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if args.config_file and not read_values(args.config_file, "--config_file"):
        raise StartError(f"--config_file {args.config_file} is empty")
    resolved, _, _ = accelerate_launch._validate_launch_command(argparse.Namespace(**vars(args)))
    check_machine(resolved, count_gpus())
    check_peers(resolved)
    several = (
        resolved.multi_gpu or resolved.use_fsdp or resolved.use_deepspeed or resolved.use_megatron_lm or resolved.tpu
    )
    if not several and not resolved.mpirun_hostfile:
        return become(*accelerate_launch.prepare_simple_launcher_cmd_env(resolved))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the script says what was wrong
    args.rdzv_conf = args.rdzv_conf or f"timeout={PATIENCE}"
    try:
        accelerate_launch.launch_command(args)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except DistError as error:
        reason = " ".join(str(error).split())[:200]
        raise StartError(
            f"not all of {resolved.num_machines} machines were there within {PATIENCE} s ({reason})"
        ) from None
    except SignalException as stop:
        return 128 + stop.sigval
    return 0


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    export(settings_of(ROOT / ".env", os.environ))
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # which settings had defaults is no news
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.prog = Path(sys.argv[0]).name
    try:
        return launch(parser.parse_args(words))
    except StartError as error:
        return complain(str(error))
    except (ValueError, OSError, AssertionError) as error:  # what accelerate finds wrong with its configuration
        return complain(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
