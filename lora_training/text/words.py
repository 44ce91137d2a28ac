"""Words in captions that stand for new tokens or for a class."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_training.data.captions import clean_caption, word_pattern
from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable


def abstraction_tokens(args: argparse.Namespace, tokenizer) -> dict[str, list[str]]:
    """{word in prompts: its new tokens}, numbered through: {"TOK": ["<s0>", "<s1>"]}."""
    if not args.train_text_encoder_ti:
        return {}
    each = args.num_new_tokens_per_abstraction
    if args.initializer_concept:
        each = len(concept_ids(tokenizer, args.initializer_concept))
        if not each:
            flag = f"--initializer_concept {args.initializer_concept!r}"
            raise UserError(f"{flag}: the tokenizer finds no token in it")
    words = list(filter(None, map(clean_caption, args.token_abstraction.split(","))))
    if not words:
        raise UserError("--token_abstraction is empty")
    return {word: [f"<s{i * each + k}>" for k in range(each)] for i, word in enumerate(words)}


def concept_ids(tokenizer, concept: str) -> list[int]:
    """The token ids of --initializer_concept, without start and end."""
    return tokenizer(concept, add_special_tokens=False).input_ids


def insert_tokens(text: str, abstractions: dict[str, list[str]]) -> str:
    """The text with each abstraction, as it is written, replaced by its tokens: "a TOK" -> "a <s0><s1>"."""
    if not abstractions:
        return text
    return re.sub(word_pattern(abstractions), lambda match: "".join(abstractions[match[0]]), text)


def class_caption(caption: str, class_name: str, words: Iterable[str]) -> str:
    """The caption with each of the learned words replaced by their class: "a sks dog" -> "a dog"."""
    pattern = f"{word_pattern(words)}( (?={re.escape(class_name)}))?"
    return re.sub(pattern, lambda match: "" if match[1] else class_name, caption, flags=re.IGNORECASE)
