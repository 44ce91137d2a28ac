"""prepare_dataset.py --doctor: says what is in a data set, and what is wrong with it. Changes nothing."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.cli.defaults import check_sizes, use_prepared_buckets
from lora_training.console import print_status
from lora_training.data.buckets import bucket_sizes, print_buckets
from lora_training.data.checks import Finding, findings_for
from lora_training.data.examples import hold_out, source_examples
from lora_training.data.image_store import measure_example
from lora_training.errors import UserError
from lora_training.families import FAMILIES
from lora_training.libraries import import_model_libraries
from lora_training.prepare.doctor_checks import find_caption_problems, find_file_problems
from lora_training.prepare.duplicates import fingerprint
from lora_training.prepare.image_findings import PROGRAM, find_image_problems
from lora_training.prepare.parallel import in_parallel
from lora_training.prepare.pictures import header_facts, phone_suffixes
from lora_training.prepare.reading import source_args

if TYPE_CHECKING:
    from lora_training.data.folders import Example
    from lora_training.prepare.duplicates import Fingerprint
    from lora_training.prepare.settings import Settings

FEW_IMAGES = 5


@dataclass
class Inspection:
    """The images of a data set after each was decoded. Names are those of the examples."""

    buckets: list[tuple[int, int]]
    examples: list[Example]  # those that can be read
    facts: dict[str, dict] = field(default_factory=dict)  # as `header_facts` gives them
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)  # names with the reasons
    missing: list[str] = field(default_factory=list)  # that the metadata name


def diagnose(settings: Settings) -> int:
    """Prints what is in the data set and what is wrong with it. Returns 1 if something will hurt, else 0.

    Errors: UserError for flags of a training that are wrong.
    """
    training = training_args(settings)
    buckets = training_buckets(training)
    missing: list[str] = []
    phone_suffixes()  # so that such pictures are known under any name
    try:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            examples = source_examples(training, missing)
    except UserError as error:
        print_status(f"HURTS  {error}\n       -> training stops at this; mend it first")
        return 1
    notes = [line.removeprefix("warning: ") for line in output.getvalue().splitlines()]
    inspection = inspect_images(examples, buckets)
    inspection.missing = missing
    findings = [Finding(note, "", hurts=False) for note in notes]
    findings += find_missing_images(inspection)
    folder = Path(settings.data_dir or settings.dataset_name)
    if folder.is_dir():
        findings += find_file_problems(folder)
    if not inspection.examples:
        print_status("\n".join(findings_text(findings)))
        return 1
    hold_out(inspection.examples, training)
    findings += find_problems_of_images(inspection, training, settings)
    findings += find_caption_problems(inspection.examples, settings)
    print_status("\n".join(overview(settings, inspection)))
    print_buckets(inspection.examples, buckets)
    print_status("\n".join(["", *findings_text(findings)]))
    return int(any(finding.hurts for finding in findings))


def training_args(settings: Settings) -> argparse.Namespace:
    """The flags of a training that reading and checking images depends on."""
    training = source_args(settings)
    training.family = FAMILIES[settings.family]
    training.aspect_ratio_buckets, training.resolution = settings.aspect_ratio_buckets, settings.resolution
    training.validation_split = settings.validation_split or 0.0
    training.seed = settings.seed or 0
    return training


def training_buckets(training: argparse.Namespace) -> list[tuple[int, int]]:
    """The buckets that training would use, at the resolution that this sets.

    Errors: UserError for flags that don't fit.
    """
    use_prepared_buckets(training)
    training.resolution = training.resolution or [training.family.resolution]
    check_sizes(training)
    if training.aspect_ratio_buckets is not None:
        import_model_libraries()  # diffusers makes the buckets
    return bucket_sizes(training)


def inspect_images(examples: list[Example], buckets: list[tuple[int, int]]) -> Inspection:
    """Decodes every image, which sets the examples' sizes and buckets."""
    inspection = Inspection(buckets, examples)

    def inspect(example: Example) -> str | None:
        try:
            inspection.fingerprints[example.name] = fingerprint(measure_example(example, buckets))
            inspection.facts[example.name] = header_facts(example.read())
        except (ValueError, OSError) as error:
            return str(error)
        return None

    for example, problem in in_parallel(inspect, examples, os.cpu_count() or 1, "looking"):
        if problem is not None:
            inspection.unreadable.append(f"{example.name}: {problem}")
    inspection.examples = [example for example in examples if example.name in inspection.facts]
    return inspection


def find_missing_images(inspection: Inspection) -> list[Finding]:
    """Images that aren't there, or can't be read."""
    advice = "training stops at this; put them back, or take their lines out of the metadata"
    what = "images named in the metadata that are not there"
    findings = findings_for(what, inspection.missing, None, advice)
    advice = "training leaves them out; replace them"
    return findings + findings_for("images that can't be read", inspection.unreadable, None, advice)


def find_problems_of_images(
    inspection: Inspection, training: argparse.Namespace, settings: Settings
) -> list[Finding]:
    """What is wrong with the images that can be read, and what is good to know of them."""
    examples, facts, findings = inspection.examples, inspection.facts, []
    total, batch_size = len(examples), settings.train_batch_size or 1
    if total < FEW_IMAGES:
        what = f"only {total} image{'s' if total > 1 else ''}"
        advice = "10 to 50 that differ in light, place and angle are usual"
        findings.append(Finding(what, advice, hurts=False))
    findings += find_image_problems(examples, inspection.buckets, inspection.fingerprints, batch_size)
    has_copies = any("look the same" in finding.what for finding in findings)
    if training.validation_split and settings.seed is None and has_copies:
        what, advice = "which images are held out depends on --seed", "give the one that you train with"
        findings.append(Finding(what, advice, hurts=False))
    disguised = [name for name in facts if facts[name]["format"] == "HEIF"]
    what = "HEIC files under another suffix, which are not read in training"
    findings += findings_for(what, disguised, None, f"{PROGRAM} converts them")
    turned = [name for name in facts if facts[name]["turned"]]
    advice = "training puts them upright; other tools may not (image_resizing writes them upright)"
    findings += findings_for("images turned by EXIF", turned, total, advice, hurts=False)
    located = [name for name in facts if facts[name]["gps"]]
    what = "images that tell the place where they were taken"
    advice = "take it out before you publish the set (image_resizing does)"
    return findings + findings_for(what, located, total, advice, hurts=False)


def overview(settings: Settings, inspection: Inspection) -> list[str]:
    """Counts and sizes, a line each."""
    examples, buckets, unreadable = inspection.examples, inspection.buckets, inspection.unreadable
    by_area = sorted((example.size for example in examples), key=lambda size: size[0] * size[1])
    sizes = " to ".join("{} x {}".format(*size) for size in (by_area[0], by_area[-1]))
    shapes = Counter("square" if w == h else "wide" if w > h else "tall" for w, h in by_area)
    modes = Counter(f"{facts['format']} {facts['mode']}" for facts in inspection.facts.values())
    captioned = sum(any(example.captions) for example in examples)
    target = f"{len(buckets)} buckets" if len(buckets) > 1 else "one size, {} x {}".format(*buckets[0])
    note = f", and {len(unreadable)} that can not be read" if unreadable else ""
    return [
        f"data set   {settings.data_dir or settings.dataset_name}, for {settings.family} at {target}",
        f"images     {len(examples)}{note}",
        f"sizes      {sizes} pixels; {list_counts(shapes)}",
        f"files      {list_counts(modes)}",
        f"captions   {captioned} of {len(examples)} images{caption_lengths(examples)}",
    ]


def list_counts(counts: Counter) -> str:
    """The numbers with their names, the largest first."""
    return ", ".join(f"{number} {name}" for name, number in counts.most_common())


def caption_lengths(examples: list[Example]) -> str:
    """How many words the captions have, or nothing."""
    lengths = [len(caption.split()) for example in examples for caption in example.captions if caption]
    if not lengths:
        return ""
    return f", of {min(lengths)} to {max(lengths)} words (median {statistics.median(lengths):g})"


def findings_text(findings: list[Finding]) -> list[str]:
    """The lines of all findings, what hurts first, each with what to do."""
    lines = []
    for finding in sorted(findings, key=lambda finding: not finding.hurts):
        lines.append(f"{'HURTS' if finding.hurts else 'note '}  {finding.what}")
        if finding.advice:
            lines.append(f"       -> {finding.advice}")
    hurting = sum(finding.hurts for finding in findings)
    plural = "s" if hurting > 1 else ""
    return [*lines, f"{hurting} thing{plural} will hurt" if hurting else "nothing that will hurt"]
