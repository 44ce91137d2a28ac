"""Settings declared once, as a pydantic model: their flags, --help, files of them, and errors of one line.

A field's name is its key in a YAML or JSON file and its flag, its description the help. A field whose type is
a model is a group, whose flags have a dot (--paths.infer_path); one whose type is `Model | None` is a step,
which --STEP NAME=VALUE … switches on. The classes that a model inherits from are the sections of --help,
named by their docstrings. The training scripts have argparse instead: `cli.parsing`.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_training.errors import UserError, one_line
from lora_training.flag_help import FullHelp

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pydantic.fields import FieldInfo


class SettingsModel(BaseModel):
    """A model that forbids keys that it doesn't know. It is built when values are there: --help has none."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), defer_build=True)


@dataclass(frozen=True)
class Flag:
    """Stands in a field's annotation: what --help calls the value, and other names of the flag."""

    metavar: str = "VALUE"
    other_names: tuple[str, ...] = ()


class SettingsParser(argparse.ArgumentParser):
    """The command line of a model's settings. Errors: UserError that names the flag and the nearest one."""

    def __init__(self, model: type[BaseModel], **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.fields, self.shows_all = list_fields(model, with_parameters=False), False
        has_steps = any(map(inner_model, self.fields.values()))
        text = "show the parameters of the steps, too" if has_steps else argparse.SUPPRESS
        self.add_argument("--help_all", action=FullHelp, help=text)
        self.add_argument(
            "--config", metavar="FILE", help="YAML or JSON with the keys below; flags win over it"
        )
        titles = {name: base.__doc__ for base in model.__mro__ for name in inspect.get_annotations(base)}
        section = self.add_argument_group()
        for key, field in self.fields.items():
            title = titles[key.split(".")[0]]
            section = section if section.title == title else self.add_argument_group(title)
            marker = next((each for each in field.metadata if isinstance(each, Flag)), Flag())
            options = flag_options(field, marker.metavar) | {"dest": key, "help": help_text(field)}
            section.add_argument(f"--{key}", *marker.other_names, **options)

    def read(self, argv: list[str] | None) -> tuple[argparse.Namespace, dict[str, object]]:
        """(what is no setting, the settings on the command line by their keys). Errors: UserError."""
        args, values = self.parse_intermixed_args(argv), {}
        for key, field in self.fields.items():
            texts = vars(args).pop(key)
            if texts is not None and inner_model(field):
                values |= {key: {}} | read_parameters(key, inner_model(field), texts)
            elif texts is not None:
                values[key] = texts if len(texts) > 1 else parse_text(texts[0], field)
        return args, values

    def error(self, message: str) -> None:
        if message.startswith("argument "):
            raise UserError(f"{message.split()[1].split('/')[0].rstrip(':')} needs a value")
        unknown = message.split(":", 1)[1].split()[0].split("=")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.5)
        hint = f"the nearest is {near[0]}" if near else "--help lists all flags"
        raise UserError(f"unknown flag {unknown}; {hint}")

    def format_help(self) -> str:
        """The help; that of --help_all has the parameters of each step at its end."""
        if not self.shows_all:
            return super().format_help()
        steps = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
        for key, field in self.fields.items():
            if inner_model(field):
                group = steps.add_argument_group(f"--{key} NAME=VALUE ...")
                for name, parameter in inner_model(field).model_fields.items():
                    group.add_argument(name, help=help_text(parameter))
        return "\n".join(filter(None, (super().format_help(), steps.format_help())))


def inner_model(field: FieldInfo | None) -> type[BaseModel] | None:
    """The model of a group or of a step; None for a setting that is one value."""
    types = (field.annotation, *get_args(field.annotation)) if field else ()
    return next((each for each in types if inspect.isclass(each) and issubclass(each, BaseModel)), None)


def contains(annotation: object, kind: object) -> bool:
    """Whether a type is, or is made of, another one, such as list."""
    parts = get_args(annotation)
    return kind in (annotation, get_origin(annotation)) or any(contains(part, kind) for part in parts)


def list_fields(
    model: type[BaseModel], prefix: str = "", with_parameters: bool = True
) -> dict[str, FieldInfo]:
    """{"paths.infer_path": …, "image_filtering": …}: settings and steps, also the parameters of the steps."""
    fields = {}
    for name, field in model.model_fields.items():
        key, inner, is_step = f"{prefix}{name}", inner_model(field), contains(field.annotation, NoneType)
        if not inner or is_step:
            fields[key] = field
        if inner and (with_parameters or not is_step):
            fields |= list_fields(inner, f"{key}.", with_parameters)
    return fields


def choices_of(field: FieldInfo) -> str:
    """The values of a setting that has a few, with commas."""
    types = (field.annotation, *get_args(field.annotation))
    return ",".join(str(value) for each in types if get_origin(each) is Literal for value in get_args(each))


def flag_options(field: FieldInfo, metavar: str) -> dict[str, object]:
    """How many values a flag takes, and what they are called."""
    if inner_model(field):
        return {"nargs": "*", "metavar": "NAME=VALUE"}
    if contains(field.annotation, list):
        return {"nargs": "+", "metavar": metavar}
    if contains(field.annotation, bool):
        return {"nargs": "?", "const": ["true"], "type": lambda text: [text], "metavar": metavar}
    return {"nargs": 1, "metavar": f"{{{choices_of(field)}}}" if choices_of(field) else metavar}


def help_text(field: FieldInfo) -> str:
    """What a setting is, with its default, or what a step does."""
    if inner_model(field):
        return inner_model(field).__doc__
    text, default = field.description or choices_of(field).replace(",", "|"), field.default
    if field.is_required() or default in (None, []):
        return text
    return f"{text} ({str(default).lower() if isinstance(default, bool) else default})"


def parse_text(text: str, field: FieldInfo) -> object:
    """A value of the command line: as it stands, but null, and a list in brackets, are read as YAML."""
    nulls = ("null", "~") if contains(field.annotation, str) else ("null", "~", "")
    if text in nulls and contains(field.annotation, NoneType):
        return None
    if not text.startswith("[") or not contains(field.annotation, list):
        return text
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text  # such as "[a] cat"


def read_parameters(step: str, model: type[BaseModel], texts: list[str]) -> dict[str, object]:
    """NAME=VALUE texts of a step -> {"STEP.NAME": value}. Errors: UserError."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--{step} {text}: parameters are given as NAME=VALUE")
        if name not in model.model_fields:
            near = nearest(name, model.model_fields)
            raise UserError(f"--{step}.{name}: unknown parameter; the nearest is {near}")
        values[f"{step}.{name}"] = parse_text(value, model.model_fields[name])
    return values


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name of nearest spelling."""
    return difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]


def file_values(content: dict, model: type[BaseModel], file: str, prefix: str = "") -> dict[str, object]:
    """The content of a YAML or JSON file by the settings' keys; a step without parameters is {}.

    Errors: UserError for an unknown key, and for a group or step that is neither null nor keys and values.
    """
    values, known = {}, list_fields(model, prefix)
    for name, value in content.items():
        key, inner = f"{prefix}{name}", inner_model(model.model_fields.get(name))
        if inner and isinstance(value, dict | None):
            values |= {key: {}} if key in known else {}
            values |= file_values(value or {}, inner, file, f"{key}.")
        elif inner:
            raise UserError(f"{file}: {key}: expected keys and values, found {one_line(repr(value), 80)}")
        elif key in known:
            values[key] = value
        else:
            raise UserError(f"{file}: unknown key {key}; the nearest is {nearest(key, known)}")
    return values


def nest(values: dict[str, object]) -> dict[str, object]:
    """{"paths.infer_path": x} -> {"paths": {"infer_path": x}}"""
    nested: dict = {}
    for key, value in sorted(values.items()):
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return nested


def validate(model: type[BaseModel], values: dict[str, object], source: str | None, flags: dict) -> BaseModel:
    """Values by their keys -> the settings, with their types.

    source: the file that values are from which are not in `flags`, those of the command line. Errors:
    UserError that names the key or the flag.
    """
    try:
        return model.model_validate(nest(values))
    except ValidationError as error:
        problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    key = max((key for key in list_fields(model) if place.startswith(key)), key=len)
    where = f"{source}: {key}" if source and key not in flags else f"--{key}"
    if problem["type"] == "missing":
        raise UserError(f"{where} is missing")
    message = problem["msg"].removeprefix("Value error, ")
    found = one_line(repr(problem["input"]), 80)
    raise UserError(f"{where}: {message[0].lower()}{message[1:]}, found {found}")
