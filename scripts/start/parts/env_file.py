"""Reads .env, as python-dotenv does, and the bash arrays that older ones hold."""

from __future__ import annotations

import io
import os
import re
import shlex
from pathlib import Path

ARRAY = re.compile(r"^[ \t]*(?:export[ \t]+)?(\w+)=\((.*?)\)[ \t]*(?:#.*)?$", re.MULTILINE | re.DOTALL)


def read_env_file(file: Path) -> dict[str, str | list[str]]:
    """Names and values of a .env file; NAME=("a" "b") is a list. `~`, `$HOME` and the like are replaced."""
    if not file.is_file():
        return {}
    from dotenv import dotenv_values

    text = file.read_text(encoding="utf-8-sig")
    lists = {name: shlex.split(words, comments=True) for name, words in ARRAY.findall(text)}
    plain = dotenv_values(stream=io.StringIO(ARRAY.sub("", text)))
    return {k: os.path.expanduser(os.path.expandvars(v)) for k, v in plain.items() if v is not None} | lists


def settings_of(file: Path, variables) -> dict[str, str | list[str]]:
    """What .env says, with the variables that are set already on top: NAME=x before a command wins."""
    return {**read_env_file(file), **variables}


def export(settings: dict[str, str | list[str]]) -> None:
    """Makes the settings variables of this process and of what it starts; lists have no place there."""
    os.environ.update({name: value for name, value in settings.items() if isinstance(value, str)})
