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
    captions = [clean_caption(value) for value in values]
    return [caption for caption in captions if caption]


def clean_caption(text: object) -> str:
    """One line without needless spaces; None becomes the empty caption."""
    if text is None:
        return ""
    return " ".join(unicodedata.normalize("NFC", printable(str(text))).split())


def decode_text(raw: bytes, file: Path) -> str:
    """A file's text: UTF-8, UTF-16 with a byte order mark, else Windows-1252, which is said.

    A text that is cut in the middle of a character is read up to there.
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
    if not trigger:
        return caption
    words = "".join(character if character.isalnum() else " " for character in caption.lower())
    if f" {trigger.lower()} " in f" {words} " or trigger.lower() in caption.lower().replace(",", " ").split():
        return caption
    return f"{trigger}, {caption}" if caption else trigger
