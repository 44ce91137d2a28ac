"""Images and captions of a `datasets` data set."""

from __future__ import annotations

import functools
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.console import print_status, printable
from lora_training.data.captions import as_captions
from lora_training.data.folders import Example
from lora_training.data.metadata_files import CAPTION_COLUMNS
from lora_training.errors import UserError, one_line

if TYPE_CHECKING:
    import argparse

TABLE_KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
}  # of files: the builder of `datasets` that reads them


def dataset_examples(args: argparse.Namespace) -> list[Example]:
    """Images and captions of a `datasets` data set: from the hub, a local folder, or a Python builder.

    Errors: UserError for what can't be loaded, and for columns that it hasn't.
    """
    import datasets

    table = load_table(args)
    for flag in ("image_column", "caption_column"):
        if vars(args)[flag] not in (None, *table.column_names):
            columns = ", ".join(table.column_names)
            raise UserError(f"--{flag} {vars(args)[flag]}: the data set has the columns {columns}")
    caption_column = args.caption_column or next(
        (column for column in CAPTION_COLUMNS if column in table.column_names), None
    )
    table = table.cast_column(args.image_column, datasets.Image(decode=False))
    texts = table[caption_column] if caption_column else [None] * len(table)
    # a spawned worker can take it along
    reader = functools.partial(read_cell, table, args.image_column, table_folders(args.dataset_name))
    examples = [
        Example(f"row {row}", as_captions(text), functools.partial(reader, row))
        for row, text in enumerate(texts)
    ]
    if args.masked_loss not in (None, "alpha"):
        raise UserError(
            f"--masked_loss {args.masked_loss}: a data set's masks are its pictures' alpha channels: alpha"
        )
    for example in examples if args.masked_loss else ():
        example.read_mask = example.read
    return examples


def load_table(args: argparse.Namespace):
    """The split of --dataset_name. Errors: UserError."""
    import datasets

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # an error is raised too
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, split = args.dataset_name, args.dataset_split
    try:
        if name.endswith(".py"):
            return builder_dataset(args)
        if Path(name).suffix in TABLE_KINDS and Path(name).is_file():
            kind, options = TABLE_KINDS[Path(name).suffix], {"cache_dir": args.cache_dir}
            return choose_saved(datasets.load_dataset(kind, data_files=name, **options), args)
        if any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json")):
            return choose_saved(datasets.load_from_disk(name), args)
        return datasets.load_dataset(name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        flags = ("dataset_name", "dataset_config_name", "dataset_split")
        given = " ".join(
            f"--{flag} {vars(args)[flag]}" for flag in flags if vars(args)[flag] not in (None, "train")
        )
        raise UserError(f"{given}: {one_line(error)}") from None


def choose_saved(saved, args: argparse.Namespace):
    """The split of a data set on the disk, a file or a folder of one table or several. Errors: UserError."""
    split, config = args.dataset_split, args.dataset_config_name
    if config:
        raise UserError(f"--dataset_config_name {config}: {args.dataset_name} has none: leave it out")
    splits = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved, "train": saved}
    if split not in splits:
        raise UserError(f"--dataset_split {split}: {args.dataset_name} has {', '.join(splits)}")
    return splits[split]


def files_of_split(folder: Path, split: str) -> set[str]:
    """The names in a folder of images that `datasets` takes for a split. Errors: UserError for no split."""
    import datasets

    builder = datasets.load_dataset_builder("imagefolder", data_dir=str(folder.resolve()))
    splits = {str(name): files for name, files in builder.config.data_files.items()}
    names = ", ".join(splits)
    if split not in splits:
        way_out = "--train_data_dir reads all of it"
        raise UserError(f"--dataset_split {split}: {folder} has the splits {names}; {way_out}")
    print_status(f"{folder} has the splits {names}: {split} is read")
    return {printable(Path(file).relative_to(folder.resolve()).as_posix()) for file in splits[split]}


def table_folders(name: str) -> list[Path]:
    """The folders to which paths in a data set are relative: those of its tables, else the working folder."""
    place = Path(name)
    tables = [file for file in place.rglob("*") if file.suffix in TABLE_KINDS] if place.is_dir() else []
    folders = [place.parent if place.is_file() else place, *(file.parent for file in tables)]
    return list(dict.fromkeys([*folders, Path()]))


def read_cell(table, column: str, folders: list[Path], row: int) -> bytes:
    """The bytes of an image in a data set. Errors: ValueError for a cell without one."""
    cell = table[row][column] or {}
    if cell.get("bytes") is not None:
        return cell["bytes"]
    if not cell.get("path"):
        raise ValueError("no picture in this row")
    paths = [path for folder in folders if (path := folder / cell["path"]).is_file()]
    if not paths:
        raise ValueError(f"{cell['path']}: no such file")
    return paths[0].read_bytes()


def builder_dataset(args: argparse.Namespace):
    """The split of a data set whose builder class stands in a local Python file.

    The `datasets` package no longer runs such files, so the file that the user names is imported here.
    """
    import datasets

    path = Path(args.dataset_name)
    if not path.is_file():
        raise UserError(f"--dataset_name {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    classes = [value for value in classes if value.__module__ == module.__name__]  # not what it imports
    builders = [value for value in classes if issubclass(value, datasets.DatasetBuilder)]
    if len(builders) != 1:
        raise UserError(f"--dataset_name {path}: expected one datasets builder class, found {len(builders)}")
    data_dir = str(Path(args.train_data_dir).resolve()) if args.train_data_dir else None
    with tempfile.TemporaryDirectory() as cache:
        builder = builders[0](cache_dir=cache, config_name=args.dataset_config_name, data_dir=data_dir)
        builder.download_and_prepare()
        return builder.as_dataset(split=args.dataset_split, in_memory=True)
