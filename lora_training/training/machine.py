"""Device, precision and processes of this machine."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.memory.frozen_linear import FrozenLinear, linear_product
from lora_training.optim.optimizers import make_optimizer
from lora_training.optim.parts import TrainedPart
from lora_training.tensors import torch_dtype

if TYPE_CHECKING:
    import argparse


def start_accelerator(args: argparse.Namespace):
    """accelerate's view of the machine: device, precision, processes, trackers."""
    import accelerate

    logs = str(Path(args.output_dir) / args.logging_dir)
    project = accelerate.utils.ProjectConfiguration(project_dir=args.output_dir, logging_dir=logs)
    trackers = None if args.report_to == "none" else args.report_to.split(",")
    processes = read_launcher_environment(args)
    try:
        device = accelerate.PartialState(
            cpu=accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")
        ).device
    except RuntimeError as error:
        raise UserError(f"the {processes} processes can't be connected: {one_line(error)}") from None
    args.mixed_precision = choose_precision(args, device)
    try_kernels(args, device)
    precision = {"mixed_precision": args.mixed_precision}
    accelerator = accelerate.Accelerator(**precision, log_with=trackers, project_config=project)
    if accelerator.num_processes != processes:
        raise UserError(f"{processes} processes can't train together on {accelerator.device.type}: start one")
    if args.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.mixed_precision == "fp16"):
        raise UserError("--cuda_graphs needs an NVIDIA GPU, and --mixed_precision bf16 or no")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def read_launcher_environment(args: argparse.Namespace) -> int:
    """Reads what accelerate would read otherwise in the launcher's environment; returns the number of
    processes.
    """
    processes, told = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("ACCELERATE_USE_CPU", "").lower()
    args.deepspeed = (
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    )  # its launcher, not its engine
    if args.deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") not in ("1", "2"):
        raise UserError(
            "DeepSpeed: use zero_stage 1 or 2; config/accelerate_config_fsdp2.yaml splits the base itself"
        )
    if os.environ.pop("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no" and not args.compile:
        print_status("the launcher's dynamo_backend means --compile")
        args.compile = True
    if processes > 1 and told != "true" and not torch.accelerator.is_available():
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate's launcher, not torchrun
            raise UserError(
                "the launcher's configuration is for GPUs, and there is none here: start it without one"
            )
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else each process would train alone, into one folder
    return processes


def choose_precision(args: argparse.Namespace, device) -> str:
    """The frozen base's precision, said with the device in one line.

    What a preset or the launcher's configuration wants is a wish, and becomes what the machine can do;
    --mixed_precision on the command line is an order. Errors: UserError.
    """
    kind, order = device.type, "mixed_precision" in args.command_line_flags
    # `able`: what it does well, first what a wish for another becomes; `never`: what it can't do at all
    name, able, never = f"CPU, {torch.get_num_threads()} threads", ["no", "bf16"], "fp16"
    if kind in ("cuda", "xpu"):
        library, hip = getattr(torch, kind), torch.version.hip
        # older GPUs compute bf16 in a roundabout way, which is for what overflows in fp16
        able, never = (
            [
                *["bf16"] * library.is_bf16_supported(including_emulation=args.family.predicts_flow),
                "fp16",
                "no",
            ],
            None,
        )
        system = "XPU" if kind == "xpu" else f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}"
        name = f"{library.get_device_name(device)}, {system}"
    elif kind == "mps":
        old = not torch.backends.mps.is_macos_or_newer(14, 0)
        able = ["bf16", "no"] if not old else ["no"] if args.family.predicts_flow else ["fp16", "no"]
        name, never = "Apple GPU, MPS", "bf16" if old else None
    elif shutil.which("nvidia-smi") and not torch.version.cuda:
        print_status(
            f"warning: torch {torch.__version__} is built for the CPU, and an NVIDIA GPU is there: see pytorch.org"
        )
    usual = able[0] if kind == "mps" else "no"  # most of a Mac's memory would be the frozen base's
    chosen = wanted = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", usual)
    if wanted == "fp16" and args.family.predicts_flow:
        print_status(f"{args.family.title} overflows in fp16: using bf16")
        chosen = wanted = "bf16"
    if order and wanted == never:
        instead = " or ".join(p for p in ("bf16", "fp16", "no") if p != never)
        raise UserError(f"--mixed_precision {wanted} can't be done here ({name}): use {instead}")
    if not order and wanted not in able:
        chosen = able[0]
    why = "" if chosen == wanted else f", for {wanted} is not this machine's"
    print_status(
        f"machine: {name}; the frozen base in {str(torch_dtype(chosen)).removeprefix('torch.')}{why}"
    )
    return chosen


def try_kernels(args: argparse.Namespace, device) -> None:
    """Tries on a few numbers what not every machine has kernels for, before anything is loaded.

    Errors: UserError; but what a preset asked for and is only faster or smaller is done without, which is
    said.
    """
    base, dtype = args.quantize_base, torch_dtype(args.mixed_precision)
    few = functools.partial(torch.zeros, 64, 64, device=device, dtype=dtype)

    def one_step() -> None:
        part = TrainedPart("trial", {"weights": torch.nn.Parameter(few().float())}, 1e-3, 0.0, 1)
        part.allocate()
        make_optimizer(part, args).step()

    def compiler() -> None:
        if device.type == "cuda":
            importlib.import_module("triton")
        else:
            importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()

    for name, value, wanted, trial, instead in (
        (
            "quantize_base",
            base,
            base,
            lambda: linear_product(FrozenLinear(few(), None, base, dtype), few()),
            None,
        ),
        ("optimizer", args.optimizer, args.optimizer == "adamw8bit", one_step, "adamw"),
        (
            "optimizer_args",
            "",
            bool(args.optimizer_args),
            one_step,
            None,
        ),  # which a class may take, and not its step
        ("compile", "", args.compile, compiler, False),
    ):
        try:
            if wanted:
                trial()
        except Exception as error:  # whatever is missing: a package, its library, a kernel, a type of numbers
            why = f"is not possible on this machine ({device.type}: {one_line(error)[:160]})"
            problem = " ".join([f"--{name}", *[value] * bool(value), why])
            if instead is None or {name, "use_8bit_adam"} & args.command_line_flags:
                raise UserError(f"{problem}: leave it out") from None
            setattr(args, name, instead)
            print_status(f"{problem}: done without")


def peak_memory(device) -> int:
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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def settle_seed(args: argparse.Namespace, resume: tuple[Path, dict] | None) -> None:
    """Without --seed: the checkpoint's, or one that is drawn, the same on every process."""
    from accelerate.utils import broadcast_object_list

    if args.seed is None:
        args.seed = broadcast_object_list(
            [resume[1]["seed"] if resume else random.SystemRandom().randrange(2**31)]
        )[0]
        print_status(f"seed {args.seed}")
