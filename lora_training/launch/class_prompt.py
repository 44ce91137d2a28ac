"""The class prompt of a DreamBooth training that names none: its captions without the trigger word."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from lora_training.console import print_status
from lora_training.data.captions import TRIGGER_MARK, word_pattern
from lora_training.data.folders import folder_examples
from lora_training.errors import UserError
from lora_training.files import read_config_file
from lora_training.launch.arguments import FOLDER_FLAGS, has_flag, take_flags

# words without a meaning, which people use as a trigger word
RARE_WORDS = {"sks", "ohwx", "zwx", "zkz", "tok", "szn", "aqr", "rare_token", TRIGGER_MARK}


def add_class_prompt(argv: list[str]) -> list[str]:
    """The arguments of a training, and a class prompt where --dreambooth has none, as Olive documents it.

    The prompt is printed. Errors: UserError if neither instance prompt nor captions say what the class is.
    """
    if not has_flag(argv, "--dreambooth"):
        return argv
    flags = ("--class_prompt", "--instance_prompt", FOLDER_FLAGS, "--trigger_word", "--config")
    (class_prompt, instance_prompt, folder, trigger, config), _ = take_flags(argv, *flags)
    values = read_config_file(config) if config else {}
    if class_prompt or values.get("class_prompt"):
        return argv
    instance_prompt = instance_prompt or values.get("instance_prompt")
    captions = first_captions(folder or values.get("train_data_dir"))
    prompt = derive_class_prompt(instance_prompt, captions, trigger or values.get("trigger_word"))
    if prompt is None:
        raise UserError(
            '--dreambooth: what are they pictures of? Give --class_prompt "a photo of a dog", or a word to'
            ' leave out of the captions: --trigger_word, or --instance_prompt "a photo of sks dog"'
        )
    print_status(f"--dreambooth: the class prompt is {prompt!r}; --class_prompt names another")
    return [*argv, "--class_prompt", prompt]


def first_captions(folder: str | None) -> list[str]:
    """The first caption of each image in a folder."""
    place = Path(folder or "").expanduser()
    if not folder or not place.is_dir():
        return []
    return [example.captions[0] for example in folder_examples(place, None) if example.captions]


def derive_class_prompt(instance_prompt: str | None, captions: list[str], trigger: str | None) -> str | None:
    """The instance prompt, else the most frequent caption, without the trigger word; None if none has one.

    trigger: None for any of RARE_WORDS. The shortest of several that are as frequent is taken.
    """
    sources = [instance_prompt] if instance_prompt else captions
    prompts = Counter(filter(None, (without_trigger(caption, trigger) for caption in sources)))
    most = max(prompts.values(), default=0)
    return min((prompt for prompt, number in prompts.items() if number == most), key=len, default=None)


def without_trigger(caption: str, trigger: str | None) -> str | None:
    """A caption without its trigger word, "a photo of sks dog" -> "a photo of dog".

    None if nothing else is left, or if no trigger is named and the caption has none of RARE_WORDS.
    """
    words = [trigger, TRIGGER_MARK] if trigger else RARE_WORDS
    pattern = f"[,.;:]*{word_pattern(words)}(?:['’]s)?[,.;:]*"
    others, removed = re.subn(pattern, " ", caption, flags=re.IGNORECASE)
    rest = " ".join(others.split()).strip(" ,.;:")
    if not rest or not (removed or trigger):
        return None
    return rest
