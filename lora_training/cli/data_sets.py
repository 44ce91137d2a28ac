"""Several data sets in one training: --dataset_config and kohya's folders."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from lora_training.cli.flag_groups import SET_KEYS
from lora_training.cli.parser import config_to_argv
from lora_training.cli.rules import check_args
from lora_training.errors import UserError
from lora_training.files import read_config_file


def set_entries(args: argparse.Namespace) -> list[tuple[str, dict]]:
    """(where it stands, keys and values) of each set of --dataset_config, or of a folder as kohya's scripts
    have it.
    """
    if args.kohya_folders and args.train_data_dir and Path(args.train_data_dir).is_dir():
        folders = sorted(f for f in Path(args.train_data_dir).iterdir() if f.is_dir())
        named = [
            (folder, *match.groups())
            for folder in folders
            if (match := re.fullmatch(r"(\d+)_(.+)", folder.name))
        ]
        if not named:
            raise UserError(f"--kohya_folders: no folder such as 10_sks dog in {args.train_data_dir}")
        keys = "train_data_dir", "repeats", "default_caption"
        return [(str(f), dict(zip(keys, (str(f), int(n), text), strict=True))) for f, n, text in named]
    if not args.dataset_config:
        return []
    out = []
    for number, entry in enumerate(read_config_file(args.dataset_config, "--dataset_config", list), 1):
        where = f"--dataset_config {args.dataset_config}, set {number}"
        wrong = [key for key in entry if key not in SET_KEYS.split()] if isinstance(entry, dict) else [entry]
        if wrong:
            raise UserError(f"{where}: unknown key {wrong[0]!r}; known are {', '.join(SET_KEYS.split())}")
        sizes = entry.pop("resolutions", None) or [entry.get("resolution")]
        sizes = sizes if isinstance(sizes, list) else [sizes]
        out += [(where, entry | ({"resolution": size} if size else {})) for size in sizes]
    if not out:
        raise UserError(f"--dataset_config {args.dataset_config}: no set in it")
    return out


def read_set(parser, args: argparse.Namespace, where: str, entry: dict) -> argparse.Namespace:
    """The flags of one set: the run's, and what its entry says. Errors: UserError that names the set."""
    entry = dict(entry)
    weight, about_class = entry.pop("weight", 1.0), entry.pop("class_prompt", None)
    entry |= {"default_caption": about_class} if about_class else {}
    blank = {"dataset_config": None, "kohya_folders": False, "train_data_dir": None, "weight": weight}
    own = argparse.Namespace(**vars(args) | blank | {"is_class": about_class is not None})
    parser.parse_args(config_to_argv(parser, entry, where), own)
    try:
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"weight: {weight!r} is no number from 0 on")
        check_args(own, set(entry), parser)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return own
