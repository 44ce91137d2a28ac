"""Any setting of infer_lora.py is taken or refused in a line, by hypothesis."""

from __future__ import annotations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from properties import in_a_file, seldom, values

from infer_lora import read_settings
from lora_training.errors import UserError

pytestmark = pytest.mark.faults


@seldom
@given(key=st.sampled_from(["prompt", "seed", "paths", "resolution", "adapter_scale", "x"]), value=values)
def test_any_value_of_what_is_drawn_is_taken_or_refused_in_a_line(key, value):
    paths = {"base_model_path": "b/c", "lora_weights_path": "nowhere"}
    text = yaml.safe_dump({"paths": paths} | {key: value})
    with pytest.raises(UserError) as error:  # at the latest, for there is no such LoRA
        in_a_file(text, "c.yaml", lambda file: read_settings(["--config", str(file)]))
    assert "\n" not in str(error.value)
