"""Configurations, files of several sets and tables of buckets: as people write them, and damaged."""

from __future__ import annotations

import json

import pytest
from conftest import SAMPLE
from toy_parts import arguments

from lora_training.errors import UserError

pytestmark = pytest.mark.faults


def test_config_file_with_unknown_key(recipe, tmp_path):
    (tmp_path / "c.yaml").write_text("learning_rat: 1\n")
    with pytest.raises(UserError, match="unknown key 'learning_rat'; the nearest is 'learning_rate'"):
        arguments(recipe, "--config", tmp_path / "c.yaml")


def test_command_line_wins_over_config_file(recipe, tmp_path):
    values = {"rank": 8, "resolution": [64, 128], "center_crop": True, "learning_rate": 3e-4}
    (tmp_path / "c.json").write_text(json.dumps(values))
    args = arguments(recipe, "--config", tmp_path / "c.json", "--rank", 2)
    assert (args.rank, args.resolution, args.center_crop, args.learning_rate) == (2, [64, 128], True, 3e-4)


def test_a_files_key_that_has_no_effect_is_off_with_a_note(recipe, tmp_path, capsys):
    """Typed, the same flag is an error."""
    (tmp_path / "c.yaml").write_text("huber_c: 0.2\nvalidation_epochs: 2\nrank: 8\n")
    config = ("--config", tmp_path / "c.yaml")
    args = arguments(recipe, *config, "--num_validation_images", 0)
    assert (args.huber_c, args.validation_epochs, args.rank) == (0.1, None, 8)
    assert (args.settings["huber_c"], args.settings["validation_epochs"]) == (0.1, None)
    printed = capsys.readouterr().out
    assert "huber_c of the --config file is off: --huber_c has no effect without --loss_type" in printed
    assert arguments(recipe, *config, "--loss_type", "huber").huber_c == 0.2
    with pytest.raises(UserError, match="--huber_c has no effect without --loss_type huber"):
        arguments(recipe, *config, "--huber_c", 0.2)


@pytest.mark.parametrize(
    ("in_file", "typed", "off"),
    [
        ("validation_epochs: 1", ("--validation_steps", 5), "validation_epochs"),
        ("validation_steps: 5", ("--validation_epochs", 1), "validation_steps"),
        ("dataset_name: some/pictures", (), "dataset_name"),  # -d is typed
        ("instance_data_dir: DATA\ninstance_prompt: a", (), "instance_data_dir"),
    ],
)
def test_a_typed_flag_wins_over_the_files_that_excludes_it(recipe, tmp_path, capsys, in_file, typed, off):
    (tmp_path / "c.yaml").write_text(in_file.replace("DATA", str(SAMPLE)))
    args = arguments(recipe, "--config", tmp_path / "c.yaml", *typed)
    assert vars(args)[off] is None and args.settings[off] is None and args.train_data_dir
    assert f"note: {off} of the --config file is off: " in capsys.readouterr().out
    assert all(vars(args)[name.lstrip("-")] == value for name, value in zip(typed[::2], typed[1::2]))


def test_a_file_that_contradicts_itself_is_refused(recipe, tmp_path):
    (tmp_path / "c.yaml").write_text("validation_epochs: 1\nvalidation_steps: 5\n")
    with pytest.raises(UserError, match="--validation_steps and --validation_epochs exclude each other"):
        arguments(recipe, "--config", tmp_path / "c.yaml")


CONFIGS = {  # text of a configuration; what the line says, or None if it is taken
    "rank: [4, 8]": "rank takes one value",
    "run_name: {a: b}": "run_name takes one value",
    "learning_rate: [1e-4]": "learning_rate takes one value",
    "validation_prompt: {a: b}": "validation_prompt takes values in one list",
    "validation_prompt: [[a, b], c]": "validation_prompt takes values in one list",
    "trigger_word: yes": "trigger_word takes text: put true in quotes",
    "use_dora: 1": "use_dora must be true or false",
    "rank: true": "invalid count value: 'True'",
    "a: [1, 2": "not YAML or JSON",
    "run_name: 2001-99-99": "not YAML or JSON",
    "[" * 2000: "not YAML or JSON",
    "seed: 0x": "invalid int value",
    "mixed_precision: no": None,
    "resolution: [64, 64]": None,
    "validation_prompt: a circle": None,
}


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:30])
def test_configurations_with_values_of_another_kind(recipe, tmp_path, capsys, text):
    (tmp_path / "c.yaml").write_text(text)
    flags = ("--config", tmp_path / "c.yaml", "--num_validation_images", 0)
    if CONFIGS[text] is None:
        arguments(recipe, *flags)
        return
    with pytest.raises((UserError, SystemExit)) as refusal:
        arguments(recipe, *flags)
    assert CONFIGS[text] in f"{refusal.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("raw", [b"\xff\xfe\x00rank", b"rank: 4\x00", "rank: 4".encode("utf-16")])
def test_a_configuration_that_is_no_text(recipe, tmp_path, raw):
    (tmp_path / "c.yaml").write_bytes(raw)
    with pytest.raises(UserError, match="^--config "):
        arguments(recipe, "--config", tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        ("[]", "no set in it"),
        ('[{"train_data_dir": "DATA", "resolutions": 5}]', "--resolution 5 is not divisible"),
        ('[{"train_data_dir": "DATA", "resolutions": {"a": 1}}]', "resolution takes values in one list"),
        ('[{"train_data_dir": "DATA", "resolutions": [null, [1, 2, 3]]}]', "one number, or width and height"),
        ('[{"train_data_dir": null}]', "no data"),
        ('["a"]', "unknown key 'a'"),
    ],
)
def test_sets_that_cannot_be_meant(recipe, tmp_path, sets, reason):
    (tmp_path / "s.yaml").write_text(sets.replace("DATA", str(SAMPLE)))
    with pytest.raises(UserError, match=f"--dataset_config .*{reason}"):
        recipe.parse_args(["-m", "base", "--dataset_config", str(tmp_path / "s.yaml")])


def test_a_class_sets_weight_is_taken(recipe, tmp_path):
    sets = [{"train_data_dir": str(SAMPLE)}, {"train_data_dir": str(SAMPLE), "class_prompt": "a circle"}]
    file = tmp_path / "s.yaml"
    argv = ["-m", "base", "--dataset_config", str(file), "--prior_loss_weight", "0.5"]
    file.write_text(json.dumps(sets))
    assert recipe.parse_args(argv).prior_loss_weight == 0.5
    file.write_text(json.dumps(sets[:1]))
    with pytest.raises(UserError, match="--prior_loss_weight has no effect without"):
        recipe.parse_args(argv)


@pytest.mark.parametrize(
    "raw", [b"[" * 50_000, b'{"resolution": Infinity, "aspect_ratio_buckets": "64,64"}', b"\xff\xfe", b"[]"]
)
def test_a_damaged_table_of_buckets_is_named(recipe, pictures, raw):
    (pictures / "buckets.json").write_bytes(raw)
    with pytest.raises(UserError, match="buckets.json: has no resolution"):
        arguments(recipe, "-d", pictures)
