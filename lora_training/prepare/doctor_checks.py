"""What the doctor checks beside images: files that don't belong together, and captions."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections import Counter
from typing import TYPE_CHECKING

from lora_training.base_model.clip_tokenizer import clip_tokenizer
from lora_training.data.captions import TRIGGER_MARK, contains_word, prepend_trigger
from lora_training.data.checks import Finding, find_cut_texts, findings_for, unvaried_captions
from lora_training.data.folders import IMAGE_SUFFIXES
from lora_training.errors import UserError
from lora_training.families import FAMILIES, Family
from lora_training.prepare.image_findings import PROGRAM
from lora_training.prepare.model_folders import model_folder
from lora_training.prepare.pictures import phone_suffixes

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.data.folders import Example
    from lora_training.prepare.settings import Settings

HEIC_SUFFIXES = (".heic", ".heif")
CAPTION_SUFFIXES = (".txt", ".caption")
COMMON_WORDS = {"a", "an", "the", "of", "in", "on", "with", "and", "is"}  # which name nothing
BASE_FLAG = "--pretrained_model_name_or_path"


class WordCounter:
    """Stands in for a tokenizer where none is at hand.

    It counts words, digits and signs, each of which is at least a token.
    """

    def __call__(self, captions: list[str], truncation: bool = False) -> argparse.Namespace:
        pieces = [re.findall(r"[^\W\d_]+|\d|[^\s\w]+|_", caption) for caption in captions]
        return argparse.Namespace(input_ids=[["<start>", *words, "<end>"] for words in pieces])


def load_tokenizers(base: str | None, family: Family) -> dict:
    """The tokenizers that count what is read, T5's or else CLIP's, by key: the base's; without a base, CLIP's
    released one, or words and signs.

    base: hub id or folder. Errors: UserError if it has none.
    """
    from transformers import AutoTokenizer

    if base is None and family.t5_tokens:
        return {"t5 (words and signs counted)": WordCounter()}
    if base is None:
        tokenizer = clip_tokenizer()
        if tokenizer is None:
            with contextlib.suppress(OSError, ValueError):
                name = "openai/clip-vit-large-patch14"
                tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        if tokenizer is None:
            return {"clip (words and signs counted)": WordCounter()}
        return {"clip": tokenizer}
    names = {key: tokenizer for key, (tokenizer, _) in family.text_encoders.items()}
    folder = model_folder(base, BASE_FLAG, [f"{name}/*" for name in names.values()])
    if family.t5_tokens and not (folder / names["t5"]).is_dir():
        del names["t5"]
    try:
        return {key: AutoTokenizer.from_pretrained(folder / name) for key, name in names.items()}
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{BASE_FLAG} {base}: no tokenizer there ({reason})") from None


def find_file_problems(folder: Path) -> list[Finding]:
    """Files that don't belong together: captions without image or with several, formats that aren't read."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    names = {file: str(file.relative_to(folder)) for file in files}
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    images_of_stem = Counter(image.with_suffix("") for image in images)
    phone = [names[file] for file in files if file.suffix.lower() in HEIC_SUFFIXES]
    advice = f"{PROGRAM} converts them{'' if phone_suffixes() else ' (pip install pillow-heif)'}"
    findings = findings_for("HEIC files, which are not read in training", phone, None, advice)
    orphans = [
        names[file]
        for file in files
        if file.suffix.lower() in CAPTION_SUFFIXES and not images_of_stem[file.with_suffix("")]
    ]
    advice = "give it the image's name, or take it away"
    findings += findings_for("caption files without an image", orphans, None, advice)
    shared = [
        names[image]
        for image in images
        if images_of_stem[image.with_suffix("")] > 1 and has_caption_file(image)
    ]
    advice = "they differ in their suffix alone; rename one, and give it a caption of its own"
    return findings + findings_for("images that share a caption file", shared, None, advice)


def has_caption_file(image: Path) -> bool:
    """Whether there is a caption file beside an image."""
    return any(image.with_suffix(suffix).is_file() for suffix in CAPTION_SUFFIXES)


def find_caption_problems(examples: list[Example], settings: Settings) -> list[Finding]:
    """Missing and unvaried captions, the trigger word, and ends that are not read."""
    findings, trigger = [], settings.trigger_word
    captioned = [example for example in examples if any(example.captions)]
    if not settings.instance_prompt:
        uncaptioned = [example.name for example in examples if not any(example.captions)]
        advice = "describe them (auto_caption), or train with --instance_prompt or --default_caption"
        findings += findings_for("images without a caption", uncaptioned, len(examples), advice)
        findings += unvaried_captions(captioned)
    findings += find_trigger_problems(captioned, trigger, bool(settings.instance_prompt))
    captions = [prepend_trigger(caption, trigger) for example in captioned for caption in example.captions]
    if captions:
        family = FAMILIES[settings.family]
        tokenizers = load_tokenizers(settings.pretrained_model_name_or_path, family)
        usual = {"max_sequence_length": family.t5_tokens}
        findings += find_cut_texts("captions", captions, tokenizers, family, usual)
    return findings


def find_trigger_problems(
    captioned: list[Example], trigger: str | None, has_instance_prompt: bool
) -> list[Finding]:
    """Captions without the trigger word; without one, whether any word stands in all captions."""
    if trigger:
        lacking = [example.name for example in captioned if lacks_trigger(example, trigger)]
        advice = f"write it there, or train with --trigger_word {trigger}, which puts it first"
        return findings_for(f"captions without the trigger word {trigger!r}", lacking, len(captioned), advice)
    if len(captioned) < 2 or has_instance_prompt:
        return []
    captions = [caption for example in captioned for caption in example.captions]
    words = [{word.strip(".,:;!?\"'()") for word in caption.lower().split()} for caption in captions]
    if set.intersection(*words) - COMMON_WORDS:
        return []
    what = "no word stands in all captions"
    advice = "--trigger_word gives the LoRA a name to call it by, unless it's for a style that is always on"
    return [Finding(what, advice, hurts=False)]


def lacks_trigger(example: Example, trigger: str) -> bool:
    """Whether a caption of an image doesn't have the trigger word."""
    return not all(contains_word(caption, [trigger, TRIGGER_MARK]) for caption in example.captions)
