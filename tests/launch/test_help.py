"""The help of run_lora_train."""

from __future__ import annotations

import sys

import pytest
from conftest import FAMILIES

from lora_training.launch import help
from scripts.start import train

pytestmark = pytest.mark.unit


def test_help_explains_families_and_twenty_flags(capsys):
    assert set(help.FAMILY_HELP) == {*FAMILIES, "auto"}
    assert len(help.USUAL_FLAGS) == 20
    assert train.main(["sdxl", "--help"]) == 0
    text = capsys.readouterr().out
    for name in (*FAMILIES, "--train_data_dir", "--rank", "--dry_run", "--help_all", "--config_file"):
        assert name in text
    assert "--adam_beta1" not in text and "(1024)" in text


def test_an_unknown_family_is_one_line(capsys):
    assert train.main(["sdxll", "--help"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did you mean sdxl?" in line


def test_a_python_that_is_too_old_for_the_flags_shows_the_rest(monkeypatch):
    monkeypatch.setattr(help, "OLDEST_PYTHON", (99, 0))
    text = help.format_help(None, "run_lora_train")
    assert help.SETTINGS_HELP in text and text.endswith(f"{help.NO_FLAGS_YET}\n")
    assert not help.training_scripts_start()


def test_all_flags_are_shown_once_the_packages_are_there(monkeypatch, capsys):
    monkeypatch.setattr(help, "training_scripts_start", lambda: False)
    assert train.main(["--help_all"]) == 0
    assert capsys.readouterr().out.endswith(f"{help.NOT_ALL_FLAGS_YET}\n")
    commands = []
    monkeypatch.setattr(help, "training_scripts_start", lambda: True)
    monkeypatch.setattr(train, "become", lambda command: commands.append(command) or 0)
    assert train.main(["flux", "--help_all"]) == 0
    assert commands == [[sys.executable, str(train.ROOT / FAMILIES["flux"].script), "--help"]]
