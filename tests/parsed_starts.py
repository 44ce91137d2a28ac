"""What the tests of lora_training/launch share: starts as their training script reads them."""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path
from unittest import mock

from lora_training.families import FAMILIES
from lora_training.launch.decision import Start


def parse_start(start: Start) -> argparse.Namespace:
    """The settings that the family's training script reads from what is started, in its environment."""
    recipe = importlib.import_module(Path(FAMILIES[start.family].training_script).stem)
    with mock.patch.dict(os.environ, start.environment):
        return recipe.parse_args(start.argv)
