"""Aspect ratio buckets: the sizes that images are cropped to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_training.console import print_status

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example


def bucket_sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """The (width, height) that images are cropped to."""
    width, height = (args.resolution * 2)[:2]
    if args.aspect_ratio_buckets is None:
        return [(width, height)]
    from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string

    if args.aspect_ratio_buckets == "auto":
        side = round(math.sqrt(width * height))
        pairs = generate_aspect_ratio_buckets(side, divisibility=max(16, args.family.pixel_divisor))
    else:
        pairs = parse_buckets_string(args.aspect_ratio_buckets)
    return [(w, h) for h, w in pairs]


def nearest_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> int:
    """The number of the bucket whose aspect ratio is nearest on a logarithmic scale.

    Among equals it is the one of the nearest area.
    """

    def distance(number: int) -> tuple[float, float]:
        width, height = (math.log(buckets[number][k] / size[k]) for k in (0, 1))
        return round(abs(width - height), 6), abs(width + height)

    return min(range(len(buckets)), key=distance)


def print_buckets(examples: list[Example], buckets: list[tuple[int, int]]) -> None:
    """Prints how many images each bucket has and how much of them is cropped away."""
    if len(buckets) == 1:
        return
    print_status("bucket (width x height)   images   mean share cropped away")
    for i, bucket in enumerate(buckets):
        shares = [share_cropped(e.size, bucket) for e in examples if e.bucket == i]
        if shares:
            name, mean = "{} x {}".format(*bucket), sum(shares) / len(shares)
            print_status(f"{name:>23}   {len(shares):6}   {mean:.0%}")


def share_cropped(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """The share of a picture that is cropped away when it covers a bucket."""
    a, b = size[0] * bucket[1], size[1] * bucket[0]
    return 1 - min(a, b) / max(a, b)


def cover_size(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) at which a picture just covers a bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))
