"""A run's page: its sections, its settings, and a run that goes on."""

from __future__ import annotations

import re

import pytest
from run_folders import assert_safe, full_run, page_of, write_config, write_metrics

from lora_training.report import write_run_page
from lora_training.report.formatting import format_setting, is_same_setting
from lora_training.report.run_folder import read_metrics_by_name

pytestmark = pytest.mark.unit
# fmt: off
SHOWN = (
    "Take step 40: a sks circle", "warned: a sks circle", "2 steps were left out", "base", "finished",
    "60 steps", "Trained on", "seed 100", "control a sks circle", "512 × 768", "25% cropped", "12",
    "held out", "advised", "python train.py --rank 16", "torch 2.9, diffusers 0.39", "checkpoint-40",
    "3.0 MiB", "2.0 KiB", "metrics.jsonl",
)
# fmt: on


def test_a_full_run_has_every_section(tmp_path):
    folder = full_run(tmp_path / "mine")
    assert write_run_page(folder) == folder / "report.html"
    html, page = page_of(folder)
    assert_safe(html, page, folder)
    sections = re.findall(r'<section id="([a-z-]+)">', html)
    assert sections[:5] == ["verdict", "before-after", "samples", "control", "curves"]
    assert sections[5:] == ["data", "settings", "command", "files"]
    for text in SHOWN:
        assert text in page.text, text
    titles = re.findall(r"<h3>([^<]+)</h3><p>([^<]+)</p>", html)
    names = [name for name, _ in titles]
    assert names[:5] == ["Loss", "Learned and forgotten", "Held-out loss", "Gradient norm", "Learning rate"]
    assert names[5:] == ["Seconds per step", "Memory", "Steps left out"]
    assert all("ood" in about for _, about in titles)  # each says what is good
    assert not list(folder.glob(".*"))  # of a page that is being written


def test_only_settings_that_differ_from_the_defaults_are_in_the_open(tmp_path):
    html, _ = page_of(full_run(tmp_path / "mine"))
    changed = html[html.index('id="settings"') : html.index("<summary>All 5 settings")]
    assert (
        "<td>rank<td>16<td>4</tr>" in changed
        and "validation_prompt" in changed
        and "max_train_steps" in changed
    )
    assert "<td>learning_rate" not in changed and "<td>seed" not in changed
    write_config(tmp_path / "mine", {"rank": 16, "nothing": None, "list": [1, 2.5]})
    html, _ = page_of(tmp_path / "mine")
    settings = html[html.index('id="settings"') : html.index('id="command"')]
    assert "<summary>All 3 settings" in settings and "default" not in settings
    assert "<td>nothing<td>none" in settings and "<td>list<td>1, 2.5" in settings


def test_values_that_are_one_setting():
    assert (
        is_same_setting("1e-4", 0.0001)
        and is_same_setting([64], 64)
        and is_same_setting([1, "2"], (1, 2))
        and is_same_setting(None, None)
    )
    assert (
        not is_same_setting(True, 1.5)
        and not is_same_setting(None, 0)
        and not is_same_setting([1, 2], [1])
        and not is_same_setting("a", "b")
    )
    assert (
        format_setting(1e-4) == "0.0001"
        and format_setting(False) == "false"
        and format_setting({"a": "é"}) == '{"a": "é"}'
    )


def test_a_started_run_says_that_it_is_not_finished(tmp_path):
    write_metrics(tmp_path, [{"step": 10, "loss": 0.5}], cut='{"step": 20, "lo')
    write_config(tmp_path, {"max_train_steps": 350})
    html, page = page_of(tmp_path)
    assert "not finished" in page.text and "10 of 350 steps" in page.text
    assert read_metrics_by_name(tmp_path) == {"loss": [(10, 0.5)]}
    write_metrics(tmp_path, [{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.4}])
    assert "20 of 350 steps" in page_of(tmp_path)[1].text  # the page is written over
