"""The command line checked: rules, text, trackers, sizes; and what depends on other flags filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.cli.defaults import check_sizes, fill_defaults, use_prepared_buckets
from lora_training.cli.rules import RULES, leaves_steps_idle
from lora_training.cli.trackers import usable_trackers
from lora_training.console import print_status, printable
from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse


def check_args(args: argparse.Namespace, set_flags: set[str], parser: argparse.ArgumentParser) -> None:
    """Refuses what can't work or would be ignored, and fills in defaults that depend on other flags.

    set_flags: names of the flags on the command line or in the --config file. Errors: UserError that names
    the flag and the way out.
    """
    check_rules(args, set_flags, parser)
    # stand in the published commands for textual inversion
    for name in ("rank", "train_text_encoder_ti_frac"):
        if name in set_flags and args.train_transformer_frac == 0:
            reason = "no effect with --train_transformer_frac 0: no LoRA, tokens to the end"
            print_status(f"note: --{name} has {reason}")
    if leaves_steps_idle(args):
        train_tokens_to_the_end(args)
    for name, value in vars(args).items():
        if value == "":  # off, as a configuration may say it
            setattr(args, name, parser.get_default(name))
        check_text(name, value)
    args.report_to = usable_trackers(args.report_to)
    use_prepared_buckets(args)
    fill_defaults(args)
    check_sizes(args)


def train_tokens_to_the_end(args: argparse.Namespace) -> None:
    """Lets the new tokens take the steps that the shares leave to nothing; says so."""
    shares = f"--train_transformer_frac {args.train_transformer_frac:g} with"
    shares += f" --train_text_encoder_ti_frac {args.train_text_encoder_ti_frac:g}"
    print_status(f"note: {shares} leaves the last steps to nothing: the new tokens train on to the end")
    args.train_text_encoder_ti_frac = 1.0


def check_rules(args: argparse.Namespace, set_flags: set[str], parser: argparse.ArgumentParser) -> None:
    """Errors: UserError with the message of the first rule that is broken."""
    for flags, is_broken, message in (*RULES, *parser.rules):
        active = [
            name
            for name in flags.split()
            if name in set_flags and not is_off(name, vars(args)[name], parser.get_default(name))
        ]
        if (active or not flags) and is_broken(args):
            raise UserError(message.format(flag=f"--{active[0]}" if active else "", a=args))


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
