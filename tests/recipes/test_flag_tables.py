"""The tables of flags name every flag of every training script."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest
from conftest import ROOT

from lora_training.cli.flags import add_shared_args
from lora_training.families import FAMILIES

pytestmark = pytest.mark.unit
TITLES = {"sd15": "SD 1.5", "sdxl": "SDXL", "sd3": "SD3", "flux": "FLUX.1"}


def test_the_readmes_table_has_every_flag():
    """By group of --help_all; what is not in all four scripts stands in a row of its families."""
    shared, own = {}, {}
    for name, family in FAMILIES.items():
        recipe = importlib.import_module(Path(family.training_script).stem)
        parser = argparse.ArgumentParser(add_help=False)
        add_shared_args(parser, family, recipe.LORA_TARGETS, 25, 5.0)
        recipe.add_family_args(parser.add_argument_group("own").add_argument)
        for group in parser._action_groups:
            flags = [a for a in group._group_actions if a.option_strings and a.help != "==SUPPRESS=="]
            names = [next(n for n in a.option_strings if n.startswith("--")) for a in flags]
            if group.title == "own":
                for flag in names:
                    own.setdefault(flag, []).append(name)
            elif names:
                shared[group.title] = set(names) - {"--help_all"}
    for flag, names in own.items():
        shared.setdefault(", ".join(TITLES[n] for n in TITLES if n in names), set()).add(flag)
    rows = (
        (ROOT / "README.md")
        .read_text()
        .split("| | all flags |\n| --- | --- |\n")[1]
        .split("\n\n")[0]
        .splitlines()
    )
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {title: set(flags.replace("`", "").split(", ")) for title, flags in cells} == shared
