"""The help of run_lora_train: families, settings, and the flags that matter most."""

from __future__ import annotations

import argparse

from lora_training import flag_help
from lora_training.cli.flags import add_shared_args
from lora_training.families import FAMILIES

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
    --queue FILE ...      several trainings, one after another: docs/while-it-runs.md
    --config_file FILE    a configuration of accelerate, for several GPUs (or ACCELERATE_CONFIG=FILE); with
                          it, the launcher's --num_processes, --num_machines, --machine_rank,
                          --main_process_ip, --main_process_port

What is missing comes from .env (see .env.example); flags on the command line win over everything.
"""
FLAGS_TITLE = "flags that matter most (--help_all shows the others; all of them go to the training script)"


def format_help(family: str | None, program: str) -> str:
    """Families, settings and the usual flags, as the family's training script explains them."""
    about = (
        "Trains a LoRA; without arguments on the embedded toy base and sample pictures, in about a minute."
    )
    families = "\n".join(f"  {name:<6}{what}" for name, what in FAMILY_HELP.items())
    head = f"usage: {program} [family] [flags]\n\n{about}\n\n"
    head += f"families:\n{families}\n\nsettings:\n{SETTINGS_HELP}\n"
    if family:
        return head + format_usual_flags(family, program)
    sides = f"({FAMILIES['sd15'].resolution})", "(sd15: 512, the others: 1024)"
    return head + format_usual_flags("sd15", program).replace(*sides)


def format_usual_flags(family: str, program: str) -> str:
    """The section of the flags that matter most."""
    parser = argparse.ArgumentParser(program, add_help=False)
    add_shared_args(parser, FAMILIES[family], lora_targets=(), inference_steps=0, guidance=0.0)
    return flag_help.format_usual_flags(parser, FLAGS_TITLE)
