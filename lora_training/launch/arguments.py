"""Flags read from a command line whose full parser belongs to another program, and flags written as one."""

from __future__ import annotations

import argparse
import difflib

from lora_training.errors import UserError
from lora_training.families import FAMILIES

FAMILY_NAMES = (*FAMILIES, "auto")
MODEL_FLAGS = "-m --pretrained_model_name_or_path --model_name_or_path"
FOLDER_FLAGS = "-d --train_data_dir --data_dir --instance_data_dir"
DATA_FLAGS = f"{FOLDER_FLAGS} --dataset_name --data_name"


class FlagFinder(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors."""

    def error(self, message: str) -> None:
        raise UserError(message)


def take_flags(argv: list[str], *flags: str) -> tuple[list[str | None], list[str]]:
    """Takes flags with one value out of a command line.

    flags: each with all its names, separated by spaces, "-m --model_name_or_path". Returns (each flag's last
    value or None, the other arguments). Errors: UserError for a flag without its value.
    """
    finder = FlagFinder(add_help=False, allow_abbrev=False)
    for number, names in enumerate(flags):
        finder.add_argument(*names.split(), dest=f"flag_{number}")
    args, other_arguments = finder.parse_known_args(argv)
    return [getattr(args, f"flag_{number}") for number in range(len(flags))], other_arguments


def has_flag(argv: list[str], names: str) -> bool:
    """Whether one of a flag's names, separated by spaces, is on the command line."""
    return bool({argument.split("=")[0] for argument in argv} & set(names.split()))


def to_argv(flags: dict[str, object], joined: bool = False) -> list[str]:
    """{flag: value} as a command line: True is a flag alone, False and None are no flag.

    joined: a flag and its value are one argument, so that the value may begin with a dash.
    """
    argv: list[str] = []
    for name, value in flags.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is True:
            argv += [f"--{name}"]
        elif value is not None and value is not False:
            argv += [f"--{name}={value}"] if joined else [f"--{name}", str(value)]
    return argv


def split_family(argv: list[str]) -> tuple[str | None, list[str]]:
    """(the family that stands first on the command line, the other arguments); None for auto, or for none.

    Errors: UserError for a first argument that is neither a family nor a flag.
    """
    if not argv or argv[0].startswith("-"):
        return None, argv
    first, *others = argv
    if first not in FAMILY_NAMES:
        near = difflib.get_close_matches(first, FAMILY_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{first!r} is no family: {', '.join(FAMILY_NAMES)}{hint} (flags begin with --)")
    return None if first == "auto" else first, others
