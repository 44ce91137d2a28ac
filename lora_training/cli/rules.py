"""Combinations of flags that can't work or would have no effect.

A rule names flags, a condition and a message. It is broken where one of its flags was given a value other
than its off value (or, for a rule without flags, always) and the condition holds. In messages {flag} is the
flag that was given, and {a} all settings.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_training.cli.defaults import optimizer_of, prompt_is_empty
from lora_training.data.captions import clean_caption, contains_word
from lora_training.files import output_name

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

LORA_STARTS = ("gaussian", "default", "true", "orthogonal", "olora", "pissa")
ONE_RATE_OPTIMIZERS = ("prodigy", "adafactor", "schedulefree")
PRIOR_FLAGS = "class_data_dir class_prompt num_class_images sample_batch_size prior_generation_precision"
TOKEN_FLAGS = (
    "train_text_encoder_ti_frac token_abstraction num_new_tokens_per_abstraction initializer_concept"
)
LORA_FLAGS = (
    "lora_alpha lora_type lora_dropout lora_layers lora_blocks use_dora use_rslora init_lora_weights"
    " merge_lora use_ema preserve_class init_lora copy_to_adapter"
)
PRODIGY_FLAGS = "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup"


class Rule(NamedTuple):
    """Flags, when they are wrong, and what to say then.

    yields: a flag that only the --config file has is off then, with a note. other: the flag that excludes
    them; the one of the command line wins over the file's.
    """

    flags: str
    is_broken: Callable[[argparse.Namespace], object]
    message: str
    yields: bool = False
    other: str | None = None


def rule(flags: str, is_broken: Callable, message: str) -> Rule:
    """A rule for flags, given with spaces between them."""
    return Rule(flags, is_broken, message)


def always(is_broken: Callable, message: str) -> Rule:
    """A rule that doesn't wait for a flag to be given."""
    return Rule("", is_broken, message)


def no_effect(flags: str, is_broken: Callable, reason: str) -> Rule:
    """Flags that would do nothing, `reason` being "without …" or "with …"."""
    return Rule(flags, is_broken, f"{{flag}} has no effect {reason}", yields=True)


def without(needed: str, flags: str) -> Rule:
    """Flags that do nothing unless another flag is set."""
    return no_effect(flags, lambda a: not vars(a)[needed], f"without --{needed}")


def excluded(other: str, flags: str) -> Rule:
    """Flags that can't stand together with another one."""
    message = f"--{other} and {{flag}} exclude each other: give one"
    return Rule(flags, lambda a: vars(a)[other], message, other=other)


def trains_text(a: argparse.Namespace) -> bool:
    """Whether text embeddings change while training."""
    return a.train_text_encoder or a.train_text_encoder_ti


def text_share(a: argparse.Namespace) -> float:
    """The share of the steps in which a text encoder or new tokens are trained."""
    tokens = a.train_text_encoder_ti and a.train_text_encoder_ti_frac
    return max(tokens, a.train_text_encoder and a.train_text_encoder_frac)


def leaves_steps_idle(a: argparse.Namespace) -> bool:
    """Whether neither LoRA nor text are trained in the last steps, as the shares of the steps say."""
    return 0 < a.train_transformer_frac < 1 and text_share(a) < 1


def is_schedule_free(a: argparse.Namespace) -> bool:
    """Whether --optimizer is schedulefree or a class of that library."""
    return optimizer_of(a).startswith("schedulefree")


def makes_own_rate(a: argparse.Namespace) -> bool:
    """Whether Adafactor's relative steps take the place of learning rate and schedule."""
    return optimizer_of(a) == "adafactor" and "relative_step=True" in (a.optimizer_args or ())


def varies_captions(a: argparse.Namespace) -> bool:
    """Whether captions are made anew each time."""
    return a.shuffle_tags or a.tag_dropout or any(varies_captions(own) for own in vars(a).get("sets", ()))


def draws_nothing(a: argparse.Namespace) -> bool:
    """Whether there are neither validation images nor held-out ones."""
    return a.validation_split == 0 and (a.num_validation_images == 0 or prompt_is_empty(a))


def tokens_replace_class(a: argparse.Namespace) -> bool:
    """Whether --preserve_class holds a word that new tokens take the place of."""
    words = list(filter(None, map(clean_caption, a.token_abstraction.split(","))))
    return a.train_text_encoder_ti and contains_word(a.preserve_class, words)


def changes_base(a: argparse.Namespace) -> bool:
    """Whether the base's weights are changed, by an initialisation or by merging."""
    return a.merge_lora or a.init_lora_weights.startswith(("pissa", "olora", "corda", "loftq"))


def unknown_start(a: argparse.Namespace) -> bool:
    """Whether --init_lora_weights is none that works without data or settings."""
    start = a.init_lora_weights.lower()
    return start not in LORA_STARTS and not start.removeprefix("pissa_niter_").isdecimal()


def no_mask_source(a: argparse.Namespace) -> bool:
    """Whether --masked_loss names no place of masks."""
    where = a.masked_loss
    return not (where == "alpha" or where[0] in "-_" or Path(where).is_dir())


def data_folder_with(a: argparse.Namespace, folder: str | None) -> Path | None:
    """The data folder that a folder is, or lies in."""
    data = [Path(d).resolve() for d in (a.train_data_dir, a.instance_data_dir, a.dataset_name) if d]
    inside = (d for d in data if folder and d.is_dir() and Path(folder).resolve().is_relative_to(d))
    return next(inside, None)


def trackers(a: argparse.Namespace) -> set[str]:
    """The names in --report_to."""
    return set(a.report_to.split(","))


# fmt: off
BASE_RULES = (
    always(lambda a: not a.pretrained_model_name_or_path,
           "--pretrained_model_name_or_path is missing: a hub id, a diffusers folder or a checkpoint file"),
    no_effect("revision", lambda a: Path(a.pretrained_model_name_or_path).exists(),
              "with a base on this machine"),
)
DATA_RULES = (
    *(rule(name, lambda a, name=name: Path(vars(a)[name]).is_file(),
           f"{{flag}} {{a.{name}}}: a file; --dataset_name reads tables of pictures, such as .parquet")
      for name in ("train_data_dir", "instance_data_dir")),
    rule("train_data_dir", lambda a: not Path(a.train_data_dir).is_dir(),
         "{flag} {a.train_data_dir}: no such folder"),
    rule("instance_data_dir", lambda a: not Path(a.instance_data_dir).is_dir(),
         "{flag} {a.instance_data_dir}: no such folder"),
    always(lambda a: not (a.train_data_dir or a.dataset_name or a.instance_data_dir or a.dataset_config),
           "no data: give --train_data_dir, --dataset_name, or --instance_data_dir with --instance_prompt"),
    excluded("train_data_dir", "instance_data_dir"),
    excluded("dataset_name", "instance_data_dir"),
    excluded("dataset_name", "train_data_dir")._replace(
        is_broken=lambda a: a.dataset_name and not a.dataset_name.endswith(".py")),
    rule("train_data_dir dataset_name instance_data_dir", lambda a: a.dataset_config,
         "{flag} and --dataset_config exclude each other: name the folder in the file"),
    no_effect("kohya_folders", lambda a: not a.train_data_dir,
              "without --train_data_dir, the folder that holds them"),
    without("dataset_name", "dataset_config_name dataset_split image_column"),
    rule("instance_data_dir", lambda a: not a.instance_prompt and not a.default_caption,
         '{flag} needs --instance_prompt, such as "a photo of sks dog"'),
    rule("default_caption", lambda a: a.instance_prompt,
         "--instance_prompt and --default_caption say the same thing: give one"),
    rule("validation_split", lambda a: a.validation_split == 1,
         "--validation_split 1 leaves no image to train on"),
    without("random_rotation", "random_rotation_prob"),
    no_effect("tag_separator keep_tokens", lambda a: not varies_captions(a),
              "without --shuffle_tags or --tag_dropout"),
    always(lambda a: varies_captions(a) and not a.tag_separator,
           "--tag_separator is empty: what stands between tags?"),
    no_effect("caption_per_line caption_extension",
              lambda a: a.dataset_name and not Path(a.dataset_name).is_dir(),
              "with --dataset_name: it is for .txt files in a folder"),
)
PRIOR_AND_CACHE_RULES = (
    without("with_prior_preservation", PRIOR_FLAGS),
    no_effect("prior_loss_weight",
              lambda a: not a.with_prior_preservation and not any(own.is_class for own in a.sets),
              "without --with_prior_preservation or a set with class_prompt"),
    without("preserve_class", "preserve_weight"),
    rule("preserve_class", lambda a: not a.trigger_word and not a.train_text_encoder_ti,
         "{flag} needs --trigger_word, or new tokens: the class stands in their place"),
    rule("preserve_class", lambda a: a.train_text_encoder,
         "{flag} and --train_text_encoder exclude each other: what the base makes of the text would change"),
    rule("preserve_class", tokens_replace_class,
         "{flag} {a.preserve_class} has a word of --token_abstraction in it, which new tokens take the"
         " place of:"
         " call the class otherwise"),
    no_effect("prior_generation_precision", lambda a: a.quantize_base or a.blocks_to_swap,
              "with --quantize_base or --blocks_to_swap, whose base draws the class images too"),
    rule("cuda_graphs", lambda a: not a.cache_latents, "{flag} needs --cache_latents"),
    rule("train_text_encoder train_text_encoder_ti compile blocks_to_swap quantize_base lora_dropout use_dora"
         " preserve_class", lambda a: a.cuda_graphs,
         "--cuda_graphs can't be combined with {flag}, which does more than launch the same work again"),
    rule("blocks_to_swap", lambda a: a.compile,
         "{flag} can't be combined with --compile, which wants weights that stay in one place"),
    rule("with_prior_preservation", lambda a: not a.class_prompt,
         '{flag} needs --class_prompt, such as "a photo of a dog"'),
    rule("cache_latents", lambda a: a.color_jitter is not None or a.random_rotation,
         "{flag} can't be combined with --color_jitter or --random_rotation: they change each image each"
         " time"),
    rule("train_text_encoder train_text_encoder_ti shuffle_tags tag_dropout",
         lambda a: a.cache_text_embeddings,
         "--cache_text_embeddings can't be combined with {flag}: the embeddings change"),
    no_effect("cache_folder", lambda a: not a.cache_latents and (trains_text(a) or varies_captions(a)),
              "without --cache_latents or captions whose embeddings can't change"),
)
LORA_RULES = (
    rule("train_text_encoder", lambda a: a.train_text_encoder_ti,
         "--train_text_encoder and --train_text_encoder_ti exclude each other: give one"),
    without("train_text_encoder", "train_text_encoder_frac"),
    without("train_text_encoder_ti", TOKEN_FLAGS),
    no_effect("text_encoder_lr adam_weight_decay_text_encoder", lambda a: not trains_text(a),
              "without --train_text_encoder or --train_text_encoder_ti"),
    rule("text_encoder_lr", lambda a: a.text_encoder_lr == 0,
         "--text_encoder_lr 0 trains nothing: leave out --train_text_encoder and --train_text_encoder_ti"
         " instead"),
    always(lambda a: a.initializer_concept is not None and not a.initializer_concept.strip(),
           "--initializer_concept is blank: leave it out to start at random"),
    no_effect("num_new_tokens_per_abstraction", lambda a: a.initializer_concept,
              "with --initializer_concept: its tokens decide how many"),
    always(lambda a: a.train_transformer_frac == 0 and not a.train_text_encoder_ti,
           "--train_transformer_frac 0 trains no LoRA: it needs --train_text_encoder_ti"),
    no_effect(LORA_FLAGS, lambda a: a.train_transformer_frac == 0,
              "with --train_transformer_frac 0, which adds no LoRA"),
    always(lambda a: leaves_steps_idle(a) and not (a.train_text_encoder_ti and text_share(a)),
           "--train_transformer_frac below 1 leaves steps in which nothing is trained; raise it or a text"
           " fraction to 1"),
    always(lambda a: a.lora_alpha == 0, "--lora_alpha 0 scales the update to nothing"),
    no_effect("lokr_factor", lambda a: a.lora_type != "lokr" and not a.init_lora, "without --lora_type lokr"),
    rule("lokr_factor", lambda a: a.lokr_factor < 1, "{flag} {a.lokr_factor}: 1 or more, or -1"),
    rule("use_dora lora_dropout init_lora_weights loraplus_lr_ratio", lambda a: a.lora_type != "lora",
         "{flag} is for plain LoRAs: peft's {a.lora_type} has no such thing"),
    rule("merge_lora", lambda a: a.lora_type != "lora",
         "{flag} is for plain LoRAs: scripts/lora/merge_lora.py merges a {a.lora_type}"),
    rule("init_lora", lambda a: not Path(a.init_lora).exists(), "{flag} {a.init_lora}: no such file"),
    no_effect("init_lora_weights use_rslora", lambda a: a.init_lora,
              "with --init_lora, whose weights are the start"),
    rule("quantize_base blocks_to_swap", changes_base,
         "{flag} can't be combined with --merge_lora or an initialisation that changes the base's weights"),
    always(unknown_start,
           "--init_lora_weights {a.init_lora_weights}: needs data or settings that no flag gives; use one"
           " of gaussian,"
           " default, orthogonal, olora, pissa, pissa_niter_N"),
    rule("use_dora", lambda a: a.init_lora_weights.lower().startswith(("pissa", "olora")),
         "{flag} can't be combined with --init_lora_weights {a.init_lora_weights}: what it learns is no"
         " LoRA of the"
         " unchanged base"),
)
LOSS_AND_OPTIMIZER_RULES = (
    no_effect("huber_c huber_schedule", lambda a: a.loss_type == "l2",
              "without --loss_type huber or smooth_l1"),
    always(lambda a: a.loss_type != "l2" and a.huber_c == 0,
           "--huber_c 0 leaves --loss_type {a.loss_type} no square around 0: give a number above 0"),
    rule("debiased_estimation", lambda a: a.snr_gamma,
         "{flag} and --snr_gamma both weigh the loss by the SNR: give one"),
    rule("huber_schedule", lambda a: a.huber_schedule == "snr" and a.family.predicts_flow,
         "{flag} snr is for families that predict noise: use exponential"),
    without("masked_loss", "unmasked_weight"),
    rule("masked_loss", no_mask_source,
         "{flag} {a.masked_loss}: neither alpha, nor a folder, nor an end of names that begins with - or _"),
    rule("min_timestep max_timestep", lambda a: not a.min_timestep < a.max_timestep <= 1000,
         "--min_timestep {a.min_timestep} and --max_timestep {a.max_timestep}: the first must be below the"
         " second, both"
         " within 0 to 1000"),
    rule("use_8bit_adam use_prodigy", lambda a: a.use_8bit_adam and a.use_prodigy,
         "--use_8bit_adam and --use_prodigy contradict each other"),
    rule("use_8bit_adam use_prodigy", lambda a: a.optimizer not in ("adamw", optimizer_of(a)),
         "{flag} and --optimizer {a.optimizer} contradict each other"),
    no_effect(PRODIGY_FLAGS, lambda a: optimizer_of(a) != "prodigy", "without --optimizer prodigy"),
    always(lambda a: is_schedule_free(a) and (a.lr_scheduler != "constant" or a.use_ema),
           "--optimizer {a.optimizer} averages by itself: use --lr_scheduler constant and no --use_ema"),
    no_effect("learning_rate text_encoder_lr scale_lr lr_scheduler lr_warmup_steps", makes_own_rate,
              "with --optimizer_args relative_step=True, which makes its own rate"),
    no_effect("loraplus_lr_ratio", lambda a: optimizer_of(a) in ONE_RATE_OPTIMIZERS,
              "with --optimizer {a.optimizer}: it takes one rate for all"),
    no_effect("adam_beta1 adam_beta2 adam_epsilon",
              lambda a: "." in a.optimizer or a.optimizer in ("muon", "lion8bit", "came"),
              "with --optimizer {a.optimizer}: give its own with --optimizer_args"),
    rule("use_dora", lambda a: a.optimizer == "muon",
         "{flag} can't be combined with --optimizer muon, which trains matrices: DoRA's magnitudes are"
         " vectors"),
    no_effect("adam_beta1 adam_beta2 adam_epsilon", lambda a: a.optimizer == "adafactor",
              "with --optimizer adafactor"),
    always(lambda a: a.lr_scheduler == "polynomial" and min(a.learning_rate, a.text_encoder_lr or 1) <= 1e-7,
           "--lr_scheduler polynomial ends at a rate of 1e-7: the --learning_rate must be higher"),
    no_effect("lr_num_cycles", lambda a: a.lr_scheduler != "cosine_with_restarts",
              "without --lr_scheduler cosine_with_restarts"),
    no_effect("lr_power", lambda a: a.lr_scheduler != "polynomial", "without --lr_scheduler polynomial"),
    without("use_ema", "ema_decay"),
    always(lambda a: a.learning_rate == 0, "--learning_rate 0 trains nothing"),
    rule("color_jitter", lambda a: len(a.color_jitter) not in (0, 4),
         "{flag} takes four numbers (brightness contrast saturation hue) or none"),
)
OUTPUT_RULES = (
    always(lambda a: output_name(a.output_dir or "").lower() == "pytorch_lora_weights",
           "--output_dir {a.output_dir}: the LoRA for other tools would have the name of diffusers' file;"
           " choose"
           " another"),
    always(lambda a: len(os.fsencode(output_name(a.output_dir or ""))) > 239,
           "--output_dir {a.output_dir}: the last folder's name is too long for files that are named after"
           " it (239"
           " bytes)"),
    always(lambda a: data_folder_with(a, a.output_dir),
           "--output_dir {a.output_dir} lies in the data folder, and its pictures would become data"),
    rule("class_data_dir", lambda a: data_folder_with(a, a.class_data_dir),
         "{flag} {a.class_data_dir} lies in the data folder, and its pictures would become data"),
    without("resume_from_checkpoint", "resume_anyway"),
    excluded("validation_steps", "validation_epochs"),
    no_effect("validation_epochs validation_steps", draws_nothing, "without validation or held-out images"),
    excluded("validation_prompt", "validation_prompts_file"),
    no_effect("keep_best", draws_nothing, "without pictures or held-out images, at which steps are compared"),
    no_effect("logging_dir", lambda a: trackers(a) <= {"none", "wandb"},
              "without a tracker that writes there, such as --report_to tensorboard"),
    without("push_to_hub", "hub_model_id hub_token"),
    rule("hub_token", lambda a: {"wandb", "all"} & trackers(a),
         "{flag} is refused with wandb, which stores command lines: log in with `hf auth login` instead"),
    rule("enable_xformers_memory_efficient_attention", lambda a: importlib.util.find_spec("xformers") is None,
         "{flag}: xformers isn't installed; torch's own attention needs no flag"),
)
# fmt: on
RULES = (
    *BASE_RULES,
    *DATA_RULES,
    *PRIOR_AND_CACHE_RULES,
    *LORA_RULES,
    *LOSS_AND_OPTIMIZER_RULES,
    *OUTPUT_RULES,
)
