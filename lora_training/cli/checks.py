"""The command line checked: rules, text, trackers, sizes; and what depends on other flags filled in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.cli.defaults import check_sizes, fill_defaults, use_prepared_buckets
from lora_training.cli.rules import RULES, Rule, leaves_steps_idle
from lora_training.cli.trackers import usable_trackers
from lora_training.console import print_status, printable
from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse


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
