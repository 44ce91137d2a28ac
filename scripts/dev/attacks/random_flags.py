"""Command lines and configuration files with random flags, drawn by a generator."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from scripts.dev.attacks.flag_values import (
    BUNDLES,
    BY_NAME,
    BY_TYPE,
    CAPPED,
    EXCLUDED,
    WORDS,
)
from scripts.dev.attacks.odd_values import odd_values

UNKNOWN_KEYS = (1, None, "learning_rat", "a b", "help", "", "-m", "_", "sets", "seed ")


def values_of(action: argparse.Action) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(good values, others) of a flag."""
    name = action.option_strings[0].removeprefix("--")
    if name in BY_NAME:
        good, odd = BY_NAME[name]
        others = odd_values("bad count" if name in CAPPED else "text")
        return good, (*odd, *others[: len(odd) + 3])
    if action.choices:
        return tuple(map(str, action.choices)), (*odd_values("text"), str(action.choices[0]).upper())
    if action.type is None:
        return WORDS, tuple(odd_values("text"))
    good, borderline = BY_TYPE[action.type.__name__]
    return good, (*borderline * 50, *odd_values("number"))


def draw_flag(action: argparse.Action, rng: random.Random, odd: bool) -> list[str]:
    """A flag with a value, as arguments."""
    flag = rng.choice(action.option_strings) if odd else action.option_strings[0]
    if action.nargs == 0:
        return [flag]
    good, others = values_of(action)
    value = rng.choice(others if odd and others else good)
    if action.nargs in ("+", "*", "?"):
        return [flag, *value.split(" ")] if value else [flag]
    return [flag, value] if not value.startswith("-") else [f"{flag}={value}"]


def draw_flags(actions: list[argparse.Action], rng: random.Random) -> list[str]:
    """Arguments: some that go together, some that are good by themselves, in half of the draws odd ones."""
    bundles = rng.sample(BUNDLES, rng.choice((0, 1, 1, 2, 3)))
    argv = [argument for bundle in bundles for argument in bundle]
    drawable = [
        action for action in actions if action.option_strings and not names_of(action) & set(EXCLUDED)
    ]
    for action in rng.sample(drawable, rng.choice((0, 1, 1, 2, 4))):
        argv += draw_flag(action, rng, odd=False)
    for action in rng.sample(drawable, rng.choice((0, 0, 1, 1, 2))):
        argv += draw_flag(action, rng, odd=True)
    return argv


def names_of(action: argparse.Action) -> set[str]:
    """A flag's spellings, without dashes."""
    return {option.lstrip("-") for option in action.option_strings}


def to_config(argv: list[str], rng: random.Random) -> dict:
    """Arguments as a --config file has them.

    In a third of the draws one has a value of another kind, and now and then there is a key that no flag has.
    """
    values, key = {}, None
    for argument in argv:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            values[key] = value if equals else True
        elif key is not None:
            add_value(values, key, parse_value(argument, rng))
    if values and rng.random() < 0.33:
        values[rng.choice(list(values))] = rng.choice(odd_values("JSON"))
    if rng.random() < 0.05:
        values[rng.choice(UNKNOWN_KEYS)] = 1
    return values


def parse_value(argument: str, rng: random.Random) -> object:
    """A number or another value of JSON in most draws, else the text."""
    try:
        return json.loads(argument) if rng.random() < 0.8 and not argument.startswith('"') else argument
    except ValueError:
        return argument


def add_value(values: dict, key: str, value: object) -> None:
    """Another value of a key; several are a list."""
    if values[key] is True:
        values[key] = value
    elif isinstance(values[key], list):
        values[key].append(value)
    else:
        values[key] = [values[key], value]


def fill_paths(text: str, paths: dict[str, Path]) -> str:
    """A value with the paths that it names as {name}."""
    for name, path in paths.items():
        text = text.replace(f"{{{name}}}", str(path))
    return text
