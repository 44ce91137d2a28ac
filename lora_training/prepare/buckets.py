"""aspect_ratio_bucketing: the sizes that pictures are trained at; buckets.json tells them to training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_training.data.buckets import nearest_bucket
from lora_training.prepare.crops import resized_size
from lora_training.prepare.pictures import write_file

if TYPE_CHECKING:
    from lora_training.prepare.preparation import Preparation
    from lora_training.prepare.settings import AspectRatioBucketing

ASPECT_RATIOS = (1, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2, 5 / 2, 3, 4)  # of buckets, both ways


def make_buckets(bucketing: AspectRatioBucketing) -> list[tuple[int, int]]:
    """The buckets (width, height): custom_buckets, or sizes of about base_resolution squared pixels."""
    if bucketing.custom_buckets is not None:
        return bucketing.custom_buckets
    from diffusers.training_utils import generate_aspect_ratio_buckets

    ratios = [ratio for ratio in ASPECT_RATIOS if ratio <= bucketing.max_aspect_ratio + 1e-6]
    sides = [(1000, round(1000 * ratio)) for ratio in ratios]
    shapes = [shape for short, long in sides for shape in ((short, long), (long, short))]
    pairs = generate_aspect_ratio_buckets(
        bucketing.base_resolution, bucketing.divisibility, base_resolutions=shapes
    )
    return [(width, height) for height, width in pairs]


def assign_buckets(preparation: Preparation) -> None:
    """Sets each picture's size after image_resizing and its bucket."""
    resizing, bucketing = preparation.steps.image_resizing, preparation.steps.aspect_ratio_bucketing
    if bucketing:
        preparation.buckets = make_buckets(bucketing)
    for picture in preparation.remaining:
        picture.resized = resized_size(picture.size, resizing) if resizing else picture.size
        if preparation.buckets:
            picture.bucket = nearest_bucket(picture.resized, preparation.buckets)


def write_buckets(preparation: Preparation) -> None:
    """Writes buckets.json, or removes an earlier run's where there is no aspect_ratio_bucketing."""
    file, bucketing = preparation.output / "buckets.json", preparation.steps.aspect_ratio_bucketing
    if not bucketing:
        file.unlink(missing_ok=True)
        return
    side, buckets = bucketing.base_resolution, preparation.buckets
    if bucketing.custom_buckets is not None:
        side = round((sum(width * height for width, height in buckets) / len(buckets)) ** 0.5)
    pairs = ";".join(f"{height},{width}" for width, height in buckets)
    content = {"resolution": side, "aspect_ratio_buckets": pairs}
    write_file(file, (json.dumps(content, indent=1) + "\n").encode())
