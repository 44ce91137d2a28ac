"""Decides how a training is started, and starts it: what run_lora_train.sh and run_lora_train.bat do.

    python scripts/start/train.py [sd15|sdxl|sd3|flux|auto] [flags…]

    without a model       the family's toy base and sample data, with config/toy_FAMILY.yaml
    -m BASE               your own base; the family is found out, settings come from config/recipe_FAMILY.yaml
    --config FILE         your own settings, or a workflow of Olive; the recipe is left out
    --config_file FILE    a configuration of accelerate, for several GPUs (or ACCELERATE_CONFIG=FILE); with it, the
                          launcher's --num_processes, --num_machines, --machine_rank, --main_process_ip, --main_process_port

What is missing comes from .env (see .env.example); flags on the command line win over everything.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.base_family import BaseError, family_of
from scripts.parts.training_scripts import SCRIPTS, bare_script, load_script
from scripts.start.parts import olive
from scripts.start.parts.dreambooth import class_prompt
from scripts.start.parts.env_file import export, settings_of
from scripts.start.parts.process import ROOT, become, complain, program
from scripts.start.parts.words import StartError, as_words, is_given, read_values, shown, taken

FAMILY_HELP = {
    "sd15": "Stable Diffusion 1.x and 2.x, 512 or 768 pixels",
    "sdxl": "Stable Diffusion XL, 1024 pixels",
    "sd3": "Stable Diffusion 3 and 3.5, 1024 pixels",
    "flux": "FLUX.1 dev and schnell, 1024 pixels",
    "auto": "found out from the base (default)",
}
USUAL_FLAGS = (  # those that --help explains
    *("pretrained_model_name_or_path", "train_data_dir", "dataset_name", "instance_data_dir", "instance_prompt"),
    *("trigger_word", "output_dir", "config", "dry_run", "resolution", "aspect_ratio_buckets", "rank", "learning_rate"),
    *("max_train_steps", "train_batch_size", "mixed_precision", "quantize_base", "validation_prompt"),
    *("resume_from_checkpoint", "report_to"),
)
MODEL = "-m --pretrained_model_name_or_path --model_name_or_path"
FOLDERS = "-d --train_data_dir --data_dir --instance_data_dir"
DATA = f"{FOLDERS} --dataset_name --data_name"
ENV_FLAGS = (  # a name in .env, its flag, and the flags beside which it isn't wanted
    ("MODEL_NAME", "-m", MODEL),
    ("OUTPUT_DIR", "-o", "-o --output_dir --output_path"),
    ("VAE_NAME", "--pretrained_vae_model_name_or_path", "--pretrained_vae_model_name_or_path"),
    ("DATASET_NAME", "--dataset_name", DATA),
    ("TRAIN_DATA_DIR", "-d", DATA),
    ("VALIDATION_PROMPTS", "--validation_prompt", "--validation_prompt --eval_prompt"),
)


# of accelerate's launcher, on top of its configuration
LAUNCH_FLAGS = ("--num_processes", "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port")


@dataclass
class Start:
    """What is started: words for the training script, what runs before it, and what has to be said."""

    family: str
    words: list[str]
    launch_config: str | None = None
    launch_flags: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    prepare: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def command(self) -> list[str]:
        """One process needs no launcher; a configuration of accelerate goes to launch.py, which starts what it asks for."""
        launcher = [str(ROOT / "scripts/start/launch.py"), "--config_file", self.launch_config, *self.launch_flags]
        return [
            sys.executable,
            *(launcher if self.launch_config else []),
            str(ROOT / SCRIPTS[self.family]),
            *self.words,
        ]


def decide(words: list[str], settings: dict) -> Start:
    """What a command line and the settings (.env, environment) start. Errors: StartError."""
    named, words = leading_family(words)
    (variant, launch_config, *launch_values), words = taken(words, "--model_variant", "--config_file", *LAUNCH_FLAGS)
    launch_config = launch_config or settings.get("ACCELERATE_CONFIG") or None
    launch_flags = {flag: value for flag, value in zip(LAUNCH_FLAGS, launch_values, strict=True) if value is not None}
    if launch_flags and not launch_config:
        way_out = "--config_file config/accelerate_config_multi_gpu.yaml, or another configuration of accelerate"
        raise StartError(f"{next(iter(launch_flags))} needs {way_out}")
    variant_family = olive.family_named(variant, "--model_variant") if variant else None
    if named and variant_family and named != variant_family:
        raise StartError(f"the family is given as {named} and with --model_variant {variant}: give one")
    start = Start(
        named or variant_family or "auto", [], launch_config, [w for pair in launch_flags.items() for w in pair]
    )
    (config,), others = taken(words, "--config")
    values, defaults = read_values(config) if config else {}, {}
    if not config:
        words = [*env_words(words, settings), *words]
    (model,), _ = taken(words, MODEL)
    if olive.is_workflow(values):
        workflow, words = olive.translate(values, config), others
        model = model or workflow.model
        start.family = workflow.family or "auto" if start.family == "auto" else start.family
        start.notes, start.prepare = workflow.notes, workflow.prepare
        defaults = {"pretrained_model_name_or_path": model} | workflow.train
    elif config:
        model = model or values.get("pretrained_model_name_or_path") or values.get("model_name_or_path")
    elif variant and model:
        defaults = olive.one_liner(words)
    if start.family == "auto":
        start.family = detected(model, config)
    if model:
        start.environment = environment_of(settings, start.launch_config)
    if defaults:
        defaults, notes = olive.for_family(defaults, start.family)
        start.notes = [*start.notes, *notes, f"Olive's settings, as flags: {shown(as_words(defaults))}"]
        if (
            not start.launch_config and "mixed_precision" in defaults
        ):  # a wish: what a machine can't do, it does without
            start.environment["ACCELERATE_MIXED_PRECISION"] = defaults.pop("mixed_precision")
    recipe = [] if config or defaults else ["--config", f"config/{'recipe' if model else 'toy'}_{start.family}.yaml"]
    start.words = ["--report", *recipe, *as_words(defaults), *words]
    return start


def leading_family(words: list[str]) -> tuple[str | None, list[str]]:
    """The family that stands first on the command line (None: auto, or none), and the other words."""
    if not words or words[0].startswith("-"):
        return None, words
    first, *others = words
    if first not in FAMILY_HELP:
        near = difflib.get_close_matches(first, FAMILY_HELP, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise StartError(f"{first!r} is no family: {', '.join(FAMILY_HELP)}{hint} (flags begin with --)")
    return None if first == "auto" else first, others


def env_words(words: list[str], settings: dict) -> list[str]:
    """The flags that .env stands for. Nothing of it counts where the command line names a model."""
    if not settings.get("MODEL_NAME") or is_given(words, MODEL):
        return []
    found: list[str] = []
    for name, flag, others in ENV_FLAGS:
        # a data set's Python file is given the folder; any other data set stands alone
        beside_script = name == "TRAIN_DATA_DIR" and (settings.get("DATASET_NAME") or ".py").endswith(".py")
        wanted = name != "TRAIN_DATA_DIR" or beside_script
        value = settings.get(name)
        if value and wanted and not is_given(words, others):
            found += [flag, *(value if isinstance(value, list) else [value])]
    return found


def detected(model: str | None, config: str | None) -> str:
    """The family of a base; that of the default toy where none is named."""
    if model:
        try:
            return family_of(model)
        except BaseError as error:
            raise StartError(str(error)) from None
    if config:
        raise StartError(
            f"{config} names no base: name the family first (sd15, sdxl, sd3 or flux), or the base with -m"
        )
    return "sd15"


def add_class_prompt(start: Start) -> None:
    """--dreambooth alone, as Olive documents it: the class prompt is an instance's without the trigger word."""
    if not is_given(start.words, "--dreambooth"):
        return
    wanted = ("--class_prompt", "--instance_prompt", FOLDERS, "--trigger_word", "--config")
    (given, instance, folder, trigger, config), _ = taken(start.words, *wanted)
    values = read_values(config) if config else {}
    if given or values.get("class_prompt"):
        return
    captions: list[str] = []
    folder = folder or values.get("train_data_dir")
    if folder and Path(folder).is_dir():
        script = load_script(start.family, libraries=False)
        captions = [c for example in script.folder_examples(Path(folder), None) for c in example.captions[:1]]
    prompt = class_prompt(instance or values.get("instance_prompt"), captions, trigger or values.get("trigger_word"))
    if prompt is None:
        raise StartError(
            '--dreambooth: what are they pictures of? Give --class_prompt "a photo of a dog", or a word to leave out of the'
            ' captions: --trigger_word, or --instance_prompt "a photo of sks dog"'
        )
    print(f"--dreambooth: the class prompt is {prompt!r}; --class_prompt names another", flush=True)
    start.words += ["--class_prompt", prompt]


def environment_of(settings: dict, launch_config: str | None) -> dict[str, str]:
    """What a real training finds in its environment: no waiting for a login, and this GPU's precision by default."""
    found = {}
    homes = [Path.home() / name for name in (".netrc", "_netrc")]
    logged_in = any(file.is_file() and "api.wandb.ai" in file.read_text(errors="replace") for file in homes)
    if not logged_in and not settings.get("WANDB_API_KEY") and not settings.get("WANDB_MODE"):
        found["WANDB_MODE"] = "offline"  # its files stay here, for `wandb sync`
    precision = None if launch_config or "ACCELERATE_MIXED_PRECISION" in settings else gpu_precision()
    return found | ({"ACCELERATE_MIXED_PRECISION": precision} if precision else {})


def gpu_precision() -> str | None:
    """The half precision of NVIDIA's first GPU; None without one. What --mixed_precision or a recipe says counts more."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    first = answer.stdout.split()[:1]
    return ("bf16" if float(first[0]) >= 8 else "fp16") if answer.returncode == 0 and first else None


def print_help(family: str | None) -> None:
    """Families and the usual flags, as the training script explains them."""
    script = bare_script(family or "sd15")
    parser = script.OneLineParser(add_help=False)
    script.add_shared_args(parser)
    actions = {action.dest: action for action in parser._actions}
    for action in actions.values():  # its own name and the short one
        action.option_strings = [n for n in action.option_strings if len(n) == 2] + action.option_strings[:1]
    flags = argparse.HelpFormatter(program(), max_help_position=32, width=min(shutil.get_terminal_size().columns, 120))
    flags.start_section("flags that matter most (--help_all shows the others; all of them go to the training script)")
    flags.add_arguments([actions[name] for name in USUAL_FLAGS])
    flags.end_section()
    families = "\n".join(f"  {name:<6}{what}" for name, what in FAMILY_HELP.items())
    settings = __doc__.split("flags…]\n\n")[1]
    about = "Trains a LoRA; without arguments on the embedded toy base and sample pictures, in about a minute."
    print(f"usage: {program()} [family] [flags]\n\n{about}\n\nfamilies:\n{families}\n\nsettings:\n{settings}")
    print(flags.format_help(), end="")


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if is_given(words, "--help -h --help_all"):
            family, everything = leading_family(words)[0], is_given(words, "--help_all")
            if everything:
                return become([sys.executable, str(ROOT / SCRIPTS[family or "sd15"]), "--help"])
            return print_help(family) or 0
        settings = settings_of(ROOT / ".env", os.environ)
        export(settings)
        start = decide(words, settings)
        print("".join(f"{note}\n" for note in start.notes), end="", flush=True)
        if start.prepare:
            code = subprocess.call([sys.executable, str(ROOT / "scripts/dataset/prepare_dataset.py"), *start.prepare])
            if code:
                return code
        add_class_prompt(start)
    except StartError as error:
        return complain(str(error))
    if start.launch_config:  # whose errors are the wrapper's too
        start.environment["STARTED_AS"] = program()
    return become(start.command(), start.environment)


if __name__ == "__main__":
    sys.exit(main())
