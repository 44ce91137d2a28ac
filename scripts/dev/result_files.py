"""Results kept as lines of JSON, and tables between the marks of a Markdown page."""

from __future__ import annotations

import json
from pathlib import Path


def append_result(file: Path, row: dict) -> None:
    """Adds a line to a file of results."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")


def replace_between(text: str, marks: tuple[str, str], content: str) -> str:
    """The text with other content between its two marks. Errors: ValueError or IndexError without them."""
    before, rest = text.split(marks[0], 1)
    after = rest.split(marks[1], 1)[1]
    return f"{before}{marks[0]}\n{content}\n{marks[1]}{after}"
