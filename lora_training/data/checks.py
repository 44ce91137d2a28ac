"""What in the data will hurt the result, as far as a training sees it without a cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_training.console import print_status, summarize_names
from lora_training.data.buckets import share_cropped
from lora_training.data.captions import list_tags, prepend_trigger
from lora_training.data.emphasis import prompt_chunks

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example
    from lora_training.families import Family

LONGEST_TEXTS = {"max_token_length": 225, "max_sequence_length": 512}  # tokens, of CLIP in chunks and of T5


@dataclass
class Finding:
    """What is wrong with the data, and the way out. One that `hurts` costs the result something."""

    what: str
    advice: str
    hurts: bool = True


def findings_for(
    what: str, names: list[str], total: int | None, advice: str, hurts: bool = True
) -> list[Finding]:
    """[a finding with how many, of how many, and the first few names], or [] if there are no names."""
    if not names:
        return []
    of_total = "" if total is None else f" of {total}"
    return [Finding(f"{what}: {len(names)}{of_total} ({summarize_names(names)})", advice, hurts)]


def report_findings(
    examples: list[Example], buckets: list[tuple[int, int]], tokenizers: dict, args: argparse.Namespace
) -> list[str]:
    """Prints and returns what in the data will hurt; `prepare_dataset.py --doctor` looks closer.

    tokenizers: by encoder key, as `find_cut_texts` takes them.
    """
    findings = examine_images(examples, buckets)
    if not args.instance_prompt and not args.default_caption:
        findings += unvaried_captions(examples)
    captions = [prepend_trigger(c, e.set_args.trigger_word) for e in examples for c in e.captions]
    if args.captions_vary:
        findings += unsplit_captions(examples, args)
    prompts = [*(args.validation_prompt or ()), *(args.control_prompt or ()), args.class_prompt]
    prompts += [settings.get("negative_prompt") for settings in args.prompt_settings]
    for kind, texts in (("captions", captions), ("prompts", list(filter(None, prompts)))):
        findings += find_cut_texts(kind, texts, tokenizers, args.family, vars(args))
    sizes = ["{} x {}".format(*size) for size in sorted((e.size for e in examples), key=math.prod)]
    print_status(f"{len(examples)} images from {sizes[0]} to {sizes[-1]} pixels")
    lines = [f"{finding.what}; {finding.advice}" for finding in findings]
    for line in lines:
        print_status(f"warning: {line}")
    if findings:
        print_status("prepare_dataset.py --doctor looks closer: copies, blur, lonely buckets")
    return lines


def examine_images(examples: list[Example], buckets: list[tuple[int, int]]) -> list[Finding]:
    """Pictures that are enlarged or lose much to the crop; their sizes and buckets must be known."""
    enlarged, cropped = [], []
    for example in examples:
        (width, height), bucket = example.size, buckets[example.bucket]
        scale = max(bucket[0] / width, bucket[1] / height)
        share = share_cropped(example.size, bucket)
        if scale > 1.25:
            enlarged.append(f"{example.name}: {width} x {height}, {scale:.1f} times")
        if share > 0.25:
            cropped.append(f"{example.name}: {share:.0%}")
    advice = "the LoRA learns their blur; use larger ones or a lower resolution"
    findings = findings_for("images enlarged to fill their bucket", enlarged, len(examples), advice)
    advice = "crop them by hand" if len(buckets) > 1 else "use --aspect_ratio_buckets auto"
    what = "images that lose more than a quarter to the crop"
    return findings + findings_for(what, cropped, len(examples), advice)


def unvaried_captions(examples: list[Example]) -> list[Finding]:
    """A finding if every image of several has the same caption."""
    captions = {tuple(e.captions) for e in examples}
    if len(examples) < 2 or len(captions) > 1 or not any(*captions):
        return []
    what = f"all captions are the same ({examples[0].captions[0][:60]!r})"
    advice = (
        "what else the pictures share is learned with it; say in each what differs, or give --instance_prompt"
    )
    return [Finding(what, advice)]


def unsplit_captions(examples: list[Example], args: argparse.Namespace) -> list[Finding]:
    """A finding if captions have no tags to shuffle, or some that --tag_dropout empties."""
    captions = [caption for example in examples for caption in example.captions if caption]
    single = [caption for caption in captions if len(list_tags(caption, args.tag_separator)) == 1]
    if captions and len(single) == len(captions):
        what = f"no caption has two tags with --tag_separator {args.tag_separator!r} between them"
        return [Finding(what, "--tag_separator says what stands there")]
    if args.keep_tokens or not args.tag_dropout:
        return []
    advice = "--tag_dropout leaves them out as a whole; --keep_tokens 1 keeps them"
    return findings_for("captions of one tag", single, len(captions), advice)


def find_cut_texts(
    kind: str, texts: list[str], tokenizers: dict, family: Family, settings: dict[str, object]
) -> list[Finding]:
    """A finding for each encoder that doesn't read the ends of some texts: for T5 alone where there is one,
    because it reads on where CLIP ends.

    kind: "captions" or "prompts". tokenizers: {"clip_l": tokenizer, ...}. settings: max_token_length of CLIP
    (75 where it isn't said), or max_sequence_length of T5.
    """
    t5 = {key: tokenizer for key, tokenizer in tokenizers.items() if key.startswith("t5")}
    setting = "max_sequence_length" if t5 else "max_token_length"
    read = settings.get(setting) or 75
    limit = read if t5 else read + 2  # CLIP's start and end aren't counted in its setting
    advice = "their ends are not seen; shorten them"
    if setting in family.text_settings and read < LONGEST_TEXTS[setting]:
        advice += f", or give a larger --{setting}, up to {LONGEST_TEXTS[setting]}"
    findings = []
    for key, tokenizer in (t5 or tokenizers).items() if texts else ():
        lengths = map(len, tokenizer(texts, truncation=False).input_ids)
        if settings.get("prompt_weighting"):
            chunks = [prompt_chunks(tokenizer, text, 75) for text in texts]
            lengths = [75 * (len(each) - 1) + len(each[-1]) + 2 for each in chunks]
        pairs = zip(texts, lengths, strict=True)
        long = [f"{length} tokens: {text[:60]}…" for text, length in pairs if length > limit]
        what = f"{kind} longer than the {limit} tokens that {key} reads"
        findings += findings_for(what, long, len(texts), advice)
    return findings
