"""What earlier runs of a preparation know and have written, so that nothing is done twice.

A file of JSON lines, .prepare/journal.jsonl in the output folder.
"""

from __future__ import annotations

import base64
import json
import threading
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.prepare.file_names import is_inside

if TYPE_CHECKING:
    from pathlib import Path

FACTS = {"format", "mode", "turned", "gps", "sharpness"}  # of a picture's file


def is_measurement(value: object) -> bool:
    """Whether a value is what `measure_picture` gives."""
    try:
        (width, height), (bits, reliable, colors) = value["size"], value["look"]
        base64.b64decode(colors, validate=True)
        numbers_fit = all(isinstance(number, int) for number in (width, height, bits, reliable))
        return numbers_fit and min(width, height) > 0 and value["facts"].keys() >= FACTS
    except (TypeError, ValueError, KeyError, AttributeError):
        return False


def is_written_image(value: object) -> bool:
    """Whether a value is what is noted of an image that was written, or None for one that was removed."""
    if value is None:
        return True
    if not isinstance(value, dict) or not value.keys() >= {"key", "file", "bytes"}:
        return False
    return is_inside(value["file"]) and isinstance(value["bytes"], int)


def is_text(value: object) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_truth_value(value: object) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool)


def is_list_of_texts(value: object) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


# {kind of an entry: whether its value can be from here}. A journal that was edited or damaged must lead to
# no other place, and to no error.
CHECKS = {
    "name": is_inside,  # source file -> its stem in the output folder
    "look": is_measurement,  # SHA-256 of a file -> what it shows
    "image": is_written_image,  # stem -> the image that was written
    "text": is_list_of_texts,  # stem -> the captions that were written
    "auto_caption": is_text,  # picture and settings -> caption
    "auto_tagging": is_text,  # picture and settings -> tags
    "masks": is_truth_value,  # picture and settings -> whether something was found in it
}


class Journal:
    """The entries of earlier runs and of this one; each is a JSON line [kind, key, value], written at once.

    The last line with a kind and key counts. One that an interruption cut off is dropped, and so is one that
    this program can't have written; what it was about is done anew.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.entries: dict[tuple[str, str], object] = {}
        self.lock = threading.Lock()
        end, damaged = self.load(file) if file.exists() else (0, 0)
        if damaged:
            what = "are damaged, or not from here: what they were about is done anew"
            print_status(f"note: {damaged} lines of {file} {what}")
        self.file = open(file, "ab")  # noqa: SIM115
        self.file.truncate(end)

    def load(self, file: Path) -> tuple[int, int]:
        """Reads the entries. Returns (where the last whole line ends, number of damaged lines)."""
        end = damaged = 0
        with file.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    kind, key, value = json.loads(line)
                    is_valid = CHECKS[kind](value) and isinstance(key, str)
                except (ValueError, TypeError, KeyError, RecursionError):
                    is_valid = False
                if is_valid:
                    self.entries[kind, key] = value
                else:
                    damaged += 1
        return end, damaged

    def get(self, kind: str, key: str):
        """The value of an entry, or None."""
        return self.entries.get((kind, key))

    def put(self, kind: str, key: str, value: object) -> None:
        """Notes an entry, if it isn't noted yet. Threads may call this at the same time."""
        with self.lock:
            if self.entries.get((kind, key)) != value:
                self.entries[kind, key] = value
                self.file.write((json.dumps([kind, key, value]) + "\n").encode())
                self.file.flush()

    def items(self, kind: str) -> list[tuple[str, object]]:
        """(key, value) of all entries of a kind, as they are now."""
        return [(key, value) for (entry_kind, key), value in self.entries.items() if entry_kind == kind]
