"""The prompts of the pictures that a training draws."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_training.data.captions import prepend_trigger, word_pattern

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example

NEUTRAL_PROMPTS = ("a photograph of a street in a town", "a portrait of a woman")
MAX_CONTROL_PROMPTS = 4  # of those made from captions


def sample_prompts(args: argparse.Namespace, examples: list[Example]) -> list[str]:
    """Prompts that show what was learned: those of validation, else two captions; none if none is drawn."""
    if args.num_validation_images == 0:
        return []
    if args.validation_prompt:
        return list(args.validation_prompt)
    if args.skip_final_inference:
        return []
    captions = [prepend_trigger(e.captions[0], e.set_args.trigger_word) for e in examples if not e.held_out]
    return list(dict.fromkeys(captions))[:2]


def control_prompts(
    args: argparse.Namespace, examples: list[Example], abstractions: dict[str, list[str]]
) -> list[str]:
    """Prompts whose pictures should not change.

    They are those of --control_prompt, else the class prompts, else captions without trigger word and without
    the words of `abstractions` ({word: its new tokens}), else two neutral ones.
    """
    if args.control_prompt:
        return args.control_prompt
    class_prompts = [args.class_prompt]
    class_prompts += [set_args.default_caption for set_args in args.sets if set_args.is_class]
    class_prompts = [prompt for prompt in class_prompts if prompt]
    if class_prompts:
        return class_prompts
    learned_words = [*abstractions, *args.triggers]
    if not learned_words:
        return list(NEUTRAL_PROMPTS)
    captions = [example.captions[0] for example in examples if not example.held_out]
    prompts = dict.fromkeys(remove_words(caption, learned_words) for caption in captions)
    prompts.pop("", None)
    return list(prompts)[:MAX_CONTROL_PROMPTS] or list(NEUTRAL_PROMPTS)


def remove_words(caption: str, words: list[str]) -> str:
    """A caption without words, and without the spaces and commas that they leave."""
    caption = re.sub(word_pattern(words), " ", caption, flags=re.IGNORECASE)
    return " ".join(caption.split()).strip(" ,")
