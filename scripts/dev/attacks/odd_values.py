"""Values that no flag and no file expects, by hypothesis: texts, numbers, JSON."""

from __future__ import annotations

import functools

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

POOL_SIZE = 400
# What a command line can have: no NUL, no halves of characters
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=60)
# What programs take for something of their own
SPECIAL_TEXTS = st.sampled_from(
    (
        "",
        " ",
        "{flag}",
        "{0}",
        "%s",
        "--x",
        "-",
        "a=b",
        "..",
        "/",
        "~",
        "$HOME",
        "C:\\a",
        "none",
        "null",
        "true",
    )
    + ("word " * 2000, "a" * 5000, "\u202eabc", "\ufeffa", "\x1b[31m", "\udcff", "<s0>", "<|endoftext|>")
    + (",", "a,,b", "(", "[a", "*", "a\nb", "a\u2028b", "{", "None", "\u2028", "../../x")
)
SPECIAL_NUMBERS = st.sampled_from(
    (
        "-1",
        "0",
        "-0.0",
        "1e400",
        "1e-320",
        "1_0",
        "\uff11",
        "1\u00b2",
        "9" * 30,
        "1.5",
        "0x10",
        "1,5",
        "x",
        "",
    )
)
NUMBERS = st.integers().map(str) | st.floats().map(repr)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
STRATEGIES = {
    "text": TEXTS | SPECIAL_TEXTS,
    "number": NUMBERS | SPECIAL_NUMBERS,
    "bad count": st.integers(max_value=-1).map(str) | SPECIAL_NUMBERS,
    "JSON": JSON | SPECIAL_TEXTS | SPECIAL_NUMBERS | st.sampled_from(("\ud800", "a\0b", 2**70)),
}


@functools.cache
def odd_values(kind: str) -> list:
    """The values of one of STRATEGIES, from which a case's generator chooses: the same ones in every run."""
    values: list = []

    @seed(0)
    @settings(
        max_examples=POOL_SIZE,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(STRATEGIES[kind])
    def collect(value) -> None:
        values.append(value)

    collect()
    return values
