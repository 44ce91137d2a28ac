"""What the metadata of a trained LoRA says of its training."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.data.examples import distinct_tails, set_source
from lora_training.files import output_name
from lora_training.lora.metadata import base_versions

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example
    from lora_training.training.run import Run

KOHYA_SETTINGS = {  # kohya's name (without ss_): the flag that it stands for
    "learning_rate": "learning_rate",
    "unet_lr": "learning_rate",
    "text_encoder_lr": "text_encoder_lr",
    "lr_scheduler": "lr_scheduler",
    "lr_warmup_steps": "lr_warmup_steps",
    "optimizer": "optimizer",
    "max_grad_norm": "max_grad_norm",
    "seed": "seed",
    "mixed_precision": "mixed_precision",
    "gradient_checkpointing": "gradient_checkpointing",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "batch_size_per_device": "train_batch_size",
    "noise_offset": "noise_offset",
    "min_snr_gamma": "snr_gamma",
    "ip_noise_gamma": "input_perturbation",
    **{name: name for name in ("loss_type", "huber_c", "huber_schedule", "debiased_estimation")},
    "prior_loss_weight": "prior_loss_weight",
    "network_dropout": "lora_dropout",
    "cache_latents": "cache_latents",
    "caption_dropout_rate": "caption_dropout",
    "flip_aug": "random_flip",
}
MAX_TAGS = 500  # of ss_tag_frequency


def lora_metadata(run: Run, alpha: float, rank: int) -> dict[str, str]:
    """What both files of a LoRA say of it: kohya's ss_ fields and SAI modelspec 1.0.0.

    Other tools show LoRAs and sort them by these. alpha, rank: those of the file.
    """
    config = run.components.config(run.family.denoiser)
    values = kohya_fields(run, alpha, rank) | dataset_fields(run) | modelspec_fields(run)
    values |= base_versions(run.family, config, run.components.config("scheduler"))
    return {name: str(value) for name, value in values.items() if value is not None}


def kohya_fields(run: Run, alpha: float, rank: int) -> dict[str, object]:
    """The settings, under the names that kohya's scripts have for them."""
    args = run.args
    base = Path(args.pretrained_model_name_or_path).name
    is_lora = args.lora_type == "lora"
    values = {f"ss_{name}": vars(args).get(flag) for name, flag in KOHYA_SETTINGS.items()}
    return values | {
        "ss_network_module": "networks.lora" if is_lora else "lycoris.kohya",
        "ss_network_args": None if is_lora else json.dumps({"algo": args.lora_type}),
        "ss_clip_skip": args.clip_skip + 1 if vars(args).get("clip_skip") else None,  # 1: no layer is skipped
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_output_name": output_name(run.args.output_dir),
        "ss_base_model": base,
        "ss_sd_model_name": base,
        "ss_resolution": image_size(run),
        "ss_max_train_steps": run.max_steps,
    }


def dataset_fields(run: Run) -> dict[str, object]:
    """The number of images, where they lay, and how often each tag stands in their captions.

    A set's name is its folder's; where several sets have that one, with the folders around it.
    """
    examples = [example for example in run.data.examples if not example.held_out]
    sets = examples_by_set(examples, run.args)
    values = {
        "ss_num_train_images": len(examples),
        "ss_dataset_dirs": json.dumps({name: describe_set(group) for name, group in sets.items()}),
        "ss_tag_frequency": json.dumps(
            {name: tag_frequency(group) for name, group in sets.items()}, ensure_ascii=False
        ),
    }
    if run.data.class_examples:
        class_sets = examples_by_set(run.data.class_examples, run.args)
        described = {name: describe_set(group) for name, group in class_sets.items()}
        values |= {"ss_num_reg_images": len(run.data.class_examples)}
        values |= {"ss_reg_dataset_dirs": json.dumps(described)}
    return values


def examples_by_set(examples: list[Example], args: argparse.Namespace) -> dict[str, list[Example]]:
    """{the set's name: its examples}; those of no set are class images that the run has drawn."""
    groups: dict[str, list[Example]] = {}
    for example in examples:
        source = set_source(example.set_args) if example.set_args else args.class_data_dir
        groups.setdefault(source, []).append(example)
    return dict(zip(distinct_tails(list(groups)), groups.values(), strict=True))


def describe_set(examples: list[Example]) -> dict[str, int]:
    """What kohya's scripts say of a set."""
    set_args = examples[0].set_args
    return {"n_repeats": set_args.repeats if set_args else 1, "img_count": len(examples)}


def tag_frequency(examples: list[Example]) -> dict[str, int]:
    """How often each tag stands in the captions of a set, the most frequent ones."""
    captions = [caption for example in examples for caption in example.captions]
    tags = [tag.strip() for caption in captions for tag in caption.split(",")]
    return dict(Counter(tag for tag in tags if tag).most_common(MAX_TAGS))


def modelspec_fields(run: Run) -> dict[str, object]:
    """What https://github.com/Stability-AI/ModelSpec asks for, but for what follows from the base."""
    args, name = run.args, output_name(run.args.output_dir)
    values = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": args.run_name or name,
        "modelspec.resolution": "{}x{}".format(*image_size(run)),
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.trigger_phrase": args.trigger_word or None,
    }
    if run.abstractions:
        tokens = [f"{''.join(tokens)} for {word}" for word, tokens in run.abstractions.items()]
        values["modelspec.usage_hint"] = f"new tokens, of {name}_emb.safetensors: {', '.join(tokens)}"
    return values


def image_size(run: Run) -> list[int]:
    """[width, height] of --resolution, which may be one number for both."""
    return (run.args.resolution * 2)[:2]
