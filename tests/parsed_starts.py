"""What the tests of lora_training/launch share: starts as their training script reads them."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from lora_training.families import FAMILIES
from lora_training.launch.decision import Start


def parse_start(start: Start) -> argparse.Namespace:
    """The settings that the family's training script reads from what is started."""
    recipe = importlib.import_module(Path(FAMILIES[start.family].training_script).stem)
    return recipe.parse_args(start.argv)
