"""Which pictures look the same, by a perceptual hash and by their colours."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from lora_training.libraries import load_lazily

if TYPE_CHECKING:
    from PIL import Image

np = load_lazily("numpy")

HASH_DISTANCE = 6  # bits of 64 in which the hashes of copies of one picture differ at most
LEAST_BITS = 16  # that are compared, where fewer are reliable
LEAST_CORRELATION = 0.975  # of the colours of copies, which have 0.98 and more
LARGEST_BRIGHTNESS_DIFFERENCE = 32  # of the mean values, 0 to 255


class Fingerprint(NamedTuple):
    """What a picture looks like: a 64-bit hash, which of its bits are reliable, and 16 x 16 RGB pixels."""

    bits: int
    reliable: int
    colors: bytes


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB image.

    A bit says whether one of the lowest 8 x 8 frequencies (DCT of 32 x 32 grey values) is above their median,
    which survives scaling and saving again (Zauner 2010, Implementation and benchmarking of perceptual image
    hash functions). One near the median, as half of them are in a symmetric picture, is not reliable.
    """
    from PIL import Image

    small = image.resize((64, 64), Image.Resampling.BOX, reducing_gap=1.0)
    grey = np.asarray(small.convert("L").resize((32, 32), Image.Resampling.BOX), dtype=np.float64)
    basis = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1))
    frequencies = (basis @ grey @ basis.T).ravel()
    frequencies[0] = 0  # the mean brightness
    height = frequencies - np.median(frequencies)
    reliable = np.abs(height) > max(1.0, 0.01 * np.abs(frequencies).max())
    reliable[0] = False
    colors = small.resize((16, 16), Image.Resampling.BOX).tobytes()
    return Fingerprint(pack_bits(height > 0), pack_bits(reliable), colors)


def pack_bits(flags: np.ndarray) -> int:
    """64 booleans as the bits of a number, the first as the highest."""
    return int.from_bytes(np.packbits(flags).tobytes(), "big")


def near_duplicates(fingerprints: list[Fingerprint], distance: int = HASH_DISTANCE) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, that look the same: their colours vary alike, and their hashes differ little.

    distance: bits of 64 in which they differ at most, in proportion where fewer are reliable.
    """
    hashes = np.array([each.bits for each in fingerprints], dtype=np.uint64)
    reliable = np.array([each.reliable for each in fingerprints], dtype=np.uint64)
    pairs = []
    for i in range(len(fingerprints) - 1):
        compared = reliable[i + 1 :] & reliable[i]
        differing = np.bitwise_count((hashes[i + 1 :] ^ hashes[i]) & compared) * 64.0
        limit = distance * np.maximum(np.bitwise_count(compared), LEAST_BITS)
        for j in np.flatnonzero(differing <= limit) + i + 1:
            if has_same_colors(fingerprints[i].colors, fingerprints[j].colors):
                pairs.append((i, int(j)))
    return pairs


def has_same_colors(first: bytes, second: bytes) -> bool:
    """Whether two 16 x 16 RGB thumbnails correlate, and are about equally bright."""
    a, b = (np.frombuffer(colors, np.uint8).astype(np.float64) for colors in (first, second))
    brightness, a, b = abs(a.mean() - b.mean()), a - a.mean(), b - b.mean()
    evenness = 4.0 * len(a)  # keeps a picture of one colour from being compared by its noise
    norm = math.sqrt((a @ a) * (b @ b))
    if brightness >= LARGEST_BRIGHTNESS_DIFFERENCE:
        return False
    return bool(a @ b + evenness > LEAST_CORRELATION * (norm + evenness))
