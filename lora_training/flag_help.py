"""Help of the command line: a training script's --help has the flags that matter most, --help_all has all."""

from __future__ import annotations

import argparse
import shutil

USUAL_FLAGS = (
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


class FullHelp(argparse.Action):
    """--help_all: prints the help of every flag, and ends the program."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        parser.shows_all = True
        parser.print_help()
        parser.exit()


def format_usual_flags(parser: argparse.ArgumentParser, title: str) -> str:
    """A section of a parser's USUAL_FLAGS, each with its main name and the short one."""
    width = min(shutil.get_terminal_size().columns, 120)
    formatter = argparse.HelpFormatter(parser.prog, max_help_position=32, width=width)
    formatter.start_section(title)
    actions = {action.dest: action for action in parser._actions}
    usual = [actions[name] for name in USUAL_FLAGS]
    names = [action.option_strings for action in usual]
    for action in usual:
        short_names = [name for name in action.option_strings if len(name) == 2]
        action.option_strings = short_names + action.option_strings[:1]
    formatter.add_arguments(usual)
    formatter.end_section()
    text = formatter.format_help()
    for action, all_names in zip(usual, names, strict=True):
        action.option_strings = all_names
    return text
