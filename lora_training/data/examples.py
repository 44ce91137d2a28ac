"""The images of a set with their captions and masks, as its flags say."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status, summarize_names
from lora_training.data.buckets import bucket_sizes
from lora_training.data.captions import clean_caption, insert_trigger, without_marks
from lora_training.data.emphasis import all_variants
from lora_training.data.folders import IMAGE_SUFFIXES, Example, folder_examples
from lora_training.data.hf_datasets import dataset_examples, files_of_split
from lora_training.data.masks import attach_masks
from lora_training.errors import UserError
from lora_training.seeds import stable_seed

if TYPE_CHECKING:
    import argparse

DATASET_FILES = (".arrow", ".parquet", "dataset_dict.json", "state.json", "dataset_infos.json")

# what `datasets` takes for splits
SPLIT_FOLDERS = (
    *("train", "training", "validation", "valid", "dev", "val"),
    *("test", "testing", "eval", "evaluation"),
)


def load_sets(args: argparse.Namespace) -> tuple[list[Example], list[Example], list[tuple[int, int]]]:
    """(examples to learn, examples of the class, buckets (width, height)) of the sets that the flags name."""
    sets = args.sets or [args]
    buckets = list(dict.fromkeys(size for set_args in sets for size in bucket_sizes(set_args)))
    learned, of_class = [], []
    for set_args, label in zip(sets, set_labels(sets), strict=True):
        set_args.seed = args.seed  # decided since the sets were read
        examples = load_examples(set_args, buckets, label)
        (of_class if set_args.is_class else learned).extend(examples)
    if not learned:
        config = args.dataset_config
        raise UserError(f"--dataset_config {config}: every set is one of the class: what is to be learned?")
    return learned, of_class, buckets


def set_labels(sets: list[argparse.Namespace]) -> list[str]:
    """What the names of each set's images begin with: of its folder's path, as much as tells it from others.

    Nothing where there is one set.
    """
    if len(sets) == 1:
        return [""]
    return [f"{tail}/" for tail in distinct_tails([set_source(each) for each in sets])]


def set_source(args: argparse.Namespace) -> str:
    """The folder or data set that a set's flags name."""
    return args.dataset_name or args.train_data_dir or args.instance_data_dir


def distinct_tails(paths: list[str]) -> list[str]:
    """Of each path as much of its end as tells it from the others; the same path has the same."""
    whole = [os.path.abspath(path) for path in paths]
    for depth in itertools.count(1):
        tails = ["/".join(Path(path).parts[-depth:]) for path in whole]
        if len(set(tails)) == len(set(whole)):
            return tails


def load_examples(
    args: argparse.Namespace, buckets: list[tuple[int, int]] = (), label: str = ""
) -> list[Example]:
    """The images of a set and their captions, still without trigger word.

    buckets: those of all sets. label: what their names begin with.
    """
    examples = source_examples(args)
    numbers = [buckets.index(size) for size in bucket_sizes(args)] if buckets else None
    for example in examples:
        example.set_args, example.bucket_numbers = args, numbers
        example.name = label + example.name
    if args.max_train_samples is not None and args.max_train_samples < len(examples):
        rng = random.Random(stable_seed(args.seed, "max_train_samples"))
        chosen = sorted(rng.sample(range(len(examples)), args.max_train_samples))
        examples = [examples[index] for index in chosen]
    fill_captions(examples, args)
    for example in examples:
        resolve_marks(example, args)
    return examples


def fill_captions(examples: list[Example], args: argparse.Namespace) -> None:
    """Gives examples without a caption that of --instance_prompt or --default_caption, or the empty one."""
    caption = clean_caption(args.instance_prompt or args.default_caption)
    uncaptioned = [example for example in examples if not example.captions]
    for example in uncaptioned:
        example.captions = [caption]
    if caption or not uncaptioned:
        return
    if len(uncaptioned) == len(examples) and not args.trigger_word:
        way_out = "write .txt files, or give --instance_prompt or --default_caption"
        raise UserError(f"no image has a caption: {way_out}")
    names = summarize_names([example.name for example in uncaptioned])
    instead = "the trigger word alone" if args.trigger_word else "the empty one"
    count = f"{len(uncaptioned)} of {len(examples)}"
    print_status(f"warning: {count} images have no caption and train on {instead} ({names})")


def resolve_marks(example: Example, args: argparse.Namespace) -> None:
    """Takes [trigger], ||| and --caption_wildcards' braces in an example's captions for what they stand for.

    Errors: UserError for [trigger] without a trigger word, but for images of the class.
    """
    trigger = args.trigger_word or ("" if args.is_class else None)
    where = f"the caption of {example.name}"
    captions = [insert_trigger(text, trigger, where) for text in example.captions]
    if args.caption_wildcards:
        captions = all_variants(captions, where)
    example.captions = [without_marks(caption, args) for caption in captions]
    if args.captions_vary:
        example.marked_captions = captions


def source_examples(
    args: argparse.Namespace, missing: list[str] | None = None, suffixes: set[str] = IMAGE_SUFFIXES
) -> list[Example]:
    """All images of the folder or data set that the flags name, with the captions that they have.

    missing, suffixes: as `folder_examples` takes them.
    """
    folder = Path(set_source(args))
    if args.dataset_name and not is_image_folder(folder, args):
        return dataset_examples(args)
    text = {"per_line": args.caption_per_line, "extension": args.caption_extension}
    examples = folder_examples(folder, args.caption_column, missing, suffixes=suffixes, **text)
    if args.dataset_name:
        examples = examples_of_split(examples, folder, args)
    if not examples and not is_image_folder(folder, args):
        raise UserError(
            f"no images in {folder}, but tables of a data set: --dataset_name {folder} reads them"
        )
    if not examples:
        raise UserError(f"no images in {folder} (looked for {', '.join(sorted(suffixes))})")
    return attach_masks(examples, folder, args.masked_loss, suffixes)


def is_image_folder(folder: Path, args: argparse.Namespace) -> bool:
    """Whether a local folder holds images, and neither a `datasets` data set nor a description of one."""
    if not folder.is_dir() or (args.dataset_config_name and (folder / "README.md").is_file()):
        return False
    return not any(file.name.endswith(DATASET_FILES) for file in folder.rglob("*"))


def examples_of_split(examples: list[Example], folder: Path, args: argparse.Namespace) -> list[Example]:
    """The images of --dataset_split, where a folder has folders such as train and test; else all of them.

    Errors: UserError for a split, a configuration or an image column that the folder doesn't have.
    """
    unused = {"dataset_config_name": None, "image_column": "image"}
    in_root = any("/" not in example.name for example in examples)
    names = {path.name.lower() for path in folder.iterdir() if path.is_dir()}
    has_splits = not in_root and bool(names & set(SPLIT_FOLDERS))
    if not has_splits:
        unused["dataset_split"] = "train"
    for flag, usual in unused.items():
        if vars(args)[flag] not in (usual, None):
            what = f"{folder} is a folder of pictures and has no such thing"
            raise UserError(f"--{flag} {vars(args)[flag]}: {what}: leave it out")
    if not has_splits:
        return examples
    files = files_of_split(folder, args.dataset_split)
    return [example for example in examples if example.name in files]


def hold_out_sets(examples: list[Example], args: argparse.Namespace) -> None:
    """Marks the images of each set that are kept from training."""
    for set_args in args.sets or [args]:
        if not set_args.is_class:
            hold_out([example for example in examples if example.set_args is set_args], set_args)


def hold_out(examples: list[Example], args: argparse.Namespace) -> None:
    """Marks the share of a set's images that --validation_split keeps from training."""
    if not args.validation_split:
        return
    number = max(1, round(len(examples) * args.validation_split))
    if number >= len(examples):
        split = f"--validation_split {args.validation_split}"
        raise UserError(f"{split} leaves none of {len(examples)} images to train on")
    rng = random.Random(stable_seed(args.seed, "held-out"))
    for index in rng.sample(range(len(examples)), number):
        examples[index].held_out = True
