"""image_filtering: leaves out pictures that are too small, too long, blurred, or copies of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.prepare.duplicates import near_duplicates

if TYPE_CHECKING:
    from lora_training.prepare.pictures import Picture
    from lora_training.prepare.preparation import Preparation
    from lora_training.prepare.settings import ImageFiltering


def filter_pictures(preparation: Preparation) -> None:
    """image_filtering of all pictures that can be read."""
    pictures = preparation.remaining
    apply_filters(pictures, preparation.steps.image_filtering)
    reasons = preparation.count_problems(pictures)
    preparation.note_result("image_filtering", len(pictures), len(pictures), 0, reasons)


def apply_filters(pictures: list[Picture], filtering: ImageFiltering) -> None:
    """Sets the problem of each picture that is to be left out."""
    for picture in pictures:
        picture.problem = find_problem(picture, filtering)
    if filtering.remove_duplicates:
        mark_duplicates([p for p in pictures if p.problem is None], filtering.duplicate_distance)


def find_problem(picture: Picture, filtering: ImageFiltering) -> str | None:
    """Why a picture is left out by itself, or None."""
    width, height = picture.size
    ratio, sharpness = width / height, picture.facts.get("sharpness")
    if min(width, height) < filtering.min_size:
        return f"too small: {width} x {height}, min_size {filtering.min_size}"
    low, high = filtering.min_aspect_ratio, filtering.max_aspect_ratio
    if not low <= ratio <= high:
        return f"too long: {width} x {height} is {ratio:.2f}, allowed {low:g} to {high:g}"
    if filtering.blur_threshold is not None and sharpness < filtering.blur_threshold:
        return f"blurred: sharpness {sharpness:g}, blur_threshold {filtering.blur_threshold:g}"
    return None


def mark_duplicates(pictures: list[Picture], distance: int) -> None:
    """Sets the problem of all but one of pictures that look the same.

    The largest stays; among equals one with a caption.
    """

    def rank(picture: Picture) -> tuple[int, bool, str]:
        return -picture.size[0] * picture.size[1], not picture.captions, picture.name

    pictures = sorted(pictures, key=rank)
    for i, j in near_duplicates([picture.fingerprint for picture in pictures], distance):
        if pictures[i].problem is None and pictures[j].problem is None:
            pictures[j].problem = f"duplicate of {pictures[i].name}"
