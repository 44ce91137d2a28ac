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


def test_all_flags_are_shown_by_the_script_itself(monkeypatch):
    commands = []
    monkeypatch.setattr(train, "become", lambda command: commands.append(command) or 0)
    assert train.main(["flux", "--help_all"]) == 0
    assert commands == [[sys.executable, str(train.ROOT / FAMILIES["flux"].script), "--help"]]
