"""argparse with errors of one line, and configuration files as command lines."""

from __future__ import annotations

import argparse
import difflib

from lora_training.cli.other_trainers import NAMES_ELSEWHERE
from lora_training.cli.types import path
from lora_training.errors import UserError, one_line
from lora_training.exits import report_error
from lora_training.flag_help import FullHelp, format_usual_flags


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that names the flag and the nearest known one.

    With --help_all, --help explains the flags that matter most.
    """

    shows_all = True

    def add_full_help(self) -> None:
        """Adds --help_all, and leaves USUAL_FLAGS to --help."""
        self.shows_all = False
        self.add_argument("--help_all", action=FullHelp, help="show all flags and exit")

    def format_help(self) -> str:
        if self.shows_all:
            return super().format_help()
        title = "flags that matter most (--help_all shows all)"
        usage = f"usage: {self.prog} [flags]\n\n{self.description}\n\n"
        return usage + format_usual_flags(self, title)

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments:"):
            wrong = message.split(":", 1)[1].strip().split(" ")[0].split("=")[0]
            near = self.nearest(wrong, cutoff=0.5)
            message = f"unknown flag {wrong}" + (
                f"; did you mean {near}?" if near else "; --help_all lists all flags"
            )
        raise SystemExit(report_error(message, 2))

    def nearest(self, wrong: str, cutoff: float) -> str | None:
        """The flag that other trainers call so, else the one of nearest spelling; never a hidden one."""
        known = [
            name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS
        ]
        near = difflib.get_close_matches(wrong, known, n=1, cutoff=cutoff)
        return NAMES_ELSEWHERE.get(wrong.lstrip("-")) or (near[0] if near else None)


def config_to_argv(parser: argparse.ArgumentParser, values: dict, where: str) -> list[str]:
    """Keys and values of a --config file as command-line words.

    Errors: UserError that says where, if a key is no flag (the nearest is named), or has a value of another
    kind.
    """
    tokens = []
    for key, value in values.items():
        flag = f"--{key}"
        action = parser._option_string_actions.get(flag)
        if action is None or flag == "--config":
            near = parser.nearest(flag, cutoff=0.0).lstrip("-")
            raise UserError(f"{where}: unknown key {key!r}; the nearest is {near!r}")
        if value is False and "no" in (action.choices or ()):
            value = "no"  # as YAML reads it without quotes
        flat = isinstance(value, list) and action.nargs in ("+", "*")
        if any(isinstance(v, list | dict) for v in (value if flat else [value])):
            what = "values in one list" if action.nargs in ("+", "*") else "one value"
            raise UserError(f"{where}: {key} takes {what}, and not {one_line(value)}")
        if isinstance(action, argparse._StoreTrueAction):
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} must be true or false, not {value!r}")
            tokens += [flag] if value else []
        elif isinstance(value, bool) and action.type in (None, path):
            raise UserError(
                f"{where}: {key} takes text: put {str(value).lower()} in quotes if it's meant as such"
            )
        elif flat:
            tokens += [flag, *(str(v) for v in value)]
        elif value is not None:
            tokens.append(f"{flag}={value}")
    return tokens
