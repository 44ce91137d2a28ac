"""Command line and configuration files, parsed and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.cli.data_sets import read_set, set_entries
from lora_training.cli.flags import add_shared_args
from lora_training.cli.parser import OneLineParser, config_to_argv
from lora_training.cli.rules import check_args
from lora_training.errors import UserError
from lora_training.files import read_config_file

if TYPE_CHECKING:
    from lora_training.families import Family

OFF_VALUES = ("none", "0", "0.0", "false", "no", '""', "epsilon")


def parse_args(
    argv: list[str] | None,
    family: Family,
    script: str,
    add_family_args,
    rules: tuple[tuple, ...],
    foreign_flags: dict[str, str],
    lora_targets: tuple[str, ...],
    inference_steps: int,
    guidance: float,
) -> argparse.Namespace:
    """Parses and checks a recipe's command line on top of the --config file; nothing heavy has been imported
    yet.

    script: the recipe's file. lora_targets, inference_steps, guidance: what is usual in its family.
    add_family_args: adds its own flags by the function that it is given. rules: as RULES. foreign_flags:
    {flag of another family: why it can't be used here}; they are taken while they are off, so that published
    commands run. The settings as they were given stand in `settings`, their defaults in `defaults`, the flags
    of the command line itself in `ordered`.
    """
    parser = OneLineParser(description=f"Trains a LoRA for {family.title}.", allow_abbrev=False)
    parser.rules = rules
    add_shared_args(parser, family, lora_targets, inference_steps, guidance)
    add_family_args(parser.add_argument_group(f"{family.title} only").add_argument)
    for name in foreign_flags:
        parser.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = OneLineParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(argv)[0].config
    ordered = {argument.split("=")[0].lstrip("-") for argument in argv}
    argv = (config_to_argv(parser, read_config_file(file), f"--config {file}") if file else []) + argv
    args, unset = parser.parse_args(argv), object()
    marked = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    for name, why in foreign_flags.items():
        marked.__dict__.pop(name)
        if (args.__dict__.pop(name) or "none").lower() not in OFF_VALUES:
            raise UserError(f"--{name}: {why}")
    settings, defaults = dict(vars(args)), {name: parser.get_default(name) for name in vars(args)}
    given = {name for name, value in vars(marked).items() if value is not unset}
    args.family, args.script = family, Path(script).resolve()
    args.weight, args.is_class = 1.0, False
    args.sets = [read_set(parser, args, *entry) for entry in set_entries(args)]
    args.validation_split = max(own.validation_split for own in args.sets or [args])
    args.triggers = list(dict.fromkeys(own.trigger_word for own in args.sets or [args] if own.trigger_word))
    check_args(args, given, parser)
    if args.overwrite and "resume_from_checkpoint" not in ordered:  # which a recipe has
        args.resume_from_checkpoint = None
    args.settings, args.defaults, args.ordered = (
        settings,
        defaults,
        ordered,
    )  # settings: before anything was filled in
    return args
