"""The training scripts as modules, for commands that measure or attack a script itself. Not a command."""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from lora_training.cli.parsing import make_parser
from lora_training.families import FAMILIES
from scripts.dev import ROOT

if TYPE_CHECKING:
    from lora_training.cli.parser import OneLineParser


@functools.cache
def load_recipe(family: str) -> ModuleType:
    """The family's training script as a module, loaded by its path; nothing heavy is imported."""
    file = ROOT / FAMILIES[family].training_script
    spec = importlib.util.spec_from_file_location(file.stem, file)
    recipe = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def recipe_parser(family: str) -> OneLineParser:
    """The parser of the family's command line, with all its flags."""
    recipe = load_recipe(family)
    usual_values = (recipe.LORA_TARGETS, recipe.USUAL_INFERENCE_STEPS, recipe.USUAL_GUIDANCE)
    return make_parser(recipe.FAMILY, recipe.add_family_args, recipe.FOREIGN_FLAGS, *usual_values)
