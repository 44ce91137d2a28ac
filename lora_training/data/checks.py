"""What will hurt in the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_training.console import print_status, summarize_names
from lora_training.data.buckets import share_cropped
from lora_training.data.captions import prepend_trigger

if TYPE_CHECKING:
    from lora_training.data.folders import Example


@dataclass
class Finding:
    """What is wrong with the data, and the way out. One that `hurts` costs the result something."""

    what: str
    advice: str
    hurts: bool = True


def findings_for(
    what: str, names: list[str], total: int | None, advice: str, hurts: bool = True
) -> list[Finding]:
    """[a finding with how many, of how many, and the first few names], or [] if there are none."""
    of = "" if total is None else f" of {total}"
    return [Finding(f"{what}: {len(names)}{of} ({summarize_names(names)})", advice, hurts)] if names else []


def report_findings(
    examples: list[Example], buckets: list[tuple[int, int]], tokenizers: dict, args
) -> list[str]:
    """Says, and returns, what will hurt in the data, as far as it costs nothing to see; the doctor looks
    closer.
    """
    findings = examine_images(examples, buckets)
    if not args.instance_prompt and not args.default_caption:
        findings += unvaried_captions(examples)
    captions = [prepend_trigger(c, e.own.trigger_word) for e in examples for c in e.captions]
    tokens_read = args.max_token_length if "max_token_length" in args.family.text_settings else 75
    findings += truncated_captions(captions, tokenizers, tokens_read)
    sizes = ["{} x {}".format(*size) for size in sorted((e.size for e in examples), key=math.prod)]
    print_status(f"{len(examples)} images from {sizes[0]} to {sizes[-1]} pixels")
    lines = [f"{finding.what}; {finding.advice}" for finding in findings]
    for line in lines:
        print_status(f"warning: {line}")
    if findings:
        print_status("prepare_dataset.py --doctor looks closer: copies, blur, lonely buckets")
    return lines


def examine_images(examples: list[Example], buckets: list[tuple[int, int]]) -> list[Finding]:
    """What will hurt in pictures that have been looked at: those that are enlarged, or lose much to the crop."""
    soft, narrow = [], []
    for e in examples:
        (width, height), bucket = e.size, buckets[e.bucket]
        scale, lost = max(bucket[0] / width, bucket[1] / height), share_cropped(e.size, bucket)
        soft += [f"{e.name}: {width} x {height}, {scale:.1f} times"] if scale > 1.25 else []
        narrow += [f"{e.name}: {lost:.0%}"] if lost > 0.25 else []
    advice = "the LoRA learns their blur; use larger ones or a lower resolution"
    findings = findings_for("images enlarged to fill their bucket", soft, len(examples), advice)
    advice = "crop them by hand" if len(buckets) > 1 else "use --aspect_ratio_buckets auto"
    return findings + findings_for(
        "images that lose more than a quarter to the crop", narrow, len(examples), advice
    )


def unvaried_captions(examples: list[Example]) -> list[Finding]:
    """A finding if every image of several has the same caption."""
    captions = {tuple(e.captions) for e in examples}
    if len(examples) < 2 or len(captions) > 1 or not any(*captions):
        return []
    advice = (
        "what else the pictures share is learned with it; say in each what differs, or give --instance_prompt"
    )
    return [Finding(f"all captions are the same ({examples[0].captions[0][:60]!r})", advice)]


def truncated_captions(captions: list[str], tokenizers: dict, read: int = 75) -> list[Finding]:
    """Captions of more tokens than are read of CLIP's.

    tokenizers: {"clip_l": tokenizer, ...}, others are skipped.
    """
    findings = []
    for key, tokenizer in tokenizers.items():
        if key.startswith("clip"):
            limit, ids = read + 2, tokenizer(captions, truncation=False).input_ids
            long = [
                f"{len(i)} tokens: {c[:60]}…" for c, i in zip(captions, ids, strict=True) if len(i) > limit
            ]
            what = f"captions longer than the {limit} tokens that {key} reads"
            findings += findings_for(what, long, len(captions), "their ends are not seen; shorten them")
    return findings
