"""Flags on a command line, and the YAML or JSON files that they name."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path


class StartError(Exception):
    """A mistake that a person can mend: its message is the one line that is printed."""


class Finder(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise StartError(message)


def taken(words: list[str], *flags: str) -> tuple[list[str | None], list[str]]:
    """Takes flags with one value out of a command line. A flag's names are separated by spaces, "-m --model_name_or_path".

    Returns (each flag's last value or None, the other words).
    """
    finder = Finder(add_help=False, allow_abbrev=False)
    for number, names in enumerate(flags):
        finder.add_argument(*names.split(), dest=f"flag_{number}")
    found, others = finder.parse_known_args(words)
    return [getattr(found, f"flag_{number}") for number in range(len(flags))], others


def is_given(words: list[str], names: str) -> bool:
    """Whether one of a flag's names, separated by spaces, is on the command line."""
    return bool({word.split("=")[0] for word in words} & set(names.split()))


def as_words(flags: dict[str, object]) -> list[str]:
    """Flags and their values as a command line: True is a flag alone, False and None are none, a list is several words."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def shown(words: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in words)


def read_values(file: str, flag: str = "--config") -> dict:
    """The names and values of a YAML or JSON file. Errors: StartError that names it."""
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))  # JSON is YAML too
    except OSError as error:
        raise StartError(f"{flag} {file}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise StartError(f"{flag} {file}: not YAML or JSON: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise StartError(f"{flag} {file}: expected names and values, found {type(values).__name__}")
    return values or {}
