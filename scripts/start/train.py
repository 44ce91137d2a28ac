"""Decides how a training is started, and starts it: what run_lora_train.sh and run_lora_train.bat do.

    python scripts/start/train.py [sd15|sdxl|sd3|flux|auto] [flags…]

--help explains families, settings and the usual flags; lora_training/launch/ has what is decided.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: library and commands

from lora_training.errors import UserError
from lora_training.families import FAMILIES
from lora_training.launch import help
from lora_training.launch.arguments import has_flag, split_family
from scripts.start.process import ROOT, become, program, report_error


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if has_flag(argv, "--help -h --help_all"):
        return show_help(argv)
    from lora_training import exits  # needs packages, unlike the help

    with exits.exit_code(program(), user_errors=(OSError,)) as outcome:
        outcome.crash_log = f"{program()}-crash.log"
        outcome.code = start_training(argv)
    return outcome.code


def show_help(argv: list[str]) -> int:
    """Prints the usual flags, or all of them (--help_all), which the training script itself prints."""
    try:
        family, _ = split_family(argv)
    except UserError as error:
        return report_error(str(error))
    if has_flag(argv, "--help_all"):
        return become([sys.executable, str(ROOT / FAMILIES[family or "sd15"].training_script), "--help_all"])
    print(help.format_help(family, program()), end="")
    return 0


def start_training(argv: list[str]) -> int:
    """Prepares pictures, if a workflow says so, and goes on as the training; returns its exit code."""
    from lora_training.launch.class_prompt import add_class_prompt
    from lora_training.launch.decision import decide
    from lora_training.launch.env_file import load_env_file

    settings = load_env_file(ROOT / ".env")
    if has_flag(argv, "--queue"):
        return start_queue(argv, settings)
    start = decide(argv, settings)
    print("".join(f"{note}\n" for note in start.notes), end="", flush=True)
    if start.preparation_argv:
        script = str(ROOT / "scripts/dataset/prepare_dataset.py")
        if code := subprocess.call([sys.executable, script, *start.preparation_argv]):
            return code
    start.argv = add_class_prompt(start.argv)
    if start.launch_config:  # the launcher's errors are the wrapper's, too
        start.environment["STARTED_AS"] = program()
    return become(start.command(ROOT), start.environment)


def start_queue(argv: list[str], settings: dict) -> int:
    """Starts the trainings of --queue one after another; returns the exit code of all together."""
    from lora_training.queue.running import run_queue

    if argv[0] != "--queue" or not argv[1:] or any(argument.startswith("-") for argument in argv[1:]):
        raise UserError("--queue FILE … stands alone: flags belong into its file, under defaults")
    return run_queue(argv[1:], [sys.executable, str(Path(__file__).resolve())], settings)


if __name__ == "__main__":
    sys.exit(main())
