"""A training of SD 1.5 in which some functions wait for half a second at their first call.

Run by ready_process.py for test_progress.py. The environment says SLOWED, a JSON list of functions (as in
SLOW there), and SLOWED_LOG, a file that gets a line [function, begin, end] for each.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import accelerate
import diffusers
import huggingface_hub

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_lora_sd15 as recipe  # noqa: E402
from lora_training.console import progress  # noqa: E402

WAIT = 0.5  # seconds
LIBRARIES = {
    "DiffusionPipeline.download": diffusers.DiffusionPipeline,
    "Accelerator.init_trackers": accelerate.Accelerator,
    "AutoencoderKL.from_pretrained": diffusers.AutoencoderKL,
}


def owner_of(function: str):
    """The module or class that a function's path begins with."""
    if function in LIBRARIES:
        return LIBRARIES[function]
    if function.startswith("recipe."):
        return recipe
    module, _, class_name = function.rpartition(".")[0].partition(":")
    owner = importlib.import_module(f"lora_training.{module}")
    return getattr(owner, class_name) if class_name else owner


def slow_down(function: str) -> None:
    """Makes the first call of a function wait, and logs when it has waited."""
    owner, name = owner_of(function), function.rpartition(".")[2]
    original, begins = getattr(owner, name), []

    def slow(*arguments, **options):
        if not begins:
            begins.append(time.time())
            time.sleep(WAIT)
            with open(os.environ["SLOWED_LOG"], "a") as log:
                log.write(json.dumps([function, begins[0], time.time()]) + "\n")
        return original(*arguments, **options)

    setattr(owner, name, slow)


def main(argv: list[str]) -> int:
    """Trains with the base of argv[0], as if it were downloaded, and the flags after it."""
    base, *flags = argv
    progress.appears_after = 0.2
    huggingface_hub.hf_hub_download = lambda name, file, **_: f"{base}/{file}"
    diffusers.DiffusionPipeline.download = lambda *_, **__: base
    for function in json.loads(os.environ["SLOWED"]):
        slow_down(function)
    return recipe.main(flags)
