"""Any flag, configuration and prompt file is taken or refused in a line, by hypothesis.

The examples are the same in every run.
"""

from __future__ import annotations

import argparse
import math
from importlib import import_module
from pathlib import Path

import pytest
from conftest import SAMPLE
from hypothesis import example, given
from hypothesis import strategies as st
from properties import in_a_file, often, or_refused, seldom, texts, values

from lora_training.cli.parser import config_to_argv
from lora_training.cli.parsing import make_parser
from lora_training.cli.prompt_files import PROMPT_KEYS, read_prompts
from lora_training.errors import UserError
from lora_training.families import FAMILIES

pytestmark = pytest.mark.faults


RECIPES = {name: import_module(Path(family.training_script).stem) for name, family in FAMILIES.items()}
PARSERS = [
    make_parser(recipe.FAMILY, recipe.add_family_args, recipe.FOREIGN_FLAGS, recipe.LORA_TARGETS, 25, 5.0)
    for recipe in RECIPES.values()
]
ACTIONS = [action for parser in PARSERS for action in parser._actions]
FLAGS = {name: action for action in ACTIONS for name in action.option_strings if name.startswith("--")}
CONVERTED = {action.type.__name__: action.type for action in FLAGS.values() if action.type}
LIMITS = {"share": (0, 1), "learning rate": (0, 100), "amount": (0, 1e9), "count": (1, 2**31 - 1)}


@pytest.mark.parametrize("name", sorted(CONVERTED))
@seldom
@given(text=texts | st.floats().map(str) | st.integers().map(str))
def test_a_flags_type_gives_a_value_within_its_limits_or_refuses(name, text):
    try:
        value = CONVERTED[name](text)
    except (argparse.ArgumentTypeError, ValueError):  # which argparse tells in one line
        return
    if isinstance(value, float):
        assert math.isfinite(value)
    low, high = LIMITS.get(name, (None, None))
    assert low is None or low <= value <= high


@seldom
@given(flag=st.sampled_from(sorted(FLAGS)), arguments=st.lists(texts, max_size=3))
@example(flag="--masked_loss", arguments=[""])
@example(flag="--initializer_concept", arguments=["\0"])
@example(flag="--dry_run", arguments=["", " "])
def test_any_flag_with_any_words_is_taken_or_refused_in_a_line(flag, arguments):
    argv = ["-m", "nowhere/base", "-d", str(SAMPLE), flag, *arguments]
    try:
        args = RECIPES["sd15"].parse_args(argv)
    except UserError as error:
        assert str(error).strip()
    except SystemExit as end:
        assert end.code in (0, 2)  # 0: --help
    else:
        assert args.resolution and args.output_dir


@often
@given(key=st.sampled_from(sorted(FLAGS)) | st.text(max_size=12), value=values)
def test_any_value_in_a_configuration_is_taken_or_refused_in_a_line(key, value):
    entry = {key.removeprefix("--"): value}
    argv = or_refused(lambda: config_to_argv(PARSERS[0], entry, "--config c.yaml"))
    assert argv is None or all(isinstance(argument, str) for argument in argv)


@often
@given(text=st.text(alphabet="ab -nwhdslg0123.\n#x", max_size=60) | st.text(max_size=60))
@example(text="a circle --w 64 --h 64 --d 3 --s 2 --l 2.5")
@example(text="a --n\na --d")
def test_any_prompt_file_gives_prompts_of_the_known_settings_or_is_refused(text):
    entries = in_a_file(text, "p.txt", lambda file: or_refused(lambda: read_prompts(str(file), 8)))
    for entry in entries or []:
        assert entry["prompt"].strip() and entry.keys() <= PROMPT_KEYS.keys()
        assert all(entry.get(side, 8) % 8 == 0 for side in ("width", "height"))
