"""Settings declared as pydantic models: what flags and files say, beside what the tests of commands ask."""

from __future__ import annotations

import pytest

from lora_training import inference
from lora_training.errors import UserError
from lora_training.prepare.settings import Settings
from lora_training.settings import SettingsParser, file_values, validate

pytestmark = pytest.mark.unit


def drawing(*argv: str, **content: object):
    """The settings of a drawing from a file's content and flags."""
    parser = SettingsParser(inference.Settings, prog="x")
    values = {"paths.base_model_path": "base", "prompt": "a"}
    values |= file_values(content, inference.Settings, "c.yaml")
    flags = parser.read(list(argv))[1]
    return validate(inference.Settings, values | flags, "c.yaml", flags)


def test_flags_are_taken_as_people_write_them():
    settings = drawing("--prompt", "a cat, red", "[b] dog", "--grid", "--compile", "no", "--seed", "-1")
    assert settings.prompt == ["a cat, red", "[b] dog"] and settings.grid and not settings.compile
    assert settings.seed == -1
    assert drawing("--prompt", "[a, b]").prompt == ["a", "b"] and drawing("--prompt", "null").prompt == "null"
    assert drawing("--adapter_scale", "0.5", "1").adapter_scale == [0.5, 1.0]
    assert (
        drawing("--checkpoints", "100").checkpoints == 100
        and drawing("--checkpoints=all").checkpoints == "all"
    )
    loras = drawing("--paths.lora_weights_path", "[{path: a, weight: 0.8}, b]")
    assert inference.settings.list_adapters(loras) == [("a", 0.8), ("b", 1.0)]


def test_flags_win_over_files_and_null_turns_off():
    content = {
        "paths": None,
        "resolution": {"width": 64},
        "resolution.height": 72,
        "seed": 3,
        "scheduler": "",
    }
    settings = drawing("--resolution.width=80", "--seed", "null", **content)
    assert (settings.resolution.width, settings.resolution.height) == (80, 72)
    assert settings.seed is None and settings.scheduler is None
    assert drawing("--seed", "", "--negative_prompt", "~", seed=3).seed is None
    assert drawing("--negative_prompt", "").negative_prompt == ""
    assert drawing("--paths.infer_path", "[a]").paths.infer_path == "[a]"
    with pytest.raises(UserError, match=r"^c.yaml: seed: input should be a valid integer"):
        drawing("--grid", "false", seed="x")
    with pytest.raises(UserError, match=r"^--grid: input should be a valid boolean.* found 'x'$"):
        drawing("--grid", "x", grid=True)


def test_names_and_steps_of_the_preparation():
    parser = SettingsParser(Settings, prog="x")
    argv = "-d in --output_path out --data_split test -m base --resolution 512 768 --doctor --auto_caption"
    step = ["--image_filtering", "min_size=3", "blur_threshold=null", "--auto_tagging", "exclude_tags=a b, 3"]
    flags = parser.read([*argv.split(), *step])[1]
    settings = validate(Settings, flags, None, flags)
    assert (settings.data_dir, settings.output_dir, settings.dataset_split) == ("in", "out", "test")
    assert (settings.pretrained_model_name_or_path, settings.resolution) == ("base", [512, 768])
    assert settings.doctor and settings.auto_caption.model_name and settings.image_resizing is None
    assert (settings.image_filtering.min_size, settings.image_filtering.blur_threshold) == (3, None)
    assert settings.auto_tagging.exclude_tags == ["a b", "3"]
