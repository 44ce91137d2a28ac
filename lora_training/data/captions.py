"""Captions: cleaned, with trigger word."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

from lora_training.console import print_status, printable

if TYPE_CHECKING:
    from pathlib import Path


def as_captions(value: object) -> list[str]:
    """A caption or a list of captions, one of which is picked at random each time."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [c for c in (clean_caption(v) for v in values) if c]


def clean_caption(text: object) -> str:
    """One line without needless spaces; None becomes the empty caption."""
    return " ".join(unicodedata.normalize("NFC", printable(str(text))).split()) if text is not None else ""


def decode_text(raw: bytes, file: Path) -> str:
    """Text in UTF-8 or UTF-16 with a mark, else in Windows-1252, which is said; as far as it goes where it is
    cut.
    """
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        if len(raw) % 2:
            print_status(f"warning: {file} ends in the middle of a character")
        return raw[: len(raw) // 2 * 2].decode("utf-16", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        print_status(f"warning: {file} is not UTF-8; read as Windows-1252")
        return raw.decode("cp1252", errors="replace")


def prepend_trigger(caption: str, trigger: str | None) -> str:
    """The caption with the trigger word in front, unless it has it already."""
    if (
        not trigger
        or f" {trigger.lower()} " in f" {''.join(c if c.isalnum() else ' ' for c in caption.lower())} "
    ):
        return caption
    if trigger.lower() in caption.lower().replace(",", " ").split():
        return caption
    return f"{trigger}, {caption}" if caption else trigger
