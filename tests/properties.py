"""What the tests by hypothesis share: how many examples, any values, and what counts as refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from lora_training.errors import UserError

often = settings(
    derandomize=True, deadline=None, database=None, max_examples=100, suppress_health_check=list(HealthCheck)
)
seldom = settings(often, max_examples=40)

texts = st.text(max_size=40) | st.sampled_from(
    ["1e400", "nan", "-0", "9" * 5000, "１", "²", "1_0", " 1 ", "0x1", "inf", "\0"]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def in_a_file(raw: bytes | str, name: str, work):
    """What `work` makes of a folder that holds a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(raw if isinstance(raw, bytes) else raw.encode("utf-8", "surrogatepass"))
        return work(file)


def or_refused(work, *errors):
    """What `work` gives, or None where it refuses in one line; any other exception is the test's failure."""
    try:
        return work()
    except (UserError, *errors) as error:
        assert "\n" not in str(error) and str(error).strip()
