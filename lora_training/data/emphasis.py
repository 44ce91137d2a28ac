"""Brackets, BREAK and braces in captions, as AUTOMATIC1111's WebUI and kohya's scripts read them.

Brackets and BREAK are --prompt_weighting: (word) weighs 1.1 times as much, (word:1.3) 1.3 times, [word]
1 / 1.1 times, brackets in brackets multiply, and BREAK begins the next 75 tokens. Braces are
--caption_wildcards: {red|blue} is one of the two each time. A sign after a backslash is meant as it stands.
"""

from __future__ import annotations

import math
import re

from lora_training.errors import UserError

STEP = 1.1  # how much a pair of brackets weighs
MOST_VARIANTS = 1000  # of a caption: each is encoded and kept
BRACKET = re.compile(r"\\(?P<sign>[()\[\]\\]?)|:\s*(?P<number>[+-]?[.\d]+)\s*\)|[()\[\]]")
BREAK = re.compile(r"\s*\bBREAK\b\s*")
BRACES = re.compile(r"(?<!\\)\{((?:\\.|[^{}\\])*)\}")


def parse_weights(prompt: str) -> list[list[tuple[str, float]]]:
    """A prompt -> its stretches between BREAKs, each as (text, weight) in their order.

    A bracket that is never closed weighs to the end; one that was never opened is text.
    """
    pieces: list[list] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # numbers of the pieces after them
    end = 0

    def close(bracket: str, factor: float) -> None:
        for piece in pieces[opened[bracket].pop() :]:
            piece[1] *= factor

    for match in BRACKET.finditer(prompt):
        pieces.append([prompt[end : match.start()], 1.0])
        end, sign, number = match.end(), match[0], as_number(match["number"])
        if match["sign"] is not None:
            pieces.append([match["sign"], 1.0])
        elif sign in opened:
            opened[sign].append(len(pieces))
        elif number is not None and opened["("]:
            close("(", number)
        elif sign == ")" and opened["("]:
            close("(", STEP)
        elif sign == "]" and opened["["]:
            close("[", 1 / STEP)
        else:
            pieces.append([sign, 1.0])
    pieces.append([prompt[end:], 1.0])
    for bracket, factor in (("(", STEP), ("[", 1 / STEP)):
        while opened[bracket]:
            close(bracket, factor)
    return join_pieces(pieces)


def as_number(text: str | None) -> float | None:
    """A number, or None for what is none, such as 1.2.3."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def join_pieces(pieces: list[list]) -> list[list[tuple[str, float]]]:
    """Pieces of a prompt as stretches between BREAKs; neighbours of the same weight are one."""
    stretches: list[list[tuple[str, float]]] = [[]]
    for text, weight in pieces:
        first, *others = BREAK.split(text)
        for number, part in enumerate([first, *others]):
            if number:
                stretches.append([])
            stretch = stretches[-1]
            if part and stretch and stretch[-1][1] == weight:
                stretch[-1] = (stretch[-1][0] + part, weight)
            elif part:
                stretch.append((part, weight))
    return stretches


def prompt_chunks(tokenizer, prompt: str, size: int, weighted: bool = True) -> list[list[tuple[int, float]]]:
    """A prompt as chunks of up to `size` tokens, each as (id, weight).

    weighted: brackets and BREAK, which begins another chunk, are read; else all weighs 1.
    """
    chunks = []
    for stretch in parse_weights(prompt) if weighted else [[(prompt, 1.0)]]:
        tokens = []
        for text, weight in stretch:
            ids = tokenizer(text, add_special_tokens=False, truncation=False).input_ids
            tokens += [(id, weight) for id in ids]
        chunks += [tokens[k : k + size] for k in range(0, max(1, len(tokens)), size)]
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def join_brackets(tags: list[str], separator: str) -> list[str]:
    """Tags of which none ends within brackets: "(a", "b:1.2)" -> "(a, b:1.2)"."""
    joined, depth = [], 0
    for tag in tags:
        if depth:
            joined[-1] += separator + tag
        else:
            joined.append(tag)
        signs = re.sub(r"\\.", "", tag)
        change = sum(signs.count(sign) for sign in "([") - sum(signs.count(sign) for sign in ")]")
        depth = max(0, depth + change)
    return joined


def caption_variants(caption: str, where: str) -> list[str]:
    """All captions that one with braces can be: "a {red|blue} dog" -> "a red dog", "a blue dog".

    Errors: UserError for more than MOST_VARIANTS.
    """
    variants, rest = [], [caption]
    while rest:
        text = rest.pop(0)
        if match := BRACES.search(text):
            options = re.split(r"(?<!\\)\|", match[1])
            rest[:0] = [text[: match.start()] + option + text[match.end() :] for option in options]
        else:
            variants.append(" ".join(re.sub(r"\\([{}|])", r"\1", text).split()))
        if len(variants) + len(rest) > MOST_VARIANTS:
            raise UserError(f"{where}: its braces make more than {MOST_VARIANTS} captions; use fewer")
    return variants


def all_variants(captions: list[str], where: str) -> list[str]:
    """What several captions with braces can be, as one list in which each caption has as large a share.

    Errors: UserError for more than MOST_VARIANTS, or for shares that no list of moderate length has.
    """
    groups = [caption_variants(caption, where) for caption in captions]
    length = math.lcm(*map(len, groups)) if groups else 1
    if length > MOST_VARIANTS:
        raise UserError(f"{where}: its lines' braces have as different numbers of words; make them alike")
    return [variant for group in groups for variant in group * (length // len(group))]
