"""Every prompt that a run can ask for, encoded before its first step."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.data.captions import prepend_trigger
from lora_training.processes import distribute
from lora_training.text.words import class_caption, insert_tokens

if TYPE_CHECKING:
    import argparse

    from lora_training.data.samples import TrainingData
    from lora_training.text.prompts import Prompts


def fill_text_cache(
    prompts: Prompts, data: TrainingData, abstractions: dict[str, list[str]], drawn_prompts: list[str]
) -> None:
    """Encodes every prompt that can come up with the encoders that aren't trained, and frees these.

    abstractions: {word: its new tokens}; drawn_prompts: those of validation and control images.
    """
    args = prompts.args
    if args.captions_vary:
        if args.offload:
            reason = "shuffled or dropped tags make new captions all the time"
            print_status(f"note: the text encoders stay on the GPU: {reason}")
        return
    captions = training_captions(data, args, abstractions)
    negatives = [settings.get("negative_prompt", "") for settings in (*args.prompt_settings, {})]
    negatives = [prompts.negative_mark + negative for negative in negatives]
    texts = list(dict.fromkeys([*captions, *drawn_prompts, *negatives, ""]))
    for key in prompts.tokenizers:
        if key not in prompts.trained:
            encode = functools.partial(prompts.encode, key)
            prompts.remember(key, distribute(f"captions for {key}", texts, encode))
            prompts.release(key)


def training_captions(
    data: TrainingData, args: argparse.Namespace, abstractions: dict[str, list[str]]
) -> list[str]:
    """All captions of a training, its class images' and those of --preserve_class included."""
    captions = [
        prepend_trigger(caption, example.set_args.trigger_word)
        for example in data.examples
        for caption in example.captions
    ]
    if args.preserve_class:
        learned = (*args.triggers, *abstractions)
        captions += [class_caption(caption, args.preserve_class, learned) for caption in captions]
    captions += [caption for example in data.class_examples for caption in example.captions]
    return [insert_tokens(caption, abstractions) for caption in captions]
