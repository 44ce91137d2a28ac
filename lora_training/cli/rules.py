"""Combinations of flags that can't work or would have no effect."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.cli.defaults import check_sizes, fill_defaults, optimizer_of, use_prepared_buckets
from lora_training.cli.flag_groups import LORA_STARTS, NO_LORA, PRIOR, TOKENS, TRACKERS
from lora_training.console import print_status, printable
from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse

RULES = (
    (
        "",
        lambda a: not a.pretrained_model_name_or_path,
        "--pretrained_model_name_or_path is missing: a hub id, a diffusers folder or a checkpoint file",
    ),
    ("revision", lambda a: Path(a.pretrained_model_name_or_path).exists(), "with a base on this machine"),
    # data
    (
        "train_data_dir",
        lambda a: not Path(a.train_data_dir).is_dir(),
        "{flag} {a.train_data_dir}: no such folder",
    ),
    (
        "instance_data_dir",
        lambda a: not Path(a.instance_data_dir).is_dir(),
        "{flag} {a.instance_data_dir}: no such folder",
    ),
    (
        "",
        lambda a: not (a.train_data_dir or a.dataset_name or a.instance_data_dir or a.dataset_config),
        "no data: give --train_data_dir, --dataset_name, or --instance_data_dir with --instance_prompt",
    ),
    (
        "instance_data_dir",
        lambda a: a.train_data_dir,
        "--train_data_dir and {flag} exclude each other: give one",
    ),
    ("instance_data_dir", lambda a: a.dataset_name, "--dataset_name and {flag} exclude each other: give one"),
    (
        "train_data_dir",
        lambda a: a.dataset_name and not a.dataset_name.endswith(".py"),
        "{flag} and --dataset_name exclude each other: give one",
    ),
    (
        "train_data_dir dataset_name instance_data_dir",
        lambda a: a.dataset_config,
        "{flag} and --dataset_config exclude each other: name the folder in the file",
    ),
    ("kohya_folders", lambda a: not a.train_data_dir, "without --train_data_dir, the folder that holds them"),
    (
        "dataset_config_name dataset_split image_column",
        lambda a: not a.dataset_name,
        "without --dataset_name",
    ),
    (
        "instance_data_dir",
        lambda a: not a.instance_prompt and not a.default_caption,
        '{flag} needs --instance_prompt, such as "a photo of sks dog"',
    ),
    (
        "default_caption",
        lambda a: a.instance_prompt,
        "--instance_prompt and --default_caption say the same thing: give one",
    ),
    (
        "validation_split",
        lambda a: a.validation_split == 1,
        "--validation_split 1 leaves no image to train on",
    ),
    ("random_rotation_prob", lambda a: not a.random_rotation, "without --random_rotation"),
    (
        "tag_separator keep_tokens",
        lambda a: not a.shuffle_tags and not a.tag_dropout,
        "without --shuffle_tags or --tag_dropout",
    ),
    (
        "",
        lambda a: (a.shuffle_tags or a.tag_dropout) and not a.tag_separator,
        "--tag_separator is empty: what stands between tags?",
    ),
    (
        "caption_per_line",
        lambda a: a.dataset_name and not Path(a.dataset_name).is_dir(),
        "with --dataset_name: it is for .txt files in a folder",
    ),
    (PRIOR, lambda a: not a.with_prior_preservation, "without --with_prior_preservation"),
    (
        "prior_loss_weight",
        lambda a: not a.with_prior_preservation and not any(own.is_class for own in a.sets),
        "without --with_prior_preservation or a set with class_prompt",
    ),
    ("preserve_weight", lambda a: not a.preserve_class, "without --preserve_class"),
    (
        "preserve_class",
        lambda a: not a.trigger_word and not a.train_text_encoder_ti,
        "{flag} needs --trigger_word, or new tokens: the class stands in their place",
    ),
    (
        "preserve_class",
        lambda a: a.train_text_encoder,
        "{flag} and --train_text_encoder exclude each other: what the base makes of the text would change",
    ),
    (
        "preserve_class",
        lambda a: (
            a.train_text_encoder_ti
            and any(w.strip() in a.preserve_class for w in a.token_abstraction.split(",") if w.strip())
        ),
        "{flag} {a.preserve_class} has a word of --token_abstraction in it, which new tokens take the place of: call the class otherwise",
    ),
    (
        "prior_generation_precision",
        lambda a: a.quantize_base or a.blocks_to_swap,
        "with --quantize_base or --blocks_to_swap, whose base draws the class images too",
    ),
    ("cuda_graphs", lambda a: not a.cache_latents, "{flag} needs --cache_latents"),
    (
        "train_text_encoder train_text_encoder_ti compile blocks_to_swap quantize_base lora_dropout use_dora preserve_class",
        lambda a: a.cuda_graphs,
        "--cuda_graphs can't be combined with {flag}, which does more than launch the same work again",
    ),
    (
        "blocks_to_swap",
        lambda a: a.compile,
        "{flag} can't be combined with --compile, which wants weights that stay in one place",
    ),
    (
        "with_prior_preservation",
        lambda a: not a.class_prompt,
        '{flag} needs --class_prompt, such as "a photo of a dog"',
    ),
    (
        "cache_latents",
        lambda a: a.color_jitter is not None or a.random_rotation,
        "{flag} can't be combined with --color_jitter or --random_rotation: they change each image each time",
    ),
    (
        "train_text_encoder train_text_encoder_ti shuffle_tags tag_dropout",
        lambda a: a.cache_text_embeddings,
        "--cache_text_embeddings can't be combined with {flag}: the embeddings change",
    ),
    (
        "cache_folder",
        lambda a: not a.cache_latents and (trains_text(a) or a.shuffle_tags or a.tag_dropout),
        "without --cache_latents or captions whose embeddings can't change",
    ),
    # LoRA and text encoders
    (
        "train_text_encoder",
        lambda a: a.train_text_encoder_ti,
        "--train_text_encoder and --train_text_encoder_ti exclude each other: give one",
    ),
    ("train_text_encoder_frac", lambda a: not a.train_text_encoder, "without --train_text_encoder"),
    (TOKENS, lambda a: not a.train_text_encoder_ti, "without --train_text_encoder_ti"),
    (
        "text_encoder_lr adam_weight_decay_text_encoder",
        lambda a: not trains_text(a),
        "without --train_text_encoder or --train_text_encoder_ti",
    ),
    (
        "text_encoder_lr",
        lambda a: a.text_encoder_lr == 0,
        "--text_encoder_lr 0 trains nothing: leave out --train_text_encoder and --train_text_encoder_ti instead",
    ),
    (
        "",
        lambda a: a.initializer_concept is not None and not a.initializer_concept.strip(),
        "--initializer_concept is blank: leave it out to start at random",
    ),
    (
        "num_new_tokens_per_abstraction",
        lambda a: a.initializer_concept,
        "with --initializer_concept: its tokens decide how many",
    ),
    (
        "",
        lambda a: a.train_transformer_frac == 0 and not a.train_text_encoder_ti,
        "--train_transformer_frac 0 trains no LoRA: it needs --train_text_encoder_ti",
    ),
    (NO_LORA, lambda a: a.train_transformer_frac == 0, "with --train_transformer_frac 0, which adds no LoRA"),
    (
        "",
        lambda a: 0 < a.train_transformer_frac < 1 and text_frac(a) < 1,
        "--train_transformer_frac below 1 leaves steps in which nothing is trained; raise it or a text fraction to 1",
    ),
    ("", lambda a: a.lora_alpha == 0, "--lora_alpha 0 scales the update to nothing"),
    ("lokr_factor", lambda a: a.lora_type != "lokr" and not a.init_lora, "without --lora_type lokr"),
    ("lokr_factor", lambda a: a.lokr_factor < 1, "{flag} {a.lokr_factor}: 1 or more, or -1"),
    (
        "use_dora lora_dropout init_lora_weights loraplus_lr_ratio",
        lambda a: a.lora_type != "lora",
        "{flag} is for plain LoRAs: peft's {a.lora_type} has no such thing",
    ),
    (
        "merge_lora",
        lambda a: a.lora_type != "lora",
        "{flag} is for plain LoRAs: scripts/lora/merge_lora.py merges a {a.lora_type}",
    ),
    ("init_lora", lambda a: not Path(a.init_lora).exists(), "{flag} {a.init_lora}: no such file"),
    ("init_lora_weights use_rslora", lambda a: a.init_lora, "with --init_lora, whose weights are the start"),
    (
        "quantize_base blocks_to_swap",
        lambda a: a.merge_lora or a.init_lora_weights.startswith(("pissa", "olora", "corda", "loftq")),
        "{flag} can't be combined with --merge_lora or an initialisation that changes the base's weights",
    ),
    (
        "",
        lambda a: (
            (s := a.init_lora_weights.lower()) not in LORA_STARTS
            and not s.removeprefix("pissa_niter_").isdecimal()
        ),
        "--init_lora_weights {a.init_lora_weights}: needs data or settings that no flag gives; use one of gaussian, default, orthogonal, olora, pissa, pissa_niter_N",
    ),
    (
        "use_dora",
        lambda a: a.init_lora_weights.lower().startswith(("pissa", "olora")),
        "{flag} can't be combined with --init_lora_weights {a.init_lora_weights}: what it learns is no LoRA of the unchanged base",
    ),
    # loss and optimizer
    ("huber_c", lambda a: a.loss_type != "huber", "without --loss_type huber"),
    ("unmasked_weight", lambda a: not a.masked_loss, "without --masked_loss"),
    (
        "masked_loss",
        lambda a: not (a.masked_loss == "alpha" or a.masked_loss[0] in "-_" or Path(a.masked_loss).is_dir()),
        "{flag} {a.masked_loss}: neither alpha, nor a folder, nor an end of names that begins with - or _",
    ),
    (
        "min_timestep max_timestep",
        lambda a: not a.min_timestep < a.max_timestep <= 1000,
        "--min_timestep {a.min_timestep} and --max_timestep {a.max_timestep}: the first must be below the second, both within 0 to 1000",
    ),
    (
        "use_8bit_adam use_prodigy",
        lambda a: a.use_8bit_adam and a.use_prodigy,
        "--use_8bit_adam and --use_prodigy contradict each other",
    ),
    (
        "use_8bit_adam use_prodigy",
        lambda a: a.optimizer not in ("adamw", optimizer_of(a)),
        "{flag} and --optimizer {a.optimizer} contradict each other",
    ),
    (
        "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup",
        lambda a: optimizer_of(a) != "prodigy",
        "without --optimizer prodigy",
    ),
    (
        "",
        lambda a: optimizer_of(a) == "schedulefree" and (a.lr_scheduler != "constant" or a.use_ema),
        "--optimizer schedulefree averages by itself: use --lr_scheduler constant and no --use_ema",
    ),
    (
        "loraplus_lr_ratio",
        lambda a: optimizer_of(a) in ("prodigy", "adafactor", "schedulefree"),
        "with --optimizer {a.optimizer}: it takes one rate for all",
    ),
    (
        "adam_beta1 adam_beta2 adam_epsilon",
        lambda a: "." in a.optimizer,
        "with --optimizer {a.optimizer}: give its own with --optimizer_args",
    ),
    (
        "adam_beta1 adam_beta2 adam_epsilon",
        lambda a: a.optimizer == "adafactor",
        "with --optimizer adafactor",
    ),
    (
        "",
        lambda a: a.lr_scheduler == "polynomial" and min(a.learning_rate, a.text_encoder_lr or 1) <= 1e-7,
        "--lr_scheduler polynomial ends at a rate of 1e-7: the --learning_rate must be higher",
    ),
    (
        "lr_num_cycles",
        lambda a: a.lr_scheduler != "cosine_with_restarts",
        "without --lr_scheduler cosine_with_restarts",
    ),
    ("lr_power", lambda a: a.lr_scheduler != "polynomial", "without --lr_scheduler polynomial"),
    ("ema_decay", lambda a: not a.use_ema, "without --use_ema"),
    ("", lambda a: a.learning_rate == 0, "--learning_rate 0 trains nothing"),
    # sizes
    (
        "color_jitter",
        lambda a: len(a.color_jitter) not in (0, 4),
        "{flag} takes four numbers (brightness contrast saturation hue) or none",
    ),
    # output folder
    (
        "",
        lambda a: Path(a.output_dir or "").resolve().name.lower() == "pytorch_lora_weights",
        "--output_dir {a.output_dir}: the LoRA for other tools would have the name of diffusers' file; choose another",
    ),
    (
        "",
        lambda a: len(os.fsencode(Path(a.output_dir or "").resolve().name)) > 239,
        "--output_dir {a.output_dir}: the last folder's name is too long for files that are named after it (239 bytes)",
    ),
    (
        "",
        lambda a: data_holding(a, a.output_dir),
        "--output_dir {a.output_dir} lies in the data folder, and its pictures would become data",
    ),
    (
        "class_data_dir",
        lambda a: data_holding(a, a.class_data_dir),
        "{flag} {a.class_data_dir} lies in the data folder, and its pictures would become data",
    ),
    ("resume_anyway", lambda a: not a.resume_from_checkpoint, "without --resume_from_checkpoint"),
    # validation and logging
    (
        "validation_epochs",
        lambda a: a.validation_steps,
        "--validation_epochs and --validation_steps exclude each other: give one",
    ),
    (
        "validation_epochs validation_steps",
        lambda a: a.num_validation_images == a.validation_split == 0,
        "{flag} has no effect: there are no validation images and no held-out images",
    ),
    (
        "validation_prompts_file",
        lambda a: a.validation_prompt,
        "--validation_prompt and {flag} exclude each other: give one",
    ),
    (
        "keep_best",
        lambda a: a.num_validation_images == a.validation_split == 0,
        "without pictures or held-out images, at which steps are compared",
    ),
    (
        "logging_dir",
        lambda a: set(a.report_to.split(",")) <= {"none", "wandb"},
        "without a tracker that writes there, such as --report_to tensorboard",
    ),
    ("hub_model_id hub_token", lambda a: not a.push_to_hub, "without --push_to_hub"),
    (
        "hub_token",
        lambda a: {"wandb", "all"} & set(a.report_to.split(",")),
        "{flag} is refused with wandb, which stores command lines: log in with `hf auth login` instead",
    ),
    (
        "enable_xformers_memory_efficient_attention",
        lambda a: importlib.util.find_spec("xformers") is None,
        "{flag}: xformers isn't installed; torch's own attention needs no flag",
    ),
)


def check_args(args: argparse.Namespace, given: set[str], parser: argparse.ArgumentParser) -> None:
    """Refuses combinations that can't work or would be ignored, and fills in defaults that depend on other
    flags.

    given: names of the flags on the command line or in the --config file. Errors: UserError that names the
    flag and the way out.
    """
    for flags, wrong, why in (*RULES, *parser.rules):
        names = [
            n for n in flags.split() if n in given and not is_off(n, getattr(args, n), parser.get_default(n))
        ]
        if (names or not flags) and wrong(args):
            why = f"{{flag}} has no effect {why}" if why.startswith("with") else why
            raise UserError(why.format(flag=f"--{names[0]}" if names else "", a=args))
    for name in (
        "rank",
        "train_text_encoder_ti_frac",
    ):  # stand in the published commands for textual inversion
        if name in given and args.train_transformer_frac == 0:
            print_status(
                f"note: --{name} has no effect with --train_transformer_frac 0: no LoRA, tokens to the end"
            )
    for name, value in vars(args).items():
        if value == "":  # off, as a recipe may say it
            setattr(args, name, parser.get_default(name))
        words = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
        if any(printable(word) != word or "\0" in word for word in words):
            raise UserError(f"--{name}: {printable(str(value))!r} has bytes that are no text")
    check_trackers(args.report_to)
    use_prepared_buckets(args)
    fill_defaults(args)
    check_sizes(args)


def is_off(name: str, value: object, default: object) -> bool:
    """Whether a flag's value is its off value: none, 0, or its default.

    A learning rate of 0 is no way to turn it off.
    """
    return value == default or (
        value in (None, 0, "none", "") and value is not False and name != "text_encoder_lr"
    )


def data_holding(args: argparse.Namespace, folder: str | None) -> Path | None:
    """The data folder that a folder is, or lies in."""
    data = [Path(d).resolve() for d in (args.train_data_dir, args.instance_data_dir, args.dataset_name) if d]
    return next((d for d in data if folder and d.is_dir() and Path(folder).resolve().is_relative_to(d)), None)


def trains_text(args: argparse.Namespace) -> bool:
    """Whether text embeddings change while training."""
    return args.train_text_encoder or args.train_text_encoder_ti


def text_frac(args: argparse.Namespace) -> float:
    """The share of the steps in which a text encoder or new tokens are trained."""
    tokens = args.train_text_encoder_ti and args.train_text_encoder_ti_frac
    return max(tokens, args.train_text_encoder and args.train_text_encoder_frac)


def check_trackers(report_to: str) -> None:
    """The trackers of --report_to must be known, and their packages installed."""
    for tracker in [] if report_to in ("none", "all") else report_to.split(","):
        if tracker not in TRACKERS:
            raise UserError(
                f"--report_to {tracker}: unknown; use one of {', '.join(sorted(TRACKERS))}, all, none"
            )
        if importlib.util.find_spec(tracker) is None:
            raise UserError(
                f"--report_to {tracker}: not installed; `pip install {tracker}`, or --report_to none"
            )
