"""What a command line of run_lora_train starts: family, recipe of settings, launcher, preparation."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_training.base_model.family_detection import require_family
from lora_training.errors import UserError
from lora_training.families import FAMILIES
from lora_training.files import read_config_file
from lora_training.launch import olive
from lora_training.launch.arguments import (
    DATA_FLAGS,
    MODEL_FLAGS,
    has_flag,
    split_family,
    take_flags,
    to_argv,
)
from lora_training.launch.environment import training_environment

if TYPE_CHECKING:
    from pathlib import Path

ENV_FLAGS = (  # a name in .env, its flag, and the flags beside which it has no effect
    ("MODEL_NAME", "-m", MODEL_FLAGS),
    ("OUTPUT_DIR", "-o", "-o --output_dir --output_path"),
    ("VAE_NAME", "--pretrained_vae_model_name_or_path", "--pretrained_vae_model_name_or_path"),
    ("DATASET_NAME", "--dataset_name", DATA_FLAGS),
    ("TRAIN_DATA_DIR", "-d", DATA_FLAGS),
    ("VALIDATION_PROMPTS", "--validation_prompt", "--validation_prompt --eval_prompt"),
)
LAUNCH_FLAGS = (  # of accelerate's launcher, on top of its configuration
    "--num_processes",
    "--num_machines",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
)
USUAL_FAMILY = "sd15"  # whose toy is trained where neither family nor base is named


@dataclass
class Start:
    """What is started: the family's training script with `argv`, what runs before it, and notes to print.

    launch_config: a configuration of accelerate, with launch_argv on top; None for a single process.
    preparation_argv: arguments of prepare_dataset.py, which runs first if there are any.
    """

    family: str
    argv: list[str]
    launch_config: str | None = None
    launch_argv: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    preparation_argv: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def command(self, root: Path) -> list[str]:
        """The command, for the project in the folder `root`.

        One process needs no launcher; a configuration of accelerate goes to scripts/start/launch.py.
        """
        launcher = []
        if self.launch_config:
            launcher = [str(root / "scripts/start/launch.py"), "--config_file", self.launch_config]
            launcher += self.launch_argv
        return [sys.executable, *launcher, str(root / FAMILIES[self.family].training_script), *self.argv]


def decide(argv: list[str], settings: dict) -> Start:
    """What a command line and the settings (.env, environment) start.

    The command line wins over .env, and that over a recipe or Olive's defaults. Errors: UserError.
    """
    named_family, argv = split_family(argv)
    (variant,), argv = take_flags(argv, "--model_variant")
    family = agreed_family(named_family, variant)
    launch_config, launch_argv, argv = take_launch_flags(argv, settings)
    (config,), argv_without_config = take_flags(argv, "--config")
    if not config:
        argv = [*env_arguments(argv, settings), *argv]
    (model,), _ = take_flags(argv, MODEL_FLAGS)
    start = Start("", [], launch_config, launch_argv)
    values, olive_flags = read_config_file(config) if config else {}, {}
    if olive.is_workflow(values):
        workflow = olive.translate_workflow(values, config)
        model, family, argv = model or workflow.model, family or workflow.family, argv_without_config
        olive_flags = {"pretrained_model_name_or_path": model} | workflow.training_flags
        start.preparation_argv, start.notes = workflow.preparation_argv, workflow.notes
    elif config:
        model = model or values.get("pretrained_model_name_or_path") or values.get("model_name_or_path")
    elif variant and model:
        olive_flags = olive.one_line_defaults(argv)
    start.family = family or detect_family(model, config)
    if model:
        start.environment = training_environment(settings, launch_config)
    start.argv = ["--report", *add_settings(start, argv, config, model, olive_flags)]
    return start


def add_settings(
    start: Start, argv: list[str], config: str | None, model: str | None, olive_flags: dict
) -> list[str]:
    """The arguments, and before them the settings over which they win; a note says whose these are."""
    recipe = f"config/{'recipe' if model else 'toy'}_{start.family}.yaml"
    if olive_flags:
        settings = add_olive_flags(start, olive_flags)
        if not config:
            start.notes.append(f"without --model_variant, the settings would be those of {recipe}")
        return [*settings, *argv]
    if config:
        return argv
    if model:
        olive_way = "--model_variant auto takes the defaults of Olive's diffusion-lora"
        start.notes.append(f"settings: {recipe}, under your flags ({olive_way})")
    return ["--config", recipe, *argv]


def agreed_family(named_family: str | None, variant: str | None) -> str | None:
    """The family that the first argument or --model_variant names. Errors: UserError if they differ."""
    variant_family = olive.family_of_variant(variant, "--model_variant") if variant else None
    if named_family and variant_family and named_family != variant_family:
        raise UserError(f"the family is given as {named_family} and with --model_variant {variant}: give one")
    return named_family or variant_family


def take_launch_flags(argv: list[str], settings: dict) -> tuple[str | None, list[str], list[str]]:
    """(the configuration of accelerate, its launcher's flags on top of it, the other arguments)."""
    (config, *values), argv = take_flags(argv, "--config_file", *LAUNCH_FLAGS)
    config = config or settings.get("ACCELERATE_CONFIG") or None
    flags = {flag: value for flag, value in zip(LAUNCH_FLAGS, values, strict=True) if value is not None}
    if flags and not config:
        way_out = (
            "--config_file config/accelerate_config_multi_gpu.yaml, or another configuration of accelerate"
        )
        raise UserError(f"{next(iter(flags))} needs {way_out}")
    return config, [argument for flag in flags.items() for argument in flag], argv


def env_arguments(argv: list[str], settings: dict) -> list[str]:
    """The flags that .env stands for. None of them counts where the command line names a model."""
    if not settings.get("MODEL_NAME") or has_flag(argv, MODEL_FLAGS):
        return []
    # a data set's Python file gets the folder; any other data set stands alone
    takes_folder = (settings.get("DATASET_NAME") or ".py").endswith(".py")
    arguments: list[str] = []
    for name, flag, overriding_flags in ENV_FLAGS:
        value = settings.get(name)
        is_used = takes_folder or name != "TRAIN_DATA_DIR"
        if value and is_used and not has_flag(argv, overriding_flags):
            arguments += [flag, *(value if isinstance(value, list) else [value])]
    return arguments


def detect_family(model: str | None, config: str | None) -> str:
    """The family of a base; that of the default toy where neither base nor --config file is named."""
    if model:
        return require_family(model)
    if config:
        raise UserError(
            f"{config} names no base: name the family first (sd15, sdxl, sd3 or flux), or the base with -m"
        )
    return USUAL_FAMILY


def add_olive_flags(start: Start, flags: dict[str, object]) -> list[str]:
    """Olive's settings as arguments of the family's training script, with notes on what they are."""
    flags, notes = olive.flags_for_family(flags, start.family)
    start.notes = [*start.notes, *notes, f"Olive's settings, as flags: {shlex.join(to_argv(flags))}"]
    if not start.launch_config and "mixed_precision" in flags:
        # as a default, so that a machine that lacks this precision takes another
        start.environment["ACCELERATE_MIXED_PRECISION"] = flags.pop("mixed_precision")
    return to_argv(flags)
