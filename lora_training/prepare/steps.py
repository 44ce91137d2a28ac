"""A preparation from its first step to its last, and what it prints."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from lora_training.console import print_status
from lora_training.data.buckets import print_buckets
from lora_training.data.checks import findings_for, unvaried_captions
from lora_training.errors import UserError
from lora_training.families import FAMILIES
from lora_training.files import remove_unfinished
from lora_training.libraries import import_model_libraries
from lora_training.prepare.buckets import assign_buckets, write_buckets
from lora_training.prepare.caption_files import BY_HAND, write_captions
from lora_training.prepare.captioning import caption_pictures, tag_pictures
from lora_training.prepare.filters import filter_pictures
from lora_training.prepare.image_findings import find_image_problems
from lora_training.prepare.images import write_images
from lora_training.prepare.masks import make_masks
from lora_training.prepare.output_folder import remove_outdated_files, write_left_out
from lora_training.prepare.page import write_preparation_page
from lora_training.prepare.preparation import Preparation
from lora_training.prepare.reading import MASK_ENDING, list_pictures, read_pictures

if TYPE_CHECKING:
    from lora_training.data.checks import Finding
    from lora_training.data.folders import Example
    from lora_training.prepare.settings import Settings

MOST_NAMED = 10  # pictures that were left out, on the console


def prepare_data_set(settings: Settings) -> None:
    """Runs the steps that are switched on, each on what the one before has left, and prints what they did.

    Errors: UserError for what a person can mend, OSError for files that can't be read or written.
    """
    started = time.perf_counter()
    preparation, steps = Preparation.start(settings), settings
    remove_unfinished(preparation.output)
    list_pictures(preparation)
    read_pictures(preparation)
    if steps.image_filtering:
        filter_pictures(preparation)
    report_left_out(preparation)
    if steps.auto_caption or steps.masks or steps.aspect_ratio_bucketing:
        import_model_libraries()
    if steps.auto_caption:
        caption_pictures(preparation)
    if steps.auto_tagging:
        tag_pictures(preparation)
    if steps.masks:
        make_masks(preparation)
    assign_buckets(preparation)
    write_images(preparation)
    remove_outdated_files(preparation)
    write_captions(preparation)
    write_buckets(preparation)
    write_left_out(preparation)
    examples = preparation.training_examples()
    findings = find_problems(preparation, examples)
    write_preparation_page(preparation, findings)
    print_summary(preparation, examples, findings, time.perf_counter() - started)


def report_left_out(preparation: Preparation) -> None:
    """Names the pictures that were left out. Errors: UserError if none remains."""
    pictures, file = preparation.pictures, preparation.output / "left_out.jsonl"
    left_out = [picture for picture in pictures if picture.problem]
    for picture in left_out[:MOST_NAMED]:
        print_status(f"left out: {picture.name}: {picture.problem}")
    if len(left_out) > MOST_NAMED:
        print_status(f"left out: {len(left_out) - MOST_NAMED} more, listed in {file}")
    if not preparation.remaining:
        write_left_out(preparation)
        raise UserError(f"none of {len(pictures)} images is left; the reasons are in {file}")


def find_problems(preparation: Preparation, examples: list[Example]) -> list[Finding]:
    """What will hurt in the set as it is now."""
    pictures, resizing = preparation.remaining, preparation.steps.image_resizing
    side = FAMILIES[preparation.settings.family].resolution
    buckets = preparation.buckets or [resizing.target_resolution if resizing else (side, side)]
    fingerprints = {picture.file: picture.fingerprint for picture in pictures}
    findings = find_image_problems(examples, buckets, fingerprints, batch_size=1)
    findings += unvaried_captions(examples)
    uncaptioned = [p.file for p in pictures if not p.captions and p.caption_source != BY_HAND]
    what = "images without a caption"
    what += ", but for the trigger word" if preparation.settings.trigger_word else ""
    advice = "auto_caption describes them, or write a .txt beside each"
    findings += findings_for(what, uncaptioned, len(examples), advice)
    return [finding for finding in findings if finding.hurts]


def print_summary(
    preparation: Preparation, examples: list[Example], findings: list[Finding], seconds: float
) -> None:
    """The table of steps, the buckets, what will hurt, and the command that trains."""
    print_status(f"\n{'step':<22}{'images':>8}{'done now':>10}{'from before':>13}   note")
    for step, images, done_now, done_before, note in preparation.results:
        print_status(f"{step:<22}{images:>8}{done_now:>10}{done_before:>13}   {note}")
    print_status(f"{len(preparation.pictures)} images in {seconds:.1f} s\n")
    if preparation.buckets:
        print_buckets(examples, preparation.buckets)
    for finding in findings:
        print_status(f"warning: {finding.what}; {finding.advice}")
    print_status(f"\nlook at  {preparation.output / 'report.html'}")
    wrapper = "run_lora_train.bat" if sys.platform == "win32" else "bash run_lora_train.sh"
    has_masks = any(picture.mask_digest for picture in preparation.remaining)
    masks = f" --masked_loss={MASK_ENDING}" if has_masks else ""
    print_status(f"train    {wrapper} -m BASE -d {preparation.settings.output_dir}{masks}")
