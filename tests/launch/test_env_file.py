"""Settings in .env files."""

from __future__ import annotations

import pytest
from conftest import ROOT

from lora_training.launch.env_file import merge_settings, read_env_file

pytestmark = pytest.mark.unit


def test_env_files_are_read_as_bash_read_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    (tmp_path / ".env").write_text(
        "# a comment\nexport MODEL_NAME=base # why\nVAE_NAME='a b'\nOUTPUT_DIR=~/out\n"
        "HF_HOME=$HOME/hub\nEMPTY=\n"
        'VALIDATION_PROMPTS=("sks, a (small) cat" \'two\'  # first\n  "drei ü"\n)\nLAST="${MODEL_NAME}/x"\n',
        encoding="utf-8",
    )
    assert read_env_file(tmp_path / ".env") == {
        **{"MODEL_NAME": "base", "VAE_NAME": "a b", "OUTPUT_DIR": "/home/me/out", "HF_HOME": "/home/me/hub"},
        **{"EMPTY": "", "LAST": "base/x", "VALIDATION_PROMPTS": ["sks, a (small) cat", "two", "drei ü"]},
    }
    assert merge_settings(tmp_path / ".env", {"MODEL_NAME": "other"})["MODEL_NAME"] == "other"
    assert read_env_file(tmp_path / "none") == {}


def test_the_example_of_an_env_file_works_with_every_line_switched_on(tmp_path):
    lines = (ROOT / ".env.example").read_text().splitlines()
    (tmp_path / ".env").write_text("\n".join(line.removeprefix("# ") for line in lines if "=" in line[:24]))
    values = read_env_file(tmp_path / ".env")
    assert values["VALIDATION_PROMPTS"] == ["sks, a portrait in a garden", "sks, a drawing in ink"]
    assert (
        values["MODEL_NAME"] == "stabilityai/stable-diffusion-xl-base-1.0"
        and values["OUTPUT_DIR"] == "output/my_lora"
    )
