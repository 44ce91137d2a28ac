"""metadata.jsonl and metadata.csv: which file has which caption."""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING

from lora_training.console import printable
from lora_training.data.captions import as_captions, decode_text
from lora_training.errors import UserError, one_line

if TYPE_CHECKING:
    from pathlib import Path

CAPTION_COLUMNS = ("text", "caption", "prompt")


def read_metadata(file: Path) -> list[tuple[int, dict]]:
    """(line, row) of a metadata.jsonl or metadata.csv; each row has a file_name. Errors: UserError."""
    stream = io.StringIO(decode_text(file.read_bytes(), file), newline=None)  # U+2028 ends no line of JSON
    rows = read_csv(stream, file) if file.suffix == ".csv" else read_json_lines(stream, file)
    for number, row in rows:
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name.strip() or "\0" in name or printable(name) != name:
            reason = f" can be {name!r}" if name else ""
            raise UserError(f"{file} line {number}: no file_name{reason}")
    return rows


def read_csv(stream: io.StringIO, file: Path) -> list[tuple[int, dict]]:
    """(line, row) of a CSV file with a header."""
    csv.field_size_limit(2**31 - 1)  # its own limit is 131,072 characters
    rows, reader = [], csv.DictReader(stream)
    try:
        for row in reader:
            rows.append((reader.line_num, row))
    except (ValueError, csv.Error) as error:
        line = (rows[-1][0] if rows else 0) + 1
        raise UserError(f"{file} line {line}: not CSV: {one_line(error)}") from None
    return rows


def read_json_lines(stream: io.StringIO, file: Path) -> list[tuple[int, object]]:
    """(line, value) of a file with a JSON value on each line that isn't blank."""
    rows = []
    for number, line in enumerate(stream, 1):
        try:
            rows += [(number, json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} line {number}: not JSON: {one_line(error)}") from None
    return rows


def caption_of_row(row: dict, column: str | None, where: str) -> list[str]:
    """The captions in a row: of the named column, or of the first of CAPTION_COLUMNS that has one.

    Errors: UserError, which begins with `where`, for what is no text.
    """
    if column is not None and column not in row:
        raise UserError(f"--caption_column {column}: {where} has the columns {', '.join(map(str, row))}")
    value = row[column] if column else next((row[c] for c in CAPTION_COLUMNS if row.get(c)), None)
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str | int | float | None) for entry in values):
        raise UserError(f"{where}: a caption is text, or a list of texts, and not {one_line(value)}")
    return as_captions(value)
