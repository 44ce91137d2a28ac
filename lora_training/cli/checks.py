"""The command line checked: rules, text, trackers, sizes; and what depends on other flags filled in."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from lora_training.cli.defaults import check_sizes, fill_defaults, use_prepared_buckets
from lora_training.cli.rules import RULES, Rule
from lora_training.console import print_status, printable
from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse

TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")


def check_args(
    args: argparse.Namespace, set_flags: set[str], parser: argparse.ArgumentParser, typed: set[str]
) -> None:
    """Refuses what can't work or would be ignored, and fills in defaults that depend on other flags.

    set_flags: names of the flags on the command line or in the --config file, less those that turn out to be
    off; typed: those on the command line. Errors: UserError that names the flag and the way out.
    """
    check_rules(args, set_flags, parser, typed)
    # stand in the published commands for textual inversion
    for name in ("rank", "train_text_encoder_ti_frac"):
        if name in set_flags and args.train_transformer_frac == 0:
            reason = "no effect with --train_transformer_frac 0: no LoRA, tokens to the end"
            print_status(f"note: --{name} has {reason}")
    for name, value in vars(args).items():
        if value == "":  # off, as a configuration may say it
            setattr(args, name, parser.get_default(name))
        check_text(name, value)
    check_trackers(args.report_to)
    use_prepared_buckets(args)
    fill_defaults(args)
    check_sizes(args)


def check_rules(
    args: argparse.Namespace, set_flags: set[str], parser: argparse.ArgumentParser, typed: set[str]
) -> None:
    """Turns off what a --config file has and can't have an effect, with a note.

    Errors: UserError with the message of the first other rule that is broken.
    """
    for rule in (*RULES, *parser.rules):
        active = [
            name
            for name in rule.flags.split()
            if name in set_flags and not is_off(name, vars(args)[name], parser.get_default(name))
        ]
        if not (active or not rule.flags) or not rule.is_broken(args):
            continue
        active.sort(key=lambda name: name not in typed)
        message = rule.message.format(flag=f"--{active[0]}" if active else "", a=args)
        yielding = yielding_flags(rule, active, set_flags, typed)
        if not yielding:
            raise UserError(message)
        for name in yielding:
            setattr(args, name, parser.get_default(name))
            set_flags.discard(name)
            print_status(f"note: {name} of the --config file is off: {message}")


def yielding_flags(rule: Rule, active: list[str], set_flags: set[str], typed: set[str]) -> list[str]:
    """The flags that are turned off where a rule is broken: those of a --config file that the command line
    leaves without effect, or contradicts. None where it is an error.
    """
    if typed & set(active):
        return [rule.other] if rule.other in set_flags - typed else []
    return active if rule.yields or rule.other in typed else []


def is_off(name: str, value: object, default: object) -> bool:
    """Whether a flag's value is its off value: none, 0, or its default.

    A learning rate of 0 is no way to turn it off.
    """
    is_nothing = value in (None, 0, "none", "") and value is not False
    return value == default or (is_nothing and name != "text_encoder_lr")


def check_text(name: str, value: object) -> None:
    """Errors: UserError for text that no file or terminal takes."""
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if any(printable(text) != text or "\0" in text for text in texts):
        raise UserError(f"--{name}: {printable(str(value))!r} has bytes that are no text")


def check_trackers(report_to: str) -> None:
    """The trackers of --report_to must be known, and their packages installed."""
    for tracker in [] if report_to in ("none", "all") else report_to.split(","):
        if tracker not in TRACKERS:
            known = ", ".join(sorted(TRACKERS))
            raise UserError(f"--report_to {tracker}: unknown; use one of {known}, all, none")
        if importlib.util.find_spec(tracker) is None:
            raise UserError(
                f"--report_to {tracker}: not installed; `pip install {tracker}`, or --report_to none"
            )
