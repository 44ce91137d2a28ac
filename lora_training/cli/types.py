"""Types of flags: numbers within bounds, yes or no."""

from __future__ import annotations

import argparse
import ast
import contextlib
import math
import os
from urllib.parse import urlsplit

from lora_training.errors import UserError


def number(name: str, kind: type, least: float, most: float, message: str):
    """A type for argparse, which names it in its errors: a number from `least` to `most`."""

    def convert(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} {message}")
        return value

    convert.__name__ = name
    return convert


count = number("count", int, 1, 2**31 - 1, "is below 1, or beyond what any run needs")
natural = number("whole number", int, 0, 2**31 - 1, "must not be negative, or beyond what any run needs")
share = number("share", float, 0, 1, "is not between 0 and 1")
part_of_one = number("share", float, 0, math.nextafter(1, 0), "is not from 0 up to, but without, 1")
rate = number("learning rate", float, 0, 100, "is not between 0 and 100")
amount = number("amount", float, 0, 1e9, "is not a number from 0 to 1e9")
signed = number("number", float, -100, 100, "is not a number between -100 and 100")
mode_scale = number("scale", float, 0, 1.75, "is not between 0 and 1.75: beyond, timesteps leave their range")
tokens = number("count", int, 1, 512, "is not between 1 and the 512 tokens that the pipeline takes")


def path(text: str) -> str:
    """A file or folder; ~ is the home folder, also where no shell has replaced it."""
    return os.path.expanduser(text)


def count_or_off(text: str) -> int | None:
    """A count; 0 turns its flag off, as if it weren't there."""
    return natural(text) or None


count_or_off.__name__ = natural.__name__


def steps(text: str) -> int | str | None:
    """A count of steps, "auto", or 0, which turns the flag off."""
    return text if text == "auto" else count_or_off(text)


steps.__name__ = natural.__name__

OPTIMIZERS = (
    *("adamw", "adamw8bit", "prodigy", "adafactor", "schedulefree"),
    *("muon", "lion8bit", "ademamix8bit", "came"),
)


def optimizer_name(text: str) -> str:
    """One of OPTIMIZERS in small letters, or a dotted name as it is."""
    if "." not in text and text.lower() not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(
            f"{text} is none of {', '.join(OPTIMIZERS)}; others take a dotted name, such as torch.optim.RAdam"
        )
    return text if "." in text else text.lower()


def key_and_value(text: str) -> tuple[str, object]:
    """key=value -> (key, the value as Python means it, else as text)."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"--optimizer_args {text} is not key=value")
    if key == "params":
        raise UserError(
            "--optimizer_args params: what is trained is for other flags to say, as --lora_layers"
        )
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def web_address(text: str) -> str | None:
    """An address that begins with http:// or https://; "none" is none."""
    if text in ("", "none"):
        return None
    host = None
    with contextlib.suppress(ValueError):
        host = urlsplit(text).hostname
    if not text.startswith(("http://", "https://")) or not host:
        raise argparse.ArgumentTypeError("it is no address that begins with https://")
    return text


def yes_or_no(text: str) -> bool:
    """true/false, as people write it."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return values[text.lower()]
