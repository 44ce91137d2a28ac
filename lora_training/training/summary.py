"""The last lines of a run: its files, and the commands that draw with them or go on from them."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.data.captions import prepend_trigger
from lora_training.errors import one_line
from lora_training.files import output_name

if TYPE_CHECKING:
    import argparse

RESULTS = {  # what a finished run has to show, in the order in which a person wants it
    "LoRA": "pytorch_lora_weights.safetensors",
    "for others": "{name}.safetensors",
    "new tokens": "{name}_emb.safetensors",
    "pictures": "comparison.png",
    "report": "report.html",
}
RESUME_LATEST = ("--resume_from_checkpoint", "latest")


def print_summary(args: argparse.Namespace, processes: int = 1, stopped_at: int = 0) -> None:
    """Prints which step to take, where the files are, and the commands that use them.

    stopped_at: the step after which a signal ended the run, else 0; then the lines are about its checkpoint.
    """
    if args.dry_run:
        return
    output = Path(args.output_dir)
    weights_folder = output / f"checkpoint-{stopped_at}" if stopped_at else output
    if not stopped_at:
        print_advice(output)
    for title, pattern in RESULTS.items():
        folder = weights_folder if pattern.endswith("safetensors") else output
        file = folder / pattern.format(name=output_name(output))
        if file.is_file():
            print_status(f"{title:12}{file}")
    prompt = one_line(example_prompt(args)) or "a picture"
    project = args.script.parent
    draw = command_line(project, "run_lora_infer", "infer_lora.py", [], weights_folder, "--prompt", prompt)
    print_status(f"{'draw':12}{draw}")
    if stopped_at:
        print_status(f"{'go on':12}{resume_command(args, processes)}")


def print_advice(output: Path) -> None:
    """Prints what verdict.json advises, if the run has one."""
    file = output / "verdict.json"
    if file.is_file():
        verdict = json.loads(file.read_text(encoding="utf-8"))
        lines = (verdict["text"], *verdict["warnings"])
        print_status("\n".join(f"advice: {line}" for line in lines))


def example_prompt(args: argparse.Namespace) -> str:
    """A prompt that shows what was trained: of validation, or a training caption; empty if there is none."""
    if args.validation_prompt and args.validation_prompt[0]:
        return args.validation_prompt[0]
    with contextlib.suppress(OSError, ValueError, LookupError):
        data = json.loads(Path(args.output_dir, "data.json").read_text(encoding="utf-8"))
        caption = data["captions"][0][1]
        return prepend_trigger(caption, args.triggers[0] if args.triggers else None)
    return ""


def resume_command(args: argparse.Namespace, processes: int) -> str:
    """The command that goes on from a run's last checkpoint."""
    if processes > 1:
        return f"the same command with {' '.join(RESUME_LATEST)}"
    flags = ("--config", Path(args.output_dir) / "config.yaml", *RESUME_LATEST)
    first = [args.family.name]
    return command_line(args.script.parent, "run_lora_train", args.script.name, first, *flags)


def command_line(
    project: Path, wrapper: str, program: str, wrapper_arguments: list[str], *arguments: object
) -> str:
    """A command line for the system's own shell that starts one of the project's programs.

    It is the project's wrapper, with `wrapper_arguments` first, if the current folder is the project's, else
    Python with the program's file.
    """
    import subprocess

    is_windows = sys.platform == "win32"
    wrapper_file = project / f"{wrapper}{'.bat' if is_windows else '.sh'}"
    if wrapper_file.is_file() and Path.cwd() == project:
        shell = [] if is_windows else ["bash"]
        argv = [*shell, wrapper_file.name, *wrapper_arguments, *arguments]
    elif (project / program).is_file():
        argv = [sys.executable, project / program, *arguments]
    else:
        return "README.md there has the lines for diffusers"
    quote = subprocess.list2cmdline if is_windows else shlex.join
    return quote([str(argument) for argument in argv])
