"""Values of the settings from a command line and from a YAML file, before their types are checked."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path

from lora_training.errors import UserError, one_line
from lora_training.inference.settings import FIELDS, KEYS

LISTS = ("texts", "numbers", "checkpoints")  # kinds of keys that take several values


class SettingsParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors that name the flag and the nearest known one."""

    def error(self, message: str) -> None:
        if "expected" in message:
            raise UserError(f"{message.split()[1].rstrip(':').split('/')[0]} needs a value")
        unknown = message.split(":", 1)[1].split()[0].split("=")[0]
        nearest = difflib.get_close_matches(unknown.lstrip("-"), FIELDS, n=1, cutoff=0.0)[0]
        raise UserError(f"unknown flag {unknown}; the nearest is --{nearest}")


def parse_arguments(argv: list[str] | None, program: str) -> argparse.Namespace:
    """The command line: `lora`, `config`, and every key under its dotted name, as text or None."""
    parser = SettingsParser(
        prog=program,
        usage="%(prog)s [LORA ...] [--config FILE] [--KEY VALUE ...]",
        description="Draws images with a trained LoRA. LORA, a training's folder or a LoRA file, says by"
        " itself which base, size, steps and prompts it needs; without it, config/lora_infer.yaml says what"
        " is drawn. Every key of the YAML is a flag.",
        allow_abbrev=False,
    )
    parser.add_argument("lora", nargs="*", metavar="LORA", help="a training's folder or a LoRA file")
    parser.add_argument(
        "--config",
        "--infer_config",
        metavar="FILE",
        help="YAML file of the keys below (config/lora_infer.yaml)",
    )
    for title, keys in KEYS.items():
        group = parser.add_argument_group(title)
        for key, spec in keys.items():
            add_key(group, key, *spec)
    return parser.parse_intermixed_args(argv)


def add_key(group, key: str, kind: str | tuple[str, ...], default: object, text: str) -> None:
    """Adds a key as a flag; a switch without a value is true."""
    options = {"nargs": "+"} if kind in LISTS else {}
    if kind == "switch":
        options = {"nargs": "?", "const": "true"}
    choices = "{" + ",".join(kind) + "}" if isinstance(kind, tuple) else "VALUE"
    if default is not None and "null" not in text:
        text = f"{text} ({str(default).lower()})"
    group.add_argument(f"--{key}", metavar=choices, help=text, **options)


def flag_values(args: argparse.Namespace) -> dict[str, object]:
    """{key: value} of the flags that stand on the command line. Errors: UserError that names the flag."""
    for prompt in args.prompt or []:
        if prompt.endswith(".safetensors") or path_exists(f"{prompt}/pytorch_lora_weights.safetensors"):
            advice = f"it comes first: infer_lora.py {prompt} --prompt …"
            raise UserError(f"--prompt: {prompt} is a LoRA; {advice}")
    values = {key: vars(args)[key] for key in FIELDS}
    return {key: parse_value(key, value) for key, value in values.items() if value is not None}


def parse_value(key: str, value: str | list[str]):
    """What a flag's text means: prompts and paths as they stand, all else as YAML. Errors: UserError."""
    import yaml

    kind = FIELDS[key][0]
    if isinstance(value, list):
        if len(value) > 1 and kind == "texts":
            return value
        values = [parse_value(key, each) for each in value]
        return values if len(values) > 1 else values[0]
    if kind == "texts" and not value.startswith("["):
        return value
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if kind == "texts":
            return value  # such as "[a] cat"
        raise UserError(f"--{key}: {one_line(error, 150)}") from None
    is_text = kind in ("text", "texts", "loras") and not isinstance(parsed, list | dict)
    return value if is_text and parsed is not None else parsed


def read_yaml(file: str) -> dict[str, object]:
    """A YAML file's values by their dotted keys. Errors: UserError for anything but known keys and values."""
    import yaml

    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {file}: not UTF-8 text") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {file}: not YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {file}: expected keys and values")
    flat = flatten(values, file)
    for key in flat:
        if key not in FIELDS:
            nearest = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.0)[0]
            raise UserError(f"{file}: unknown key {key}; the nearest is {nearest}")
    return flat


def flatten(values: dict, file: str) -> dict[str, object]:
    """{"paths": {"infer_path": x}} -> {"paths.infer_path": x}. Errors: UserError for a group that is none."""
    flat = {}
    for key, value in values.items():
        if any(known.startswith(f"{key}.") for known in FIELDS):
            if not isinstance(value, dict | None):
                raise UserError(f"{file}: {key}: expected keys and values, found {one_line(repr(value), 80)}")
            flat |= {f"{key}.{inner}": v for inner, v in (value or {}).items()}
        else:
            flat[str(key)] = value
    return flat


def path_exists(path: str) -> bool:
    """Whether there is such a file or folder; a name that no file can have has none."""
    try:
        return Path(path).exists()
    except OSError:  # a name that is too long
        return False
