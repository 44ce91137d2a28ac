"""Files written in one step, checkpoints found, settings and headers read."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import threading
import time
import tomllib
from pathlib import Path

from lora_training.console import print_status
from lora_training.errors import UserError, one_line

UNFINISHED = re.compile(r"\.\d+\.\d+\..+")  # names of what is being written


def output_name(output_dir: str | Path) -> str:
    """The name of an output folder, after which its files are named."""
    return Path(output_dir).resolve().name


def sha256_of(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.cache
def umask() -> int:
    """The rights that files are made without. It can be read only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush_to_disk(path: Path) -> None:
    """Makes sure that a file's or a folder's content is on the disk.

    Windows flushes no folder, and no file open for reading.
    """
    is_folder = path.is_dir()
    with contextlib.suppress(PermissionError) if is_folder else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_file(source: Path, target: Path) -> None:
    """Renames a file or folder; for some seconds, because a scanner on Windows may hold it.

    Files get the rights that any file is made with here: safetensors makes them for their owner alone.
    """
    for file in source.rglob("*") if source.is_dir() else [source]:
        with contextlib.suppress(OSError):  # a file system that knows no rights
            if file.is_file():
                file.chmod(0o666 & ~umask())
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.25)
    os.replace(source, target)


@contextlib.contextmanager
def atomic_write(target: Path):
    """Gives a path to write a file or a folder to; `target` appears in one step, when all of it is written.

    A folder takes no place but that of an empty folder. Threads and processes may write the same file.
    """
    part = target.with_name(f".{os.getpid()}.{threading.get_ident()}.{target.name}")
    try:
        yield part
        if part.is_dir() and target.is_dir():
            target.rmdir()
        replace_file(part, target)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes files below a folder that `atomic_write` was writing when its process was killed."""
    for file in folder.rglob(".*"):
        if UNFINISHED.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def staging_folder(output: Path, what: str, whole: bool = False):
    """Gives a folder to write to, whose files then appear in the output folder, each in one step.

    whole: they appear as the folder `what`, all in one step. Everything is on the disk by then. Errors:
    UserError for a full one.
    """
    from safetensors import SafetensorError

    staging = output / f".{what}.part"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        for file in sorted(staging.iterdir()):
            flush_to_disk(file)
            if not whole:
                move_result(file, output / file.name)
        if whole:
            flush_to_disk(staging)
            shutil.rmtree(output / what, ignore_errors=True)
            replace_file(staging, output / what)
            flush_to_disk(output)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own, for a full disk
        note = last_checkpoint_note(output)
        raise UserError(f"{what} could not be written to {output} ({error}){note}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def move_result(file: Path, target: Path) -> None:
    """Moves a result to its place in one step, or beside it if a program on Windows has that one open."""
    try:
        replace_file(file, target)
    except PermissionError:
        spare = target.with_name(f"{target.stem}-{time.strftime('%Y%m%d-%H%M%S')}{target.suffix}")
        os.replace(file, spare)
        print_status(f"warning: {target} is open in another program: the new one is {spare.name}")


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the latest first."""
    checkpoints = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isascii() and number.isdigit():  # not checkpoint-backup-900
            checkpoints[int(number)] = path
    return [checkpoints[number] for number in sorted(checkpoints, reverse=True)]


def last_checkpoint_note(output: Path) -> str:
    """The end of an error's line: which checkpoint is the last, if there is one."""
    checkpoints = list_checkpoints(output)
    return f"; the last good checkpoint is {checkpoints[0].name}" if checkpoints else ""


def read_metrics(output: str) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    rows, file = [], Path(output) / "metrics.jsonl"
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):  # the last one, where a run was killed
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def read_config_file(file: str, flag: str = "--config", kind: type = dict):
    """The content of a YAML, JSON or TOML file: a dict or a list, or what else `kind` says.

    Errors: UserError that names the flag if it is anything else.
    """
    language = "TOML" if file.lower().endswith(".toml") else "YAML or JSON"
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{flag} {file}: not {language}: not UTF-8 text") from None
    import yaml  # not before the file is known to be there

    try:
        # JSON is YAML too
        values = (tomllib.loads(text) or None) if language == "TOML" else yaml.safe_load(text)
    # an impossible date; lists in lists in lists
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{flag} {file}: not {language}: {one_line(error)}") from None
    if values is None:
        raise UserError(f"{flag} {file} is empty")
    if not isinstance(values, kind):
        expected = "names and values" if kind is dict else "a list"
        raise UserError(f"{flag} {file}: expected {expected}, found {type(values).__name__}")
    return values


def read_json_file(file: Path) -> dict:
    """The object in a JSON file.

    Errors: UserError that names a damaged file, OSError for one that isn't there.
    """
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: damaged ({one_line(error)})") from None


def read_safetensors_header(file: Path) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...]]]]:
    """(metadata, {tensor: (type, shape)}) of a safetensors file, no tensor of it read; types such as "BF16".

    Errors: SafetensorError or OSError for another kind of file, or a damaged one.
    """
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        tensors = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        types = {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in tensors.items()}
        return opened.metadata() or {}, types


def read_text_file(file: str, flag: str) -> str:
    """The text of a file that a flag names."""
    try:
        return Path(file).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file}: {getattr(error, 'strerror', error)}") from None
