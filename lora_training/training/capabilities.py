"""What this machine can compute: the base's precision, and kernels that not every machine has."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.memory.frozen_linear import FrozenLinear, linear_product
from lora_training.optim.trial import try_optimizer, try_steps
from lora_training.tensors import torch_dtype

if TYPE_CHECKING:
    import argparse

PRECISIONS = ("bf16", "fp16", "no")  # values of --mixed_precision


class Capabilities(NamedTuple):
    """What a device is called, and in which precisions it computes."""

    name: str
    suitable: list[str]  # what it does well; the first replaces a default that it doesn't do well
    impossible: str | None = None


def choose_precision(args: argparse.Namespace, device: torch.device) -> str:
    """The precision of the frozen base; prints it with the device in one line.

    "auto" is what suits the machine best. A preset's or the launcher's precision is a default, replaced by
    one that suits the machine; --mixed_precision on the command line is used as it is. Errors: UserError if
    the device can't do it.
    """
    family, is_explicit = args.family, "mixed_precision" in args.command_line_flags
    name, suitable, impossible = device_capabilities(device, family.predicts_flow)
    # in float32 the frozen base would take most of a Mac's memory
    usual = suitable[0] if device.type == "mps" else "no"
    requested = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", usual)
    if requested == "auto":
        requested = suitable[0]
    if requested == "fp16" and family.predicts_flow:
        print_status(f"{family.title} overflows in fp16: using bf16")
        requested = "bf16"
    if is_explicit and requested == impossible:
        possible = " or ".join(precision for precision in PRECISIONS if precision != impossible)
        raise UserError(f"--mixed_precision {requested} can't be done here ({name}): use {possible}")
    chosen = requested if is_explicit or requested in suitable else suitable[0]
    dtype = str(torch_dtype(chosen)).removeprefix("torch.")
    reason = "" if chosen == requested else f", for {requested} is not this machine's"
    print_status(f"machine: {name}; the frozen base in {dtype}{reason}")
    return chosen


def device_capabilities(device: torch.device, predicts_flow: bool) -> Capabilities:
    """What a device can do. predicts_flow: the family is one that overflows in fp16."""
    if device.type in ("cuda", "xpu"):
        return gpu_capabilities(device, predicts_flow)
    if device.type == "mps":
        return mps_capabilities(predicts_flow)
    if shutil.which("nvidia-smi") and not torch.version.cuda:
        build = f"torch {torch.__version__} is built for the CPU"
        print_status(f"warning: {build}, and an NVIDIA GPU is there: see pytorch.org")
    return Capabilities(f"CPU, {torch.get_num_threads()} threads", ["no", "bf16"], "fp16")


def gpu_capabilities(device: torch.device, predicts_flow: bool) -> Capabilities:
    """What an NVIDIA, AMD or Intel GPU can do."""
    library = getattr(torch, device.type)
    if device.type == "xpu":
        system = "XPU"
    elif torch.version.hip:
        system = f"ROCm {torch.version.hip}"
    else:
        system = f"CUDA {torch.version.cuda}"
    # older GPUs emulate bf16, which is slow: only for families that overflow in fp16
    has_bf16 = library.is_bf16_supported(including_emulation=predicts_flow)
    suitable = ["bf16", "fp16", "no"] if has_bf16 else ["fp16", "no"]
    return Capabilities(f"{library.get_device_name(device)}, {system}", suitable)


def mps_capabilities(predicts_flow: bool) -> Capabilities:
    """What an Apple GPU can do; bf16 from macOS 14 on."""
    name = "Apple GPU, MPS"
    if torch.backends.mps.is_macos_or_newer(14, 0):
        return Capabilities(name, ["bf16", "no"])
    return Capabilities(name, ["no"] if predicts_flow else ["fp16", "no"], "bf16")


class Trial(NamedTuple):
    """A setting that not every machine has kernels for, and what tries it."""

    flag: str
    value: str  # as the error names it after the flag
    run: Callable[[], object]
    fallback: object = None  # the value that replaces a default; None: there is none


def try_kernels(args: argparse.Namespace, device: torch.device) -> None:
    """Tries on a few numbers what not every machine has kernels for, before anything is loaded.

    A default that only makes the training faster or smaller is replaced, with a line that says so.
    Errors: UserError for a setting without which the training would be another.
    """
    for trial in trials_for(args, device):
        try:
            trial.run()
        except Exception as error:  # whatever is missing: a package, its library, a kernel, a type of numbers
            flag = f"--{trial.flag} {trial.value}".strip()
            reason = f"({device.type}: {one_line(error)[:160]})"
            problem = f"{flag} is not possible on this machine {reason}"
            if trial.fallback is None or {trial.flag, "use_8bit_adam"} & args.command_line_flags:
                raise UserError(f"{problem}: leave it out") from None
            setattr(args, trial.flag, trial.fallback)
            print_status(f"{problem}: done without")
    try_optimizer(args, device)


def trials_for(args: argparse.Namespace, device: torch.device) -> list[Trial]:
    """The settings of a run that have to be tried."""
    dtype = torch_dtype(args.mixed_precision)

    def multiply_quantized() -> None:
        weight, inputs = (torch.zeros(64, 64, device=device, dtype=dtype) for _ in range(2))
        linear_product(FrozenLinear(weight, None, args.quantize_base, dtype), inputs)

    trials = []
    if args.quantize_base:
        trials.append(Trial("quantize_base", args.quantize_base, multiply_quantized))
    if args.optimizer.endswith("8bit") and "." not in args.optimizer:
        step, is_adamw = functools.partial(try_steps, args, device), args.optimizer == "adamw8bit"
        trials.append(Trial("optimizer", args.optimizer, step, fallback="adamw" if is_adamw else None))
    if args.compile:
        trials.append(Trial("compile", "", lambda: import_compiler(device), fallback=False))
    return trials


def import_compiler(device: torch.device) -> None:
    """Errors: whatever is raised where torch.compile has no compiler for the device."""
    if device.type == "cuda":
        importlib.import_module("triton")
    else:
        importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
