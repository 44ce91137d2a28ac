#!/usr/bin/env python
"""Writes docs/flags.md, the page of all flags, from the parsers of the training scripts.

    python scripts/dev/write_flags_page.py

A test compares the page with what this command would write.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lora_training.cli.flags import add_shared_args  # noqa: E402
from lora_training.cli.types import optimizer_name, path, yes_or_no  # noqa: E402
from lora_training.families import FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
TYPE_NAMES = {None: "TEXT", path: "PATH", yes_or_no: "`true`, `false`", optimizer_name: "NAME"}
TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD3", "flux": "FLUX.1"}
HEAD = """\
# Flags of the training scripts

**In short:** `--help` shows the twenty that matter; this page has all of them. Names are those of the
diffusers examples. A name without its dashes is a key of a `--config` file (YAML or JSON); flags on the
command line win over it. A key that has no effect is off, with a note; a flag that has none is an error that
says why. In brackets: the default.

This page is written by `python scripts/dev/write_flags_page.py`.
"""


def main(argv: list[str] | None = None) -> int:
    """Writes the page."""
    argparse.ArgumentParser(description="Writes docs/flags.md, the page of all flags.").parse_args(argv)
    PAGE.write_text(flags_page(), encoding="utf-8")
    print(PAGE)
    return 0


def flags_page() -> str:
    """The page: a table for each group of flags, then for the flags of some families alone."""
    parsers = {name: family_parser(name) for name in FAMILIES}
    groups = zip(*(parser._action_groups[:-1] for parser in parsers.values()), strict=True)
    tables = {same[0].title: [merged(a) for a in zip(*map(shown, same), strict=True)] for same in groups}
    own: dict[str, dict[str, argparse.Action]] = {}
    for name, parser in parsers.items():
        for action in shown(parser._action_groups[-1]):
            own.setdefault(long_name(action), {})[name] = action
    for actions in own.values():
        title = " and ".join(TITLES[name] for name in actions) + " only"
        tables.setdefault(title, []).append(merged(actions.values(), tuple(actions)))
    return HEAD + "".join(table(title, actions) for title, actions in tables.items() if actions)


def family_parser(name: str) -> argparse.ArgumentParser:
    """The shared flags by group, then a group of the family's own."""
    family = FAMILIES[name]
    recipe = importlib.import_module(Path(family.training_script).stem)
    parser = argparse.ArgumentParser(add_help=False)
    usual = recipe.LORA_TARGETS, recipe.USUAL_INFERENCE_STEPS, recipe.USUAL_GUIDANCE
    add_shared_args(parser, family, *usual)
    recipe.add_family_args(parser.add_argument_group("own").add_argument)
    return parser


def shown(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """The flags of a group but for the hidden ones."""
    return [a for a in group._group_actions if a.option_strings and a.help != argparse.SUPPRESS]


def merged(actions: Iterable[argparse.Action], names: Sequence[str] = tuple(FAMILIES)) -> argparse.Action:
    """One flag of several families, whose help says what differs."""
    texts: dict[str, list[str]] = {}
    first, *_ = actions
    for name, action in zip(names, actions, strict=True):
        texts.setdefault(action.help, []).append(TITLES[name])
    if len(texts) > 1:
        first.help = "; ".join(f"{', '.join(titles)}: {text}" for text, titles in texts.items())
    return first


def long_name(action: argparse.Action) -> str:
    """The main spelling of a flag."""
    return next(name for name in action.option_strings if name.startswith("--"))


def table(title: str, actions: list[argparse.Action]) -> str:
    """A heading and a row for each flag: spellings, value, help."""
    rows = [f"\n## {title[:1].upper()}{title[1:]}\n", "| flag | value | effect |", "| --- | --- | --- |"]
    for action in actions:
        rows.append(f"| {names_cell(action)} | {value_cell(action)} | {text_cell(action.help)} |")
    return "\n".join(rows) + "\n"


def names_cell(action: argparse.Action) -> str:
    """The main spelling first, then the others."""
    main = long_name(action)
    return ", ".join(f"`{name}`" for name in [main, *(n for n in action.option_strings if n != main)])


def value_cell(action: argparse.Action) -> str:
    """What follows the flag: choices, a placeholder, or nothing for a switch."""
    if action.nargs == 0:
        return ""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    name = action.metavar or TYPE_NAMES.get(action.type, "NUMBER")
    several = " …" if action.nargs in ("+", "*") or isinstance(action.nargs, int) else ""
    return f"{name if isinstance(name, str) else ' '.join(name)}{several}"


def text_cell(text: str | None) -> str:
    """Help as a cell of a table: without argparse's escapes, and with its bars kept."""
    return (text or "").replace("%%", "%").replace("|", r"\|")


if __name__ == "__main__":
    sys.exit(main())
