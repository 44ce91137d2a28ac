"""The help of run_lora_train: families, settings, and the flags that matter most.

It is shown by any Python from 3.8 on, before any package is installed, so that it needs the standard library
alone. Without lazy_loader the library's flags are read all the same; where that fails, a line says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import types

from lora_training.families import FAMILIES

OLDEST_PYTHON = (3, 11)  # that the library's flags can be read by
FAMILY_HELP = {
    "sd15": "Stable Diffusion 1.x and 2.x, 512 or 768 pixels",
    "sdxl": "Stable Diffusion XL, 1024 pixels",
    "sd3": "Stable Diffusion 3 and 3.5, 1024 pixels",
    "flux": "FLUX.1 dev and schnell, 1024 pixels",
    "auto": "found out from the base (default)",
}
SETTINGS_HELP = """\
    without a model       the family's toy base and sample data, with config/toy_FAMILY.yaml
    -m BASE               your own base; the family is found out, settings come from config/recipe_FAMILY.yaml
    --config FILE         your own settings, or a workflow of Olive; the recipe is left out
    --config_file FILE    a configuration of accelerate, for several GPUs (or ACCELERATE_CONFIG=FILE); with
                          it, the launcher's --num_processes, --num_machines, --machine_rank,
                          --main_process_ip, --main_process_port

What is missing comes from .env (see .env.example); flags on the command line win over everything.
"""
USUAL_FLAGS = (  # those that --help explains
    "pretrained_model_name_or_path",
    "train_data_dir",
    "dataset_name",
    "instance_data_dir",
    "instance_prompt",
    "trigger_word",
    "output_dir",
    "config",
    "dry_run",
    "resolution",
    "aspect_ratio_buckets",
    "rank",
    "learning_rate",
    "max_train_steps",
    "train_batch_size",
    "mixed_precision",
    "quantize_base",
    "validation_prompt",
    "resume_from_checkpoint",
    "report_to",
)
FLAGS_TITLE = "flags that matter most (--help_all shows the others; all of them go to the training script)"
NO_FLAGS_YET = "flags: shown once a first start has set the packages up; README.md says where they are listed"
NOT_ALL_FLAGS_YET = "--help_all: shows all flags once a first start has set the packages up"


def format_help(family: str | None, program: str) -> str:
    """Families, settings and the usual flags, as the family's training script explains them."""
    about = (
        "Trains a LoRA; without arguments on the embedded toy base and sample pictures, in about a minute."
    )
    families = "\n".join(f"  {name:<6}{what}" for name, what in FAMILY_HELP.items())
    head = f"usage: {program} [family] [flags]\n\n{about}\n\n"
    head += f"families:\n{families}\n\nsettings:\n{SETTINGS_HELP}\n"
    try:
        return head + format_usual_flags(family or "sd15", program)
    except ImportError:
        return f"{head}{NO_FLAGS_YET}\n"


def format_usual_flags(family: str, program: str) -> str:
    """The section of USUAL_FLAGS. Errors: ImportError if the library can't be imported."""
    if sys.version_info < OLDEST_PYTHON:
        raise ImportError("the library needs a newer Python")
    allow_missing_lazy_loader()
    from lora_training.cli.flags import add_shared_args

    parser = argparse.ArgumentParser(add_help=False)
    add_shared_args(parser, FAMILIES[family], lora_targets=(), inference_steps=0, guidance=0.0)
    actions = {action.dest: action for action in parser._actions}
    for action in actions.values():  # shown with its main name and the short one
        short_names = [name for name in action.option_strings if len(name) == 2]
        action.option_strings = short_names + action.option_strings[:1]
    width = min(shutil.get_terminal_size().columns, 120)
    formatter = argparse.HelpFormatter(program, max_help_position=32, width=width)
    formatter.start_section(FLAGS_TITLE)
    formatter.add_arguments([actions[name] for name in USUAL_FLAGS])
    formatter.end_section()
    return formatter.format_help()


def allow_missing_lazy_loader() -> None:
    """Makes the library's folders importable where lazy_loader isn't installed, in this process.

    Their modules can then be imported by their full names only.
    """
    if importlib.util.find_spec("lazy_loader") is None:
        stand_in = types.ModuleType("lazy_loader")
        stand_in.attach = attach_nothing
        sys.modules["lazy_loader"] = stand_in


def attach_nothing(package: str, **options: object) -> tuple:
    """(__getattr__, __dir__, __all__) of a package that has none of its modules' names."""

    def __getattr__(name: str):
        raise AttributeError(f"{package} has no {name} before lazy_loader is installed")

    return __getattr__, list, []


def training_scripts_start() -> bool:
    """Whether a training script can show its own help here: by what it imports before it reads its flags."""
    has_packages = all(importlib.util.find_spec(name) for name in ("lazy_loader", "tqdm"))
    return sys.version_info >= OLDEST_PYTHON and has_packages
