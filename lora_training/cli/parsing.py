"""Command line and configuration files, parsed and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.cli.checks import check_args
from lora_training.cli.data_sets import read_set, set_entries
from lora_training.cli.defaults import fill_learning_rate, settle_run
from lora_training.cli.flags import add_shared_args
from lora_training.cli.parser import OneLineParser, config_to_argv
from lora_training.cli.types import path
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
    parser = make_parser(family, add_family_args, foreign_flags, lora_targets, inference_steps, guidance)
    parser.rules = rules
    argv = list(sys.argv[1:] if argv is None else argv)
    command_line_flags = {argument.split("=")[0].lstrip("-") for argument in argv}
    typed, argv = argv, config_arguments(parser, argv) + argv
    args, set_flags = parser.parse_args(argv), given_flags(parser, argv)
    for name, reason in foreign_flags.items():
        set_flags.discard(name)
        if (vars(args).pop(name) or "none").lower() not in OFF_VALUES:
            raise UserError(f"--{name}: {reason}")
    defaults = {name: parser.get_default(name) for name in vars(args)}
    fill_learning_rate(args, defaults)
    settings = dict(vars(args))
    args.family, args.script = family, Path(script).resolve()
    args.lora_targets = lora_targets
    if args.script.parent.is_file():  # of scripts/bundle.py
        args.script = args.script.parent
    args.weight, args.is_class = 1.0, False
    args.sets = [read_set(parser, args, *entry) for entry in set_entries(args)]
    args.validation_split = max(own.validation_split for own in args.sets or [args])
    configured = set(set_flags)
    check_args(args, set_flags, parser, typed=given_flags(parser, typed))
    settings |= {name: defaults[name] for name in configured - set_flags}  # they are off
    settle_run(args)
    if args.overwrite and "resume_from_checkpoint" not in command_line_flags:  # which a configuration has
        args.resume_from_checkpoint = None
    args.settings, args.defaults = settings, defaults  # settings: before anything was filled in
    args.command_line_flags = command_line_flags
    return args


def given_flags(parser: OneLineParser, argv: list[str]) -> set[str]:
    """The flags that a command line has, by the names of their settings."""
    unset = object()
    marked = argparse.Namespace(**{action.dest: unset for action in parser._actions})
    return {name for name, value in vars(parser.parse_args(argv, marked)).items() if value is not unset}


def make_parser(
    family: Family, add_family_args, foreign_flags: dict[str, str], *usual_values: object
) -> OneLineParser:
    """A parser with a family's flags; usual_values: as `add_shared_args` takes them."""
    about = f"Trains a LoRA for {family.title}."
    parser = OneLineParser(usage="%(prog)s [flags]", description=about, allow_abbrev=False)
    parser.add_full_help()
    add_shared_args(parser, family, *usual_values)
    add_family_args(parser.add_argument_group(f"{family.title} only").add_argument)
    for name in foreign_flags:
        parser.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)
    return parser


def config_arguments(parser: OneLineParser, argv: list[str]) -> list[str]:
    """What the --config file says, if one is named, as arguments of the command line."""
    finder = OneLineParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=path)
    file = finder.parse_known_args(argv)[0].config
    return config_to_argv(parser, read_config_file(file), f"--config {file}") if file else []
