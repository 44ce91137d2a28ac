"""The settings of a preparation from the command line, on top of a YAML or JSON file."""

from __future__ import annotations

from lora_training.errors import UserError
from lora_training.files import read_config_file
from lora_training.prepare.checks import check_settings
from lora_training.prepare.settings import Settings
from lora_training.settings import SettingsParser, file_values, validate


def read_settings(argv: list[str] | None) -> Settings:
    """The settings, checked. Errors: UserError."""
    parser = SettingsParser(
        Settings,
        prog="prepare_dataset.py",
        usage="%(prog)s -d DIR -o DIR [--STEP [NAME=VALUE ...]] [--config FILE] [--KEY VALUE ...]",
        description="Turns a folder of pictures into a training set, or says what is wrong with one.",
    )
    args, flags = parser.read(argv)
    values: dict[str, object] = {}
    if args.config:
        content = lift_steps(read_config_file(args.config), args.config)
        values = file_values(content, Settings, args.config)
    settings = validate(Settings, values | flags, args.config, flags)
    check_settings(settings, flags)
    return settings


def lift_steps(content: dict, file: str) -> dict:
    """A file's content with the steps beside the other keys, each with its parameters.

    They stand in `steps`, a mapping or a list of names or of names with parameters. A step that is false is
    off. Errors: UserError for anything else.
    """
    steps = content.get("steps") or {}
    if isinstance(steps, list):
        entries = [entry if isinstance(entry, dict) else {entry: None} for entry in steps]
        steps = {name: parameters for entry in entries for name, parameters in entry.items()}
    if not isinstance(steps, dict):
        raise UserError(f"--config {file}: steps: expected step names, found {steps!r}")
    switched_on = {
        name: None if value is True else value for name, value in steps.items() if value is not False
    }
    return {key: value for key, value in content.items() if key != "steps"} | switched_on
