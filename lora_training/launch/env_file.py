"""Settings in a .env file, read as python-dotenv reads them, and the bash arrays that older files have."""

from __future__ import annotations

import io
import os
import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ARRAY = re.compile(
    r"^[ \t]*(?:export[ \t]+)?(\w+)=\((.*?)\)[ \t]*(?:#.*)?$",
    re.MULTILINE | re.DOTALL,
)


def read_env_file(file: Path) -> dict[str, str | list[str]]:
    """Names and values of a .env file; NAME=("a" "b") is a list. `~`, `$HOME` and the like are replaced."""
    if not file.is_file():
        return {}
    from dotenv import dotenv_values

    text = file.read_text(encoding="utf-8-sig")
    lists = {
        name: [expand(item) for item in shlex.split(items, comments=True)]
        for name, items in ARRAY.findall(text)
    }
    values = dotenv_values(stream=io.StringIO(ARRAY.sub("", text)))
    return {name: expand(value) for name, value in values.items() if value is not None} | lists


def expand(text: str) -> str:
    """A value with `~`, `$HOME` and the like replaced, also `~` after the = of a flag."""
    flag, equals, value = text.partition("=") if text.startswith("--") else ("", "", text)
    return flag + equals + os.path.expanduser(os.path.expandvars(value))


def merge_settings(file: Path, variables: Mapping[str, str]) -> dict[str, str | list[str]]:
    """What a .env file says, under the variables that are set already: NAME=x before a command wins."""
    return {**read_env_file(file), **variables}


def load_env_file(file: Path) -> dict[str, str | list[str]]:
    """The settings of a .env file and of the environment, which this process and what it starts then have.

    Lists are not put into the environment, which has no such thing.
    """
    settings = merge_settings(file, os.environ)
    os.environ.update({name: value for name, value in settings.items() if isinstance(value, str)})
    return settings
