"""--help and --help_all of wrappers, training scripts and commands."""

from __future__ import annotations

import re
import sys

import pytest
from conftest import FAMILIES, load_script

from lora_training.flag_help import USUAL_FLAGS
from lora_training.launch import help
from lora_training.prepare.arguments import read_settings
from scripts.lora import convert_lora
from scripts.start import tests, train

pytestmark = pytest.mark.unit


def test_help_explains_families_and_twenty_flags(capsys):
    assert set(help.FAMILY_HELP) == {*FAMILIES, "auto"}
    assert len(USUAL_FLAGS) == 20
    assert train.main(["sdxl", "--help"]) == 0
    text = capsys.readouterr().out
    for name in (*FAMILIES, "--train_data_dir", "--rank", "--dry_run", "--help_all", "--config_file"):
        assert name in text
    assert "--adam_beta1" not in text and "(1024)" in text


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_training_scripts_help_has_the_twenty_flags_and_names_help_all(name, capsys):
    """It had all of them, and --help_all was an unknown flag."""
    texts = {}
    for flag in ("--help", "-h", "--help_all"):
        with pytest.raises(SystemExit) as end:
            load_script(FAMILIES[name].script).parse_args([flag])
        assert end.value.code == 0
        texts[flag] = capsys.readouterr().out
    assert texts["--help"] == texts["-h"] and "--help_all shows all" in texts["--help"]
    shown = set(re.findall(r"^  (?:-\w \w+, )?--(\w+)", texts["--help"], re.MULTILINE))
    assert shown == set(USUAL_FLAGS) and len(texts["--help"].splitlines()) < 60
    assert "--adam_beta1" not in texts["--help"]
    for flag in ("--adam_beta1", "--min_timestep", "--help_all", "--dry_run"):
        assert f"\n  {flag}" in texts["--help_all"]


def test_help_all_is_taken_by_every_command(capsys):
    """prepare_dataset.py's has the parameters of the steps; of what has few flags, it is the help."""
    assert "min_aspect_ratio" in help_of(read_settings, "--help_all", capsys)
    short = help_of(read_settings, "--help", capsys)
    assert "min_aspect_ratio" not in short and "--image_filtering" in short and "--help_all" in short
    draws = load_script("infer_lora.py").read_settings
    assert help_of(draws, "--help_all", capsys) == help_of(draws, "--help", capsys)
    for command in (convert_lora.main, tests.main):
        assert help_of(command, "--help_all", capsys) == help_of(command, "--help", capsys)


def help_of(function, flag: str, capsys) -> str:
    """What a function prints that parses a command line."""
    with pytest.raises(SystemExit) as end:
        function([flag])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_an_unknown_family_is_one_line(capsys):
    assert train.main(["sdxll", "--help"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean sdxl?" in line


def test_all_flags_are_shown_by_the_script_itself(monkeypatch):
    commands = []
    monkeypatch.setattr(train, "become", lambda command: commands.append(command) or 0)
    assert train.main(["flux", "--help_all"]) == 0
    assert commands == [[sys.executable, str(train.ROOT / FAMILIES["flux"].script), "--help_all"]]
