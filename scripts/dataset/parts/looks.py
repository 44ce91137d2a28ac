"""What pictures look like, which look the same, and what is wrong with the pictures of a set."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from PIL import Image

SAME_LOOK = 6  # bits of 64 in which the perceptual hashes of copies of one picture differ at most


def look_of(image) -> tuple[int, int, bytes]:
    """What an RGB image looks like: (64-bit perceptual hash, which of its bits are sure, 16 x 16 colours).

    A bit says whether one of the lowest 8 x 8 frequencies (DCT of 32 x 32 grey values) is above their median, which
    outlives scaling and saving again (Zauner 2010, Implementation and benchmarking of perceptual image hash functions).
    One that is near the median, as half of them are in a symmetric picture, is not sure.
    """
    small = image.resize((64, 64), Image.Resampling.BOX, reducing_gap=1.0)
    grey = np.asarray(small.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    basis = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))
    frequencies = (basis @ grey @ basis.T).ravel()
    frequencies[0] = 0  # the mean brightness
    height = frequencies - np.median(frequencies)
    sure = np.abs(height) > max(1.0, 0.01 * np.abs(frequencies).max())
    sure[0] = False
    bits, mask = (int.from_bytes(np.packbits(b).tobytes(), "big") for b in (height > 0, sure))
    return bits, mask, small.resize((16, 16), Image.Resampling.BOX).tobytes()


def near_duplicates(looks: list[tuple[int, int, bytes]], distance: int = SAME_LOOK) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, that look the same: their colours vary alike, and their hashes differ little.

    At most `distance` of 64 bits, in proportion where fewer are sure.
    """
    hashes, sure = (np.array([look[k] for look in looks], dtype=np.uint64) for k in (0, 1))
    pairs = []
    for i in range(len(looks) - 1):
        both = sure[i + 1 :] & sure[i]
        apart = np.bitwise_count((hashes[i + 1 :] ^ hashes[i]) & both) * 64.0
        near = np.flatnonzero(apart <= distance * np.maximum(np.bitwise_count(both), 16)) + i + 1
        pairs += [(i, int(j)) for j in near if same_colours(looks[i][2], looks[int(j)][2])]
    return pairs


def same_colours(first: bytes, second: bytes) -> bool:
    """Whether two 16 x 16 RGB thumbnails correlate by 0.975 (copies: 0.98 on) and are about equally bright."""
    a, b = (np.frombuffer(c, np.uint8).astype(np.float64) for c in (first, second))
    brightness, a, b = abs(a.mean() - b.mean()), a - a.mean(), b - b.mean()
    plain = 4.0 * len(a)  # keeps a picture of one colour from being compared by its noise
    return brightness < 32 and a @ b + plain > 0.975 * (math.sqrt((a @ a) * (b @ b)) + plain)


def picture_findings(examples: list, buckets: list, looks: dict[str, tuple], batch_size: int, script) -> list:
    """What will hurt in the pictures: sizes and crops, as training says it, lonely buckets, copies, held-out copies.

    examples: of the training script, with size and bucket; looks: {name of an example: what look_of gives}.
    """
    findings, total = script.examine(examples, buckets), len(examples)
    inside = Counter(e.bucket for e in examples)
    alone = [e.name for e in examples if inside[e.bucket] == 1 and len(inside) > 1]
    weight = "each counts as much as a full batch; crop them, or use fewer buckets"
    advice = weight if batch_size > 1 else f"harmless with --train_batch_size 1; with more, {weight}"
    findings += script.found("images alone in their bucket", alone, total, advice, hurts=batch_size > 1)
    pairs = near_duplicates([looks[e.name] for e in examples])
    twins = [f"{examples[i].name} = {examples[j].name}" for i, j in pairs]
    program = "scripts/dataset/prepare_dataset.py"
    advice = f"they count twice; take one of each out, or let {program} do it (remove_duplicates)"
    findings += script.found("pairs of images that look the same", twins, None, advice)
    leaks = [t for t, (i, j) in zip(twins, pairs, strict=True) if examples[i].held_out != examples[j].held_out]
    advice = "the held-out loss will look better than it is; take one of each out"
    return findings + script.found("held-out images that look like trained ones", leaks, None, advice)
