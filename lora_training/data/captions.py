"""Captions: cleaned, with trigger word; and the words in them."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from lora_training.console import print_status, printable
from lora_training.data.emphasis import join_brackets
from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable
    from pathlib import Path

TRIGGER_MARK, KEEP_MARK = "[trigger]", "|||"  # in captions for ai-toolkit, and for kohya's scripts

# what a word goes on with: letters and digits, but for those of scripts written without spaces (Thai, Lao,
# Burmese, Khmer, kana, Han); and marks on letters
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
MARKS = "\u0300-\u036f\u0900-\u0963\u0966-\u0dff"
LETTER = f"(?:[^\\W_{UNSPACED}]|[{MARKS}])"


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
    """The caption with the trigger word in the place of ai-toolkit's [trigger], else in front, unless it has
    it already.
    """
    if not trigger:
        return caption
    caption = caption.replace(TRIGGER_MARK, trigger)
    if contains_word(caption, [trigger]):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def insert_trigger(text: str, trigger: str | None, where: str) -> str:
    """The text with the trigger word in the place of [trigger]. Errors: UserError without a trigger word."""
    if trigger is None and TRIGGER_MARK in text:
        way_out = "give --trigger_word, which it stands for"
        raise UserError(f"{where}: {TRIGGER_MARK} in {text[:60]!r}: {way_out}")
    return clean_caption(text.replace(TRIGGER_MARK, trigger or ""))


def split_tags(caption: str, args: argparse.Namespace) -> tuple[list[str], list[str], list[str]]:
    """(tags that stay in front, those that are shuffled and dropped, tags that stay behind).

    In front stay those before kohya's |||, else --keep_tokens, and a tag with the trigger word at the very
    beginning; behind, those after a second |||.
    """
    weighted = vars(args).get("prompt_weighting", False)
    first, *parts = [list_tags(part, args.tag_separator, weighted) for part in caption.split(KEEP_MARK)]
    keep = len(first) if parts else args.keep_tokens
    tags = first + (parts[0] if parts else []) or [""]
    if args.trigger_word and contains_word(tags[0], [args.trigger_word]):
        keep = max(keep, 1)
    return tags[:keep], tags[keep:], [tag for part in parts[1:] for tag in part]


def list_tags(text: str, separator: str, weighted: bool = False) -> list[str]:
    """The tags of a text, with or without spaces around the separator, such as ", ".

    weighted: what stands in brackets is one tag, whatever is in it.
    """
    sign = separator.strip() or separator
    tags = join_brackets(text.split(sign), sign) if weighted else text.split(sign)
    return [tag.strip() for tag in tags if tag.strip()]


def without_marks(caption: str, args: argparse.Namespace) -> str:
    """The caption without kohya's |||, its tags in their order."""
    if KEEP_MARK not in caption:
        return caption
    return args.tag_separator.join(tag for tags in split_tags(caption, args) for tag in tags if tag)


def contains_word(text: str, words: Iterable[str]) -> bool:
    """Whether a text has one of the words (trigger words, which tokenizers read in any case of letters)."""
    return re.search(word_pattern(words), text, re.IGNORECASE) is not None


def word_pattern(words: Iterable[str]) -> str:
    """A regular expression of words, the longest first, where none is a part of a longer word.

    A sign at the edge of one, as in "s_k_s.", may touch anything. Without words it finds nothing.
    """
    patterns = []
    for word in sorted(words, key=len, reverse=True):
        before = f"(?<!{LETTER})" if re.match(LETTER, word) else ""
        after = f"(?!{LETTER})" if re.match(LETTER, word[-1]) else ""
        patterns.append(f"{before}{re.escape(word)}{after}")
    return f"(?:{'|'.join(patterns) or '(?!)'})"
