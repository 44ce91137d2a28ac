"""Imports what is slow to import (5 to 10 s), quietly, once the arguments are known to be right."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
import warnings

import lazy_loader

from lora_training.console import print_status, progress


def load_lazily(name: str) -> types.ModuleType:
    """A module that is imported when something of it is first used.

    In a worker process, which multiprocessing.spawn starts, it is imported now: what the process is sent
    begins with modules of torch, and a package that isn't loaded yet would load its own ones twice.
    """
    if "multiprocessing.spawn" in sys.modules:
        return importlib.import_module(name)
    return lazy_loader.load(name)


def import_libraries(title: str) -> None:
    """Imports what training a family (`title`) needs, now, where the wait is shown."""
    print_status(f"{title}: importing torch and diffusers")
    with progress("importing"):
        import_training_libraries()


def import_training_libraries() -> None:
    """Imports torch, diffusers, transformers, accelerate and peft."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import_model_libraries()
    import accelerate  # noqa: F401
    import peft  # noqa: F401


def silence_image_libraries() -> None:
    """No warnings of large pictures, odd metadata, and what a damaged base draws."""
    warnings.filterwarnings("ignore", module=r"PIL\.|diffusers\.image_processor")


def import_model_libraries() -> None:
    """Imports diffusers and transformers with progress bars and advice below the level of a warning turned
    off.
    """
    for name in ("accelerate", "bitsandbytes", "diffusers.quantizers.bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # downloads are long, and transformers has just switched theirs off
    huggingface_hub.utils.enable_progress_bars()
