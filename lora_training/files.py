"""Files written in one step, checkpoints found, text files read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

from lora_training.console import print_status
from lora_training.errors import UserError, one_line


def sha256_of(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Makes sure that a file's or a folder's content is on the disk; Windows flushes no folder, and no file
    open for reading.
    """
    folder = path.is_dir()
    with contextlib.suppress(PermissionError) if folder else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_file(part: Path, final: Path) -> None:
    """Gives a file or folder its name.

    On Windows a scanner may hold it for a moment: it's tried again for some seconds.
    """
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(part, final)
        time.sleep(0.25)
    os.replace(part, final)


@contextlib.contextmanager
def atomic_write(target: Path):
    """Gives a path to write a file or a folder to; `target` appears in one step, when all of it is written.

    A folder takes no place but that of an empty folder.
    """
    part = target.with_name(f".{os.getpid()}.{target.name}")
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


@contextlib.contextmanager
def staging_folder(output: Path, what: str, whole: bool = False):
    """Gives a folder to write to.

    Its files then appear in the output folder, each in one step; or, with `whole`, as the folder `what`, in
    one step. All of it is on the disk by then. Errors: UserError for a full one.
    """
    from safetensors import SafetensorError

    part = output / f".{what}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for file in sorted(part.iterdir()):
            flush_to_disk(file)
            if not whole:
                move_result(file, output / file.name)
        if whole:
            flush_to_disk(part)
            shutil.rmtree(output / what, ignore_errors=True)
            replace_file(part, output / what)
            flush_to_disk(output)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own, for a full disk
        raise UserError(
            f"{what} could not be written to {output} ({error}){last_checkpoint_note(output)}"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def move_result(file: Path, target: Path) -> None:
    """Moves a result to its place in one step; to a name of its own if Windows has the place open in another
    program.
    """
    try:
        replace_file(file, target)
    except PermissionError:
        spare = target.with_name(f"{target.stem}-{time.strftime('%Y%m%d-%H%M%S')}{target.suffix}")
        os.replace(file, spare)
        print_status(f"warning: {target} is open in another program: the new one is {spare.name}")


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, the latest first."""
    numbers = {p: p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*") if p.is_dir()}
    ours = [
        p for p, number in numbers.items() if number.isascii() and number.isdigit()
    ]  # not checkpoint-backup-900
    return sorted(ours, key=lambda p: int(numbers[p]), reverse=True)


def last_checkpoint_note(output: Path) -> str:
    """The end of an error's line: which checkpoint is the last, if there is one."""
    return next((f"; the last good checkpoint is {folder.name}" for folder in list_checkpoints(output)), "")


def read_metrics(output: str) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    rows, file = [], Path(output) / "metrics.jsonl"
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):  # the last one, where a run was killed
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def read_config_file(file: str, flag: str = "--config", kind: type = dict):
    """The content of a YAML or JSON file, a dict or a list.

    Errors: UserError that names the flag if it is anything else.
    """
    text = read_text_file(file, flag)
    import yaml

    try:
        values = yaml.safe_load(text)  # JSON is YAML too
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # a date that is none; lists in lists in lists
        raise UserError(f"{flag} {file}: not YAML or JSON: {one_line(error)}") from None
    if not isinstance(values, kind):
        expected = "flag names and values" if kind is dict else "a list"
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


def read_text_file(file: str, flag: str) -> str:
    """The text of a file that a flag names."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file}: {getattr(error, 'strerror', error)}") from None
