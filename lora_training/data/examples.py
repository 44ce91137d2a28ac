"""The images of a set with their captions and masks, as its flags say."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status, summarize_names
from lora_training.data.buckets import bucket_sizes
from lora_training.data.captions import clean_caption
from lora_training.data.datasets_library import dataset_examples
from lora_training.data.folders import IMAGE_SUFFIXES, Example, folder_examples
from lora_training.errors import UserError
from lora_training.seeds import stable_seed

if TYPE_CHECKING:
    import argparse


def load_examples(
    args: argparse.Namespace, buckets: list[tuple] = (), several: bool = False
) -> list[Example]:
    """The images of a set and their captions, as its flags say. Captions are still without trigger word.

    several: there are other sets, so that names begin with the folder's.
    """
    examples, source = (
        source_examples(args),
        args.dataset_name or args.train_data_dir or args.instance_data_dir,
    )
    places = [buckets.index(size) for size in bucket_sizes(args)] if buckets else None
    for example in examples:
        example.own, example.places = args, places
        example.name = f"{Path(source).name}/{example.name}" if several else example.name
    if args.max_train_samples is not None and args.max_train_samples < len(examples):
        rng = random.Random(stable_seed(args.seed, "max_train_samples"))
        examples = [examples[i] for i in sorted(rng.sample(range(len(examples)), args.max_train_samples))]
    fallback = clean_caption(args.instance_prompt or args.default_caption)
    bare = [e for e in examples if not e.captions]
    for example in bare:
        example.captions = [fallback]
    if bare and not fallback:
        if len(bare) == len(examples) and not args.trigger_word:
            raise UserError(
                "no image has a caption: write .txt files, or give --instance_prompt or --default_caption"
            )
        names = summarize_names([e.name for e in bare])
        instead = "the trigger word alone" if args.trigger_word else "the empty one"
        print_status(
            f"warning: {len(bare)} of {len(examples)} images have no caption and train on {instead} ({names})"
        )
    return examples


def source_examples(args: argparse.Namespace, missing: list[str] | None = None) -> list[Example]:
    """All images of the folder or data set that the flags name, with the captions that they have."""
    folder = Path(args.dataset_name or args.train_data_dir or args.instance_data_dir)
    tables = (".arrow", ".parquet", "dataset_dict.json", "state.json", "dataset_infos.json")
    if args.dataset_name and not (
        folder.is_dir() and not any(f.name.endswith(tables) for f in folder.rglob("*"))
    ):
        return dataset_examples(args)
    examples = folder_examples(folder, args.caption_column, missing, args.caption_per_line)
    if not examples:
        raise UserError(f"no images in {folder} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return attach_masks(examples, folder, args.masked_loss)


def attach_masks(examples: list[Example], folder: Path, where: str | None) -> list[Example]:
    """--masked_loss: the examples but those that are masks, each with its own: the alpha channel, the picture
    of the same name in another folder, or the one beside it whose name ends with "-…" or "_…".
    """
    if where is None:
        return examples
    ending, place = (where, folder) if where[0] in "-_" else ("", Path(where))
    if where == "alpha":
        masks = {e.name: e.read for e in examples}
    else:
        files = [
            f
            for f in place.resolve().rglob("*")
            if f.suffix.lower() in IMAGE_SUFFIXES and f.stem.endswith(ending)
        ]
        names = {f.relative_to(place.resolve()).with_suffix("").as_posix(): f for f in files}
        examples = [e for e in examples if Path(folder, e.name).resolve() not in set(files)]
        found = {e.name: names.get(Path(e.name).with_suffix("").as_posix() + ending) for e in examples}
        masks = {name: file.read_bytes for name, file in found.items() if file}
    for example in examples:
        example.read_mask = masks.get(example.name)
    if not masks:
        raise UserError(f"--masked_loss {where}: no mask for any of {len(examples)} images")
    if bare := [e.name for e in examples if e.name not in masks]:
        print_status(
            f"warning: {len(bare)} images have no mask, and count as a whole ({summarize_names(bare)})"
        )
    return examples


def hold_out(examples: list[Example], args: argparse.Namespace) -> None:
    """Marks the share of images that --validation_split keeps from training."""
    if not args.validation_split:
        return
    number = max(1, round(len(examples) * args.validation_split))
    if number >= len(examples):
        raise UserError(
            f"--validation_split {args.validation_split} leaves none of {len(examples)} images to train on"
        )
    for i in random.Random(stable_seed(args.seed, "held-out")).sample(range(len(examples)), number):
        examples[i].held_out = True


def load_sets(args: argparse.Namespace) -> tuple[list[Example], list[Example], list[tuple[int, int]]]:
    """(examples to learn, examples of the class, buckets (width, height) of all) of every set that the flags
    name.
    """
    sets = args.sets or [args]
    buckets = list(dict.fromkeys(size for own in sets for size in bucket_sizes(own)))
    for own in sets:
        own.seed = args.seed  # settled since the sets were read
    loaded = [(own, load_examples(own, buckets, several=len(sets) > 1)) for own in sets]
    learned = [example for own, examples in loaded if not own.is_class for example in examples]
    if not learned:
        config = args.dataset_config
        raise UserError(f"--dataset_config {config}: every set is one of the class: what is to be learned?")
    return learned, [example for own, examples in loaded if own.is_class for example in examples], buckets


def hold_out_sets(examples: list[Example], args: argparse.Namespace) -> None:
    """Marks the images of each set that are kept from training."""
    for own in args.sets or [args]:
        if not own.is_class:
            hold_out([example for example in examples if example.own is own], own)
