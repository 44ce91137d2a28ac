"""Cases of measure_gpu.py and count_step.py: family:size:batch[:flag[=value],...], and their arguments."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

from lora_training.errors import UserError
from lora_training.families import FAMILIES

FLUX = "flux:1024:1:gradient_checkpointing"
CASES = [
    *("sd15:512:1", "sd15:512:1:compile", "sd15:512:1:cuda_graphs"),
    *("sd15:512:4", "sd15:512:4:compile", "sd15:512:4:cuda_graphs", "sd15:512:4:channels_last"),
    *("sdxl:1024:1", "sdxl:1024:1:gradient_checkpointing", "sdxl:1024:1:optimizer=adamw8bit"),
    *("sdxl:1024:1:optimizer=prodigy", "sdxl:1024:1:compile", "sdxl:1024:1:cuda_graphs"),
    *("sdxl:1024:1:channels_last", "sdxl:1024:1:cudnn_attention"),
    *("sd3:1024:1", "sd3:1024:1:gradient_checkpointing"),
    *(FLUX, f"{FLUX},quantize_base=fp8", f"{FLUX},quantize_base=nf4", f"{FLUX},quantize_base=int8"),
    *(f"{FLUX},compile", f"{FLUX},cudnn_attention", f"{FLUX},kept_attention"),
    *("flux:512:1:gradient_checkpointing", "flux:1024:1"),
    "sd3:1024:1:gradient_checkpointing,kept_attention",
]
TINY_CASES = [
    "sd15:64:2:optimizer=prodigy",
    "sdxl:64:1:gradient_checkpointing",
    "sd3:64:1",
    "flux:64:1:quantize_base=int8",
]
TRIALS = ("channels_last", "cudnn_attention", "kept_attention")  # tried here alone: no flags of the scripts
# Flags that change nothing but rounding
SAME_RESULT = ("compile", "cuda_graphs", "gradient_checkpointing", "blocks_to_swap", "quantize_base", *TRIALS)
# Flags that diffusers' examples know too
EXAMPLE_FLAGS = ("gradient_checkpointing", "optimizer=adamw8bit", "optimizer=prodigy", "rank")
PACKAGES = {
    "optimizer=prodigy": "prodigyopt",
    "optimizer=schedulefree": "schedulefree",
    "optimizer=adamw8bit": "bitsandbytes",
    "quantize_base=nf4": "bitsandbytes",
}


class Case(NamedTuple):
    """A training script's family, side of the pictures in pixels, batch size and flags."""

    family: str
    size: int
    batch: int
    flags: list[str]  # without dashes: "rank=8", "compile", or one of TRIALS


def parse_case(text: str) -> Case:
    """ "flux:512:1:compile,rank=8" -> the case."""
    family, size, batch, *flags = text.split(":", 3)
    return Case(family, int(size), int(batch), [flag for flag in (flags or [""])[0].split(",") if flag])


def common_argv(case: Case, output: Path, base: Path, pictures: Path, steps: int) -> list[str]:
    """The arguments that the project's scripts and diffusers' examples share; without the case's flags."""
    argv = ["--pretrained_model_name_or_path", base, "--output_dir", output, "--resolution", case.size]
    argv += ["--instance_data_dir", pictures, "--instance_prompt", "a picture"]
    argv += ["--train_batch_size", case.batch, "--mixed_precision", "bf16", "--cache_latents"]
    argv += ["--max_train_steps", steps, "--rank", 4, "--seed", 0]
    return [str(argument) for argument in argv]


def flags_to_argv(flags: list[str]) -> list[str]:
    """["rank=8", "compile"] -> arguments of a command line; without TRIALS."""
    return [argument for flag in flags if flag not in TRIALS for argument in f"--{flag}".split("=", 1)]


def example_flags(flags: list[str]) -> list[str]:
    """The same flags as diffusers' examples spell them."""
    return ["use_8bit_adam" if flag == "optimizer=adamw8bit" else flag for flag in flags]


def choose_cases(texts: list[str] | None, tiny: bool) -> list[str]:
    """The cases that --cases means: cases, or beginnings of listed ones.

    Errors: UserError for a text that means none.
    """
    listed = TINY_CASES if tiny else CASES
    chosen: list[str] = []
    for text in texts or [""]:
        family, size, batch, *_ = (text + ":::").split(":")
        if family in FAMILIES and size.isdigit() and batch.isdigit():
            chosen.append(text)
        elif matches := [case for case in listed if case.startswith(text)]:
            chosen += matches
        else:
            expected = "FAMILY:SIZE:BATCH[:FLAG,...] nor the beginning of a case of --list"
            raise UserError(f"--cases {text}: neither {expected}")
    return list(dict.fromkeys(chosen))


def without_same_result_flags(text: str, extra_flags: list[str]) -> str:
    """The case with the same result in plain bf16, with `extra_flags` added."""
    case = parse_case(text)
    flags = [flag for flag in case.flags if flag.split("=")[0] not in SAME_RESULT]
    return ":".join([case.family, str(case.size), str(case.batch), ",".join(flags + extra_flags)])


def has_example(text: str) -> bool:
    """Whether diffusers' example has all of the case's flags."""
    return all(flag in EXAMPLE_FLAGS or flag.startswith("rank=") for flag in parse_case(text).flags)


def missing_package(text: str) -> str | None:
    """A package that a case needs and that isn't installed."""
    packages = [PACKAGES[flag] for flag in parse_case(text).flags if flag in PACKAGES]
    return next((name for name in packages if importlib.util.find_spec(name) is None), None)
