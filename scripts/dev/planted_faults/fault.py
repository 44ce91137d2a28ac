"""What a planted fault is."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A text of a file, and the wrong one that takes its place.

    The old text stands exactly once in each of the files, else it's an error: short pieces of formulas, so
    that a change of style does not move them.
    """

    name: str
    files: str  # path within the repository; train_*.py stands for all four training scripts
    part: str  # what it breaks
    old: str
    new: str
    tests: tuple[str, ...]  # names of tests that have to see it, each with options of pytest, or without
