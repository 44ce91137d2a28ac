"""Seeds that depend on nothing but what is drawn, and where."""

from __future__ import annotations

import hashlib


def stable_seed(*place: object) -> int:
    """A 63-bit seed that depends on nothing but its arguments: (seed, what is drawn, where it happens)."""
    digest = hashlib.sha256("|".join(str(p) for p in place).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def validation_seed(seed: int, prompt: int, image: int) -> int:
    """The seed of a validation image."""
    return stable_seed(seed, "validation", prompt, image) % 2**32
