"""Any file of an output folder is read or refused in a line, by hypothesis.

The examples are the same in every run.
"""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from properties import in_a_file, often, or_refused, texts, values

from lora_training.files import list_checkpoints, read_config_file, read_metrics
from lora_training.training.checkpoints import check_checkpoint
from lora_training.training.output_folder import FINISHED, read_recorded_settings
from lora_training.training.schedule import validation_schedule

pytestmark = pytest.mark.faults


@often
@given(raw=st.binary(max_size=60) | values.map(lambda v: yaml.safe_dump(v).encode("utf-8", "surrogatepass")))
@example(raw=b"[" * 3_000)
@example(raw=b"&a [*a]")
@example(raw=b"!!python/name:os.system")
def test_any_configuration_file_is_a_dictionary_or_refused_in_a_line(raw):
    settings = in_a_file(raw, "c.yaml", lambda file: or_refused(lambda: read_config_file(str(file))))
    assert settings is None or isinstance(settings, dict)


@often
@given(
    raw=st.binary(max_size=60)
    | st.lists(values, max_size=4).map(lambda v: "\n".join(map(json.dumps, v)).encode())
)
@example(raw=b'{"step": 1}\n{"step": 2, "lo')
@example(raw=b'{"step": 1}\n\xff\xfe\n{"step": 2}')
@example(raw=b'{"step": 1}\n3\n' + b"[" * 20_000)
def test_whole_rows_of_any_metrics_are_read(raw):
    rows = in_a_file(raw, "metrics.jsonl", lambda file: read_metrics(str(file.parent)))
    assert all(isinstance(row, dict) for row in rows)
    if raw.startswith(b'{"step": 1}\n'):
        assert rows[0] == {"step": 1}


entries = st.dictionaries(st.sampled_from(["files", "settings", "step", "seed"]), values)


def manifest(files: dict, step: float) -> bytes:
    return json.dumps({"files": files, "settings": {}, "step": step, "seed": 1}).encode()


@often
@given(raw=st.binary(max_size=60) | (entries | values).map(lambda v: json.dumps(v).encode()))
@example(raw=manifest({"training_state.pt": "x"}, math.inf))
@example(raw=manifest({"a\0": "x"}, 1))
def test_any_manifest_is_whole_or_damaged(raw):
    def check(file):
        with pytest.raises(ValueError) as error:  # none of these is one
            check_checkpoint(file.parent)
        assert "\n" not in str(error.value)

    in_a_file(raw, "manifest.json", check)


@often
@given(
    raw=st.binary(max_size=60) | values.map(lambda v: yaml.safe_dump(v).encode("utf-8", "surrogatepass")),
    end=texts,
)
def test_any_earlier_settings_are_a_dictionary_and_a_step(raw, end):
    content = raw + b"\n" + FINISHED.encode() + end.encode("utf-8", "surrogatepass")
    before, step = in_a_file(content, "config.yaml", lambda file: read_recorded_settings(file.parent))
    assert isinstance(before, dict) and step >= 0


@often
@given(
    steps=st.integers(1, 400),
    every=st.none() | st.integers(1, 500),
    epochs=st.none() | st.integers(1, 50),
    length=st.floats(0.1, 300),
)
def test_validation_is_due_within_the_run_and_at_its_end(steps, every, epochs, length):
    args = SimpleNamespace(validation_steps=every, validation_epochs=None if every else epochs)
    due = validation_schedule(args, steps, length)
    assert steps in due and min(due) >= 1 and max(due) == steps
    assert not every or all(step % every == 0 for step in due - {steps})


@often
@given(names=st.sets(st.text("0123456789-²１ab", max_size=8), max_size=6))
def test_only_folders_with_whole_numbers_are_checkpoints(names):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            Path(folder, f"checkpoint-{name}").mkdir()
        checkpoints = list_checkpoints(Path(folder))
    numbers = [int(p.name.removeprefix("checkpoint-")) for p in checkpoints]
    assert numbers == sorted(numbers, reverse=True)
    assert {p.name for p in checkpoints} == {
        f"checkpoint-{n}" for n in names if n and n.isascii() and n.isdigit()
    }
