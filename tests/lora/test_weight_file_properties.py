"""Any file of weights is read or refused in a line, by hypothesis; the examples are the same in every run."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from properties import in_a_file, often, or_refused, seldom, values

from lora_training.base_model.family_detection import require_family
from lora_training.lora.reading import read_lora_tensors

pytestmark = pytest.mark.faults


def with_header(header: object, body: bytes = b"\0" * 16) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "X"]) | values,
        "shape": st.lists(st.integers(0, 4), max_size=3) | values,
        "data_offsets": st.tuples(st.integers(0, 16), st.integers(0, 16)).map(list) | values,
    },
)
names = st.sampled_from(["unet.conv_in.lora.down.weight", "lora_unet_x.alpha", "clip_l", "__metadata__", "x"])


@often
@given(raw=st.binary(max_size=60) | st.dictionaries(names, entries | values, max_size=3).map(with_header))
@example(raw=with_header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}))
def test_any_lora_file_is_tensors_or_refused_in_a_line(raw):
    result = in_a_file(raw, "x.safetensors", lambda file: or_refused(lambda: read_lora_tensors(file)))
    assert result is None or all(tensor.numel() >= 0 for tensor in result[0].values())


@seldom
@given(raw=st.binary(max_size=60) | st.dictionaries(names, entries | values, max_size=3).map(with_header))
@example(raw=b"\xff" * 8)
def test_any_single_file_has_a_family_or_is_refused_in_a_line(raw):
    for name in ("x.safetensors", "x.ckpt"):
        in_a_file(raw, name, lambda file: or_refused(lambda: require_family(str(file))))
