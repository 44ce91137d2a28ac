"""What will hurt in the pictures of a set: more than training can see without a cost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lora_training.data.checks import examine_images, findings_for
from lora_training.prepare.duplicates import near_duplicates

if TYPE_CHECKING:
    from lora_training.data.checks import Finding
    from lora_training.data.folders import Example
    from lora_training.prepare.duplicates import Fingerprint

PROGRAM = "scripts/dataset/prepare_dataset.py"  # what mends most of it


def find_image_problems(
    examples: list[Example],
    buckets: list[tuple[int, int]],
    fingerprints: dict[str, Fingerprint],
    batch_size: int,
) -> list[Finding]:
    """Sizes and crops as training sees them, lonely buckets, copies, and copies of held-out images.

    examples: with size and bucket. fingerprints: by the names of the examples.
    """
    findings = [*examine_images(examples, buckets), *find_lonely_buckets(examples, batch_size)]
    pairs = near_duplicates([fingerprints[example.name] for example in examples])
    duplicates = [(examples[i], examples[j]) for i, j in pairs]
    names = [f"{first.name} = {second.name}" for first, second in duplicates]
    advice = f"they count twice; take one of each out, or let {PROGRAM} do it (remove_duplicates)"
    findings += findings_for("pairs of images that look the same", names, None, advice)
    leaks = [
        name
        for name, (first, second) in zip(names, duplicates, strict=True)
        if first.held_out != second.held_out
    ]
    advice = "the held-out loss will look better than it is; take one of each out"
    return findings + findings_for("held-out images that look like trained ones", leaks, None, advice)


def find_lonely_buckets(examples: list[Example], batch_size: int) -> list[Finding]:
    """Images that are alone in their bucket, whose batches have one image whatever the batch size."""
    counts = Counter(example.bucket for example in examples)
    alone = [example.name for example in examples if counts[example.bucket] == 1 and len(counts) > 1]
    advice = "each counts as much as a full batch; crop them, or use fewer buckets"
    if batch_size == 1:
        advice = f"harmless with --train_batch_size 1; with more, {advice}"
    what = "images alone in their bucket"
    return findings_for(what, alone, len(examples), advice, hurts=batch_size > 1)
