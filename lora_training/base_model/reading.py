"""Reading a base's files, and naming what can't be read."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
from typing import TYPE_CHECKING

from lora_training.errors import UserError, one_line

if TYPE_CHECKING:
    from pathlib import Path


@contextlib.contextmanager
def reading_base(what: str):
    """Names the part of the base that can't be read inside, whatever the libraries raise then.

    Errors: UserError; those that name a flag already, or lack memory, pass.
    """
    try:
        yield
    except Exception as error:
        lacks_memory = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
        if lacks_memory or str(error).startswith("--"):
            raise
        reason = one_line(error) or type(error).__name__
        raise UserError(f"--pretrained_model_name_or_path: {what} can't be loaded: {reason}") from None


def read_json(file: Path) -> dict:
    """A JSON object of the base. Errors: UserError that names the file."""
    with reading_base(str(file)):
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it holds no JSON object")
        return Configuration(values)


class Configuration(dict):
    """A part's settings: a missing one is an error, for the file is damaged or another part's."""

    def __missing__(self, name: str):
        raise UserError(f"--pretrained_model_name_or_path: a configuration of this base has no {name}")


def import_class(library: str, name: str):
    """A class that a model_index.json names, of diffusers or transformers."""
    return getattr(importlib.import_module(library), name)


def fingerprint(files: list[Path]) -> str:
    """A hash of files' sizes and of 64 pieces of 64 KiB of each: enough to tell any two trainings apart."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}|".encode())
        with file.open("rb") as stream:
            for k in range(64 if size > 65536 else 1):
                stream.seek(max(0, (size - 65536) * k // 63))
                digest.update(stream.read(65536))
    return digest.hexdigest()
