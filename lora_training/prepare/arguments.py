"""The settings of a preparation from the command line, on top of a YAML or JSON file."""

from __future__ import annotations

import argparse
import difflib

from pydantic import ValidationError

from lora_training.cli.parser import OneLineParser
from lora_training.cli.types import count, share
from lora_training.errors import UserError
from lora_training.families import FAMILIES
from lora_training.files import read_config_file
from lora_training.prepare.checks import check_settings
from lora_training.prepare.settings import STEP_MODELS, Settings


def read_settings(argv: list[str] | None) -> tuple[Settings, argparse.Namespace]:
    """(checked settings, the command line), which has the flags of the doctor. Errors: UserError."""
    args = make_parser().parse_args(argv)
    values = read_config_file(args.config) if args.config else {}
    steps = steps_of_config(values.get("steps"), args.config)
    for name in STEP_MODELS:
        parameters = getattr(args, name)
        if parameters is not None:
            steps.setdefault(name, {}).update(parse_parameters(name, parameters))
    values["steps"] = steps
    for key in Settings.model_fields:
        if key != "steps" and getattr(args, key) is not None:
            values[key] = getattr(args, key)
    settings = validate(values, args.config)
    check_settings(settings, args)
    return settings, args


def steps_of_config(value: object, file: str | None) -> dict[str, dict]:
    """{step: parameters} of a configuration: a mapping, or a list of names or of names with parameters.

    A step that is false is off. Errors: UserError for anything else.
    """
    steps = value or {}
    if isinstance(steps, list):
        entries = [entry if isinstance(entry, dict) else {entry: {}} for entry in steps]
        steps = {name: parameters for entry in entries for name, parameters in entry.items()}
    if not isinstance(steps, dict):
        raise UserError(f"--config {file}: steps: expected step names, found {steps!r}")
    return {
        name: {} if parameters in (None, True) else parameters
        for name, parameters in steps.items()
        if parameters is not False
    }


def parse_parameters(step: str, arguments: list[str]) -> dict[str, str]:
    """NAME=VALUE arguments of a step -> {name: value}. Errors: UserError."""
    parameters = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"--{step} {argument}: parameters are given as NAME=VALUE")
        parameters[name] = value
    return parameters


def validate(values: dict, file: str | None) -> Settings:
    """Values by key -> the settings, with their types.

    file: the configuration that they are from, if any. Errors: UserError that names the step, the parameter
    and, for an unknown one, the nearest.
    """
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    where = ".".join(part for part in place if part != "steps" and "[" not in part)
    where = f"{file}: {where}" if file else f"--{where}"
    if problem["type"] == "extra_forbidden":
        raise UserError(f"{where}: {unknown_key(place)}")
    message = problem["msg"].removeprefix("Value error, ").lower()
    raise UserError(f"{where}: {message}, found {problem['input']!r}"[:300])


def unknown_key(place: list[str]) -> str:
    """What is wrong with a key that isn't known, by the keys that lead to it."""
    model = Settings
    for part in place[:-1]:
        annotation = model.model_fields[part].annotation
        model = annotation if hasattr(annotation, "model_fields") else annotation.__args__[0]
    nearest = difflib.get_close_matches(place[-1], model.model_fields, n=1, cutoff=0.0)[0]
    if place[:-1] == ["steps"]:
        kind = "step"
    else:
        kind = "key" if len(place) == 1 else "parameter"
    return f"unknown {kind}; the nearest is {nearest}"


def steps_help() -> str:
    """The steps and their parameters, as --help shows them."""
    lines = ["steps, in their order; parameters are given as NAME=VALUE:"]
    for name, model in STEP_MODELS.items():
        lines.append(f"\n  --{name}: {' '.join(model.__doc__.split())}")
        for key, parameter in model.model_fields.items():
            about = parameter.description or "|".join(getattr(parameter.annotation, "__args__", ()))
            default = parameter.default
            default = str(default).lower() if isinstance(default, bool) else default
            note = f" ({default})" if default not in (None, []) else ""
            lines.append(f"    {key:<20} {about}{note}")
    return "\n".join(lines)


def make_parser() -> OneLineParser:
    """The command line. Flags are those of the training scripts where one exists."""
    parser = OneLineParser(
        description="Turns a folder of pictures into a training set, or says what is wrong with one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=steps_help(),
    )
    add_source_flags(parser.add_argument_group("input and output").add_argument)
    add = parser.add_argument_group("steps").add_argument
    for name in STEP_MODELS:
        about = "switch it on; its parameters are below"
        add(f"--{name}", nargs="*", metavar="NAME=VALUE", help=about)
    add_doctor_flags(parser.add_argument_group("doctor").add_argument)
    return parser


# fmt: off
def add_source_flags(add) -> None:
    """Flags for what is read and written."""
    add("--config", metavar="FILE",
        help="YAML or JSON with these flags and steps as keys; the command line wins")
    add("--data_dir", "--train_data_dir", "-d", metavar="DIR",
        help="folder of pictures; folders inside it are read too")
    add("--dataset_name", "--data_name", metavar="NAME",
        help="or a datasets data set: hub id, local folder, Python file")
    add("--dataset_config_name", help="its configuration")
    add("--dataset_split", "--data_split", help="its split (train)")
    add("--image_column", help="its image column (image)")
    add("--caption_column",
        help="caption column, also of metadata files (the one of text, caption, prompt that exists)")
    add("--cache_dir", help="folder for downloads (the hub's own)")
    add("--output_dir", "--output_path", "-o", metavar="DIR", help="a folder of its own, outside the input")
    add("--family", choices=sorted(FAMILIES),
        help="what will be trained; sets the size: 512 for sd15, else 1024 (sd15)")
    add("--trigger_word", help="put before every caption, once (none)")
    add("--masked_loss", metavar="WHERE",
        help="as in training: masks are kept, each as NAME-mask.png beside its picture (none)")
    add("--num_workers", type=count, help="threads that read and write pictures (the number of cores)")


def add_doctor_flags(add) -> None:
    """Flags that only --doctor reads."""
    add("--doctor", action="store_true",
        help="change nothing, say what is wrong; exit status 1 if something will hurt")
    add("--resolution", type=count, nargs="+",
        help="as in training (buckets.json of the folder, else the family's)")
    add("--aspect_ratio_buckets", help="as in training")
    add("--train_batch_size", type=count, help="as in training (1)")
    add("--validation_split", type=share, help="as in training: do held-out images leak? (0)")
    add("--seed", type=int, help="as in training: which ones are held out")
    add("--instance_prompt", help="as in training: no captions are wanted")
    add("--pretrained_model_name_or_path", "-m", metavar="BASE",
        help="the base whose tokenizers count the captions' tokens")
# fmt: on
