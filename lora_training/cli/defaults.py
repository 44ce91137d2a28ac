"""Settings that depend on other flags."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.cli.prompt_files import read_prompts
from lora_training.cli.types import count, key_and_value
from lora_training.console import print_status
from lora_training.data.captions import clean_caption, insert_trigger
from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse

LOWER_RATES = {"lion8bit": 3e-5, "came": 1e-5}


def fill_defaults(args: argparse.Namespace) -> None:
    """Fills in what depends on other flags."""
    args.optimizer = optimizer_of(args)
    args.captions_vary = args.shuffle_tags or args.tag_dropout > 0
    args.optimizer_args = dict(map(key_and_value, args.optimizer_args or ()))
    args.lora_alpha = float(args.rank) if args.lora_alpha is None else args.lora_alpha
    if args.lr_warmup_steps and args.lr_scheduler == "constant" and args.optimizer != "schedulefree":
        args.lr_scheduler = "constant_with_warmup"  # the two flags together can mean nothing else
    args.resolution = args.resolution or [args.family.resolution]
    args.trigger_word = clean_caption(args.trigger_word) or None  # as captions are, so that they have it
    args.prompt_settings = []
    if args.validation_prompts_file:
        args.prompt_settings = read_prompts(args.validation_prompts_file, args.family.pixel_divisor)
        args.validation_prompt = [settings.pop("prompt") for settings in args.prompt_settings]
    if prompt_is_empty(args):
        args.num_validation_images = 0
        print_status("note: --validation_prompt is empty: no pictures are drawn")
    for name in ("validation_prompt", "control_prompt"):  # each is one line, as a caption is; "" is off
        prompts = [clean_caption(prompt) for prompt in vars(args)[name] or []]
        vars(args)[name] = [prompt for prompt in prompts if prompt] or None
    asked = (args.validation_steps, args.validation_epochs, args.validation_prompt)
    args.limits_pictures = args.num_validation_images is None and not any(asked)
    if args.num_validation_images is None:
        args.num_validation_images = 4
    args.color_jitter = [0.1, 0.1, 0.1, 0.05] if args.color_jitter == [] else args.color_jitter
    # "name/" and "name" are the same folder
    args.output_dir = str(Path(args.output_dir or f"output/{args.family.name}-lora"))
    args.class_data_dir = args.class_data_dir or str(Path(args.output_dir) / "class_images")
    if args.max_train_steps == "auto" and args.num_train_epochs:
        args.max_train_steps = None
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 1000


def prompt_is_empty(args: argparse.Namespace) -> bool:
    """Whether --validation_prompt is "", which asks for no pictures; not given, captions are drawn."""
    prompts = args.validation_prompt
    return prompts is not None and not any(map(clean_caption, prompts)) and not args.validation_prompts_file


def use_prepared_buckets(args: argparse.Namespace) -> None:
    """Takes the buckets that prepare_dataset.py has left in the data folder; a list of one's own wins.

    Errors: UserError if --resolution asks for another size, because the pictures have been scaled already;
    with "auto" they are scaled again.
    """
    file = Path(args.train_data_dir or args.instance_data_dir or args.dataset_name or "") / "buckets.json"
    if args.aspect_ratio_buckets not in (None, "auto") or not file.is_file():
        return
    try:
        prepared = json.loads(file.read_text(encoding="utf-8-sig"))
        side, buckets = count(prepared["resolution"]), str(prepared["aspect_ratio_buckets"])
    except Exception:  # of a damaged file, half a dozen kinds
        raise UserError(
            f"{file}: has no resolution and aspect_ratio_buckets; prepare the folder again"
        ) from None
    if args.resolution is not None and not 3 / 4 <= math.prod((args.resolution * 2)[:2]) / side**2 <= 4 / 3:
        resolution = " ".join(map(str, args.resolution))
        if args.aspect_ratio_buckets == "auto":
            print_status(f"note: {file}: the pictures are prepared for {side}, and scaled to {resolution}")
            return
        raise UserError(
            f"--resolution {resolution}: the pictures are prepared for {side} ({file}); prepare again, or use"
            " --aspect_ratio_buckets auto"
        )
    args.resolution, args.aspect_ratio_buckets = [side], buckets
    print_status(f"buckets as prepared: {file}")


def check_sizes(args: argparse.Namespace) -> None:
    """--resolution and --aspect_ratio_buckets: numbers that the VAE and the denoiser can divide."""
    if len(args.resolution) > 2:
        raise UserError("--resolution takes one number, or width and height")
    for side in args.resolution:
        if side % args.family.pixel_divisor:
            raise UserError(f"--resolution {side} is not divisible by {args.family.pixel_divisor}")
    for pair in [] if args.aspect_ratio_buckets in (None, "auto") else args.aspect_ratio_buckets.split(";"):
        sides = [int(side) if side.strip().isdecimal() else 0 for side in pair.split(",")]
        if len(sides) != 2 or not all(side and side % args.family.pixel_divisor == 0 for side in sides):
            what = f'{pair!r} is no "height,width" of multiples of {args.family.pixel_divisor}'
            raise UserError(f'--aspect_ratio_buckets: {what}; or use "auto"')


def fill_learning_rate(args: argparse.Namespace, defaults: dict) -> None:
    """--learning_rate and its default: 1 where the optimizer finds its own step size and multiplies it.

    Some take larger steps than AdamW at the same rate: Lion's are the rate itself in every weight (a third to
    a tenth of AdamW's rate: https://arxiv.org/abs/2302.06675), and CAME's slowest mean is not corrected for
    its start (a tenth learns as fast on the toys).
    """
    name = optimizer_of(args).rpartition(".")[2].lower()
    defaults["learning_rate"] = 1.0 if name.startswith(("prodigy", "dadapt")) else 1e-4
    defaults["learning_rate"] = LOWER_RATES.get(optimizer_of(args), defaults["learning_rate"])
    if args.learning_rate is None:
        args.learning_rate = defaults["learning_rate"]


def settle_run(args: argparse.Namespace) -> None:
    """What concerns the run and not its sets, and what has no effect, which is said."""
    turn_off_untrained(args)
    drop_samplers(args)
    args.triggers = list(dict.fromkeys(own.trigger_word for own in args.sets or [args] if own.trigger_word))
    trigger = args.triggers[0] if args.triggers else None
    prompts = args.validation_prompt or []
    args.validation_prompt = [insert_trigger(p, trigger, "--validation_prompt") for p in prompts] or None
    args.captions_vary = args.captions_vary or any(own.captions_vary for own in args.sets)


def turn_off_untrained(args: argparse.Namespace) -> None:
    """What is trained in no step is not trained; says so."""
    if args.train_text_encoder and args.train_text_encoder_frac == 0:
        args.train_text_encoder = False
        print_status("note: --train_text_encoder_frac 0: no text encoder is trained")
    if args.train_text_encoder_ti and args.train_text_encoder_ti_frac == 0 < args.train_transformer_frac:
        args.train_text_encoder_ti = False
        print_status("note: --train_text_encoder_ti_frac 0: no new tokens are learned")


def drop_samplers(args: argparse.Namespace) -> None:
    """Pictures are drawn with the base's sampler, whatever kohya's --ss in a file of prompts names."""
    samplers = {settings.pop("sampler") for settings in args.prompt_settings if "sampler" in settings}
    if samplers:
        names = ", ".join(sorted(samplers))
        print_status(
            f"note: --ss {names} in {args.validation_prompts_file}: the base's sampler draws instead"
        )


def optimizer_of(args: argparse.Namespace) -> str:
    """The optimizer that --optimizer, --use_8bit_adam or --use_prodigy names."""
    if args.use_8bit_adam:
        return "adamw8bit"
    return "prodigy" if args.use_prodigy else args.optimizer
