"""--rank_pattern, --alpha_pattern and --lr_pattern: values for those layers whose names a pattern matches.

Not for which layers get a LoRA at all: lora/adapters.py.
"""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

PATTERN_FLAGS = {"rank_pattern": int, "alpha_pattern": float, "lr_pattern": float}


class LayerPatterns:
    """The entries of one flag; the first that matches a layer gives its value, as in peft.

    An entry is PATTERN=VALUE, PATTERN a regular expression that means whole parts of a layer's name and all
    that is inside of them: `mid_block`, `ff`, `attn1.to_[kv]`, `text_encoder_2`. `matched` has the entries
    that have matched a layer so far.
    """

    def __init__(self, flag: str, texts: list[str] | None) -> None:
        self.flag = flag
        self.entries = [split_entry(entry) for text in texts or [] for entry in text.split()]
        self.values = [PATTERN_FLAGS[flag](value) for _, value in self.entries]
        self.matched: set[str] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerPatterns) and (self.flag, self.entries) == (other.flag, other.entries)

    def value(self, part: str, layer: str, default: float) -> float:
        """What the flag says of a layer of a part of the pipeline, else the default."""
        layer = layer.removeprefix("text_model.")
        found = default
        for (pattern, _), value in zip(reversed(self.entries), reversed(self.values), strict=True):
            expression = re.compile(rf"(?:.*\.)?(?:{pattern})(?:\..*)?")
            if expression.fullmatch(f"{part}.{layer}") or expression.fullmatch(layer):
                self.matched.add(pattern)
                found = value
        return found

    def check_matched(self, layers: Iterable[str]) -> None:
        """Errors: UserError for an entry that has matched no layer; it names the nearest of `layers`."""
        for pattern, value in self.entries:
            if pattern in self.matched:
                continue
            names = sorted({n for layer in layers for n in (*layer.split("."), *dotted_starts(layer))})
            names = [name for name in names if not name.isdecimal()]
            near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:5])
            raise UserError(f"--{self.flag} {pattern}={value} matches no layer trained; near it are {near}")


def split_entry(entry: str) -> tuple[str, str]:
    """PATTERN=VALUE as two texts; a pattern may have = in it. Errors: ValueError that says what is wrong."""
    pattern, _, value = entry.rpartition("=")
    if not pattern:
        raise ValueError(f"{entry} is not PATTERN=VALUE, such as mid_block=8")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern} is no regular expression: {error}") from None
    return pattern, value


def dotted_starts(layer: str) -> list[str]:
    """The names of the blocks that a layer lies in: a, a.b, a.b.c of a.b.c."""
    parts = layer.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def read_patterns(args: argparse.Namespace) -> dict[str, LayerPatterns]:
    """What the three flags say, by flag."""
    return {flag: LayerPatterns(flag, vars(args)[flag]) for flag in PATTERN_FLAGS}
