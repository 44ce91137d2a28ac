"""Several data sets in one training: --dataset_config and kohya's folders."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from lora_training.cli.checks import check_args
from lora_training.cli.kohya_sets import is_kohya_file, subset_entries
from lora_training.cli.parser import config_to_argv
from lora_training.errors import UserError
from lora_training.files import read_config_file

# what a set of --dataset_config may say: flags, and what is its own
# fmt: off
SET_KEYS = (
    "train_data_dir", "dataset_name", "dataset_config_name", "dataset_split", "image_column",
    "caption_column", "instance_data_dir", "instance_prompt", "default_caption", "trigger_word", "repeats",
    "caption_dropout", "caption_per_line", "masked_loss", "unmasked_weight", "validation_split",
    "max_train_samples", "resolution", "aspect_ratio_buckets", "weight", "resolutions", "class_prompt",
    "shuffle_tags", "tag_separator", "tag_dropout", "keep_tokens", "caption_extension",
    "caption_wildcards",
)
# fmt: on


def set_entries(args: argparse.Namespace) -> list[tuple[str, dict]]:
    """(where it stands, keys and values) of each set of --dataset_config, or of a folder as kohya's."""
    if args.kohya_folders and args.train_data_dir and Path(args.train_data_dir).is_dir():
        return kohya_entries(Path(args.train_data_dir))
    return config_entries(args.dataset_config, args) if args.dataset_config else []


def kohya_entries(folder: Path) -> list[tuple[str, dict]]:
    """The sets of a folder that holds folders such as `10_sks dog`: repeats and caption."""
    entries = []
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if match := re.fullmatch(r"(\d+)_(.+)", inner.name):
            settings = {"train_data_dir": str(inner), "repeats": int(match[1]), "default_caption": match[2]}
            entries.append((str(inner), settings))
    if not entries:
        raise UserError(f"--kohya_folders: no folder such as 10_sks dog in {folder}")
    return entries


def config_entries(file: str, args: argparse.Namespace) -> list[tuple[str, dict]]:
    """The sets of a --dataset_config file; one with several resolutions is several sets."""
    content, entries = read_config_file(file, "--dataset_config", object), []
    if is_kohya_file(content):
        return subset_entries(content, file, args)
    if not isinstance(content, list):
        expected = "a list of sets, or kohya's datasets"
        raise UserError(f"--dataset_config {file}: expected {expected}, found {type(content).__name__}")
    for number, entry in enumerate(content, 1):
        where = f"--dataset_config {file}, set {number}"
        unknown = [key for key in entry if key not in SET_KEYS] if isinstance(entry, dict) else [entry]
        if unknown:
            raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(SET_KEYS)}")
        sizes = entry.pop("resolutions", None) or [entry.get("resolution")]
        sizes = sizes if isinstance(sizes, list) else [sizes]
        entries += [(where, entry | ({"resolution": size} if size else {})) for size in sizes]
    if not entries:
        raise UserError(f"--dataset_config {file}: no set in it")
    return entries


def read_set(parser, args: argparse.Namespace, where: str, entry: dict) -> argparse.Namespace:
    """The flags of one set: the run's, and what its entry says. Errors: UserError that names the set."""
    entry = dict(entry)
    weight, class_prompt = entry.pop("weight", 1.0), entry.pop("class_prompt", None)
    entry |= {"default_caption": class_prompt} if class_prompt else {}
    blank = {"dataset_config": None, "kohya_folders": False, "train_data_dir": None, "weight": weight}
    own = argparse.Namespace(**vars(args) | blank | {"is_class": class_prompt is not None})
    parser.parse_args(config_to_argv(parser, entry, where), own)
    try:
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"weight: {weight!r} is no number from 0 on")
        check_args(own, set(entry), parser, typed=set(entry))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return own
