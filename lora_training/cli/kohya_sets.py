"""A dataset.toml of kohya's scripts as the sets of --dataset_config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.errors import UserError, one_line

if TYPE_CHECKING:
    import argparse

SET_NAMES = {  # what kohya's scripts call a set's flags
    "image_dir": "train_data_dir",
    "num_repeats": "repeats",
    "class_tokens": "default_caption",
    "caption_extension": "caption_extension",
    "keep_tokens": "keep_tokens",
    "shuffle_caption": "shuffle_tags",
    "caption_separator": "tag_separator",
    "caption_dropout_rate": "caption_dropout",
    "caption_tag_dropout_rate": "tag_dropout",
    "resolution": "resolution",
    "validation_split": "validation_split",
}
SWITCHES = {  # those that are on or off: the flag and its value where they are on
    "enable_bucket": ("aspect_ratio_buckets", "auto"),
    "alpha_mask": ("masked_loss", "alpha"),
    "enable_wildcard": ("caption_wildcards", True),
    "is_reg": ("is_class", True),
}
RUN_NAMES = {  # what stands in such a file and is the whole run's here, or chosen here without a flag
    "batch_size": "--train_batch_size",
    "flip_aug": "--random_flip",
    "color_aug": "--color_jitter",
    "random_crop": "the default; --center_crop turns it off",
    **dict.fromkeys(
        ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale"),
        "--aspect_ratio_buckets",
    ),
}
OF_TAGS = ("keep_tokens", "tag_separator")  # of no effect where tags stay as they are


def is_kohya_file(content: object) -> bool:
    """Whether the content of a --dataset_config file is of kohya's shape: datasets with subsets."""
    return isinstance(content, dict) and "datasets" in content


def subset_entries(content: dict, file: str, args: argparse.Namespace) -> list[tuple[str, dict]]:
    """(where it stands, the flags of a set) of each subset: those of [general], of its dataset and its own.

    Errors: UserError for what is not of that shape, or has no meaning here.
    """
    where, entries, others = f"--dataset_config {file}", [], set()
    general = as_table(content.get("general", {}), f"{where}, general")
    for number, dataset in enumerate(as_tables(content["datasets"], f"{where}, datasets"), 1):
        place = f"{where}, dataset {number}"
        for index, subset in enumerate(as_tables(dataset.get("subsets"), f"{place}, subsets"), 1):
            own = {key: value for key, value in dataset.items() if key != "subsets"}
            options = general | own | subset
            others |= {key for key in options.keys() & RUN_NAMES if str(options[key]) not in ("False", "1")}
            entries.append((f"{place}, subset {index}", set_entry(options, f"{place}, subset {index}", args)))
    if others:
        flags = ", ".join(f"{key} ({RUN_NAMES[key]})" for key in sorted(others))
        print_status(f"note: {file}: of the whole run here, and not taken from the file: {flags}")
    return entries


def set_entry(options: dict, where: str, args: argparse.Namespace) -> dict:
    """A subset's options as the keys of a set. Errors: UserError for one that has no meaning here."""
    if unknown := [key for key in options if key not in (*SET_NAMES, *SWITCHES, *RUN_NAMES)]:
        known = ", ".join((*SET_NAMES, *SWITCHES))
        raise UserError(f"{where}: {unknown[0]} is not understood here: leave it out; understood are {known}")
    if not options.get("image_dir"):
        raise UserError(f"{where}: has no image_dir, the folder of its pictures")
    entry = {SET_NAMES[key]: value for key, value in options.items() if key in SET_NAMES}
    entry |= dict(flag for key, flag in SWITCHES.items() if options.get(key))
    if entry.pop("is_class", False):
        entry["class_prompt"] = entry.pop("default_caption", "")
    if isinstance(entry.get("resolution"), str):
        entry["resolution"] = [side.strip() for side in entry["resolution"].split(",")]
    changes_tags = (
        entry.get("shuffle_tags") or entry.get("tag_dropout") or args.shuffle_tags or args.tag_dropout
    )
    return {key: value for key, value in entry.items() if changes_tags or key not in OF_TAGS}


def as_table(value: object, where: str) -> dict:
    """Names and values of a file. Errors: UserError for anything else."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected names and values, found {one_line(repr(value), 80)}")
    return value


def as_tables(value: object, where: str) -> list[dict]:
    """A list of names and values, not empty. Errors: UserError for anything else."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: expected a list, found {one_line(repr(value), 80)}")
    return [as_table(each, where) for each in value]
