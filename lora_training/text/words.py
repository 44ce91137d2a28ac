"""Words in captions that stand for new tokens or for a class."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_training.errors import UserError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable


def abstraction_tokens(args: argparse.Namespace, tokenizer) -> dict[str, list[str]]:
    """{word in prompts: its new tokens}, numbered through: {"TOK": ["<s0>", "<s1>"]}."""
    if not args.train_text_encoder_ti:
        return {}
    from lora_training.text.tokens import TokenRows  # needs torch, which drawing does without until later

    each = args.num_new_tokens_per_abstraction
    if args.initializer_concept:
        each = len(TokenRows.concept_ids(tokenizer, args.initializer_concept))
        if not each:
            raise UserError(
                f"--initializer_concept {args.initializer_concept!r}: the tokenizer finds no token in it"
            )
    words = [w.strip() for w in args.token_abstraction.split(",") if w.strip()]
    if not words:
        raise UserError("--token_abstraction is empty")
    return {word: [f"<s{i * each + k}>" for k in range(each)] for i, word in enumerate(words)}


def insert_tokens(text: str, abstractions: dict[str, list[str]]) -> str:
    """The text with each abstraction replaced by its tokens: "a TOK" -> "a <s0><s1>"."""
    words = "|".join(re.escape(word) for word in sorted(abstractions, key=len, reverse=True))
    return re.sub(words, lambda found: "".join(abstractions[found[0]]), text) if words else text


def class_caption(caption: str, class_name: str, words: Iterable[str]) -> str:
    """The caption with each of the learned words replaced by their class: "a sks dog" -> "a dog"."""
    for word in words:
        caption = caption.replace(f"{word} {class_name}", class_name).replace(word, class_name)
    return caption
