"""The processes of this machine and what they share: accelerator, launcher's environment, seed, memory."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.training.capabilities import choose_precision, try_kernels

if TYPE_CHECKING:
    import argparse

    from accelerate import Accelerator


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """accelerate's view of the machine: device, precision, processes, trackers.

    Errors: UserError for settings that can't work here.
    """
    import accelerate

    processes = read_launcher_environment(args)
    device = connect_processes(processes)
    args.mixed_precision = choose_precision(args, device)
    try_kernels(args, device)
    logs = str(Path(args.output_dir) / args.logging_dir)
    accelerator = accelerate.Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to.split(","),
        project_config=accelerate.utils.ProjectConfiguration(project_dir=args.output_dir, logging_dir=logs),
    )
    if accelerator.num_processes != processes:
        raise UserError(f"{processes} processes can't train together on {accelerator.device.type}: start one")
    if args.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.mixed_precision == "fp16"):
        raise UserError("--cuda_graphs needs an NVIDIA GPU, and --mixed_precision bf16 or no")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    return accelerator


def connect_processes(processes: int) -> torch.device:
    """Connects the processes of a run; returns this one's device. Errors: UserError."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    try:
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    except RuntimeError as error:
        raise UserError(f"the {processes} processes can't be connected: {one_line(error)}") from None


def read_launcher_environment(args: argparse.Namespace) -> int:
    """Reads settings in the launcher's environment that accelerate would use otherwise.

    Sets args.deepspeed and args.compile; returns the number of processes. Errors: UserError for a
    configuration that doesn't fit the machine.
    """
    # DeepSpeed's launcher is used, not its engine
    args.deepspeed = os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if args.deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") not in ("1", "2"):
        fsdp = "config/accelerate_config_fsdp2.yaml splits the base itself"
        raise UserError(f"DeepSpeed: use zero_stage 1 or 2; {fsdp}")
    dynamo_backend = os.environ.pop("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo_backend != "no" and not args.compile:
        print_status("the launcher's dynamo_backend means --compile")
        args.compile = True
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    uses_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if processes > 1 and not uses_cpu and not torch.accelerator.is_available():
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate's launcher, not torchrun
            problem = "the launcher's configuration is for GPUs, and there is none here"
            raise UserError(f"{problem}: start it without one")
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else each process would train alone, into one folder
    return processes


def choose_seed(args: argparse.Namespace, checkpoint: tuple[Path, dict] | None) -> None:
    """Without --seed, takes the checkpoint's, or draws one; every process gets the same.

    checkpoint: (folder, manifest) of the one to go on from.
    """
    from accelerate.utils import broadcast_object_list

    if args.seed is None:
        seed = checkpoint[1]["seed"] if checkpoint else random.SystemRandom().randrange(2**31)
        args.seed = broadcast_object_list([seed])[0]
        print_status(f"seed {args.seed}")


def peak_memory(device: torch.device) -> int:
    """The most bytes that the run has held so far: of the GPU's memory or, on the CPU, of the process."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_reserved()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # what is held now, and Metal gives little back
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
