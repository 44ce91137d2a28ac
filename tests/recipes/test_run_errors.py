"""What people get wrong, as a run answers it: one line, and exit code 2."""

from __future__ import annotations

import pytest
from conftest import QUICKEST, ROOT, SAMPLE, losses, quick_flags, run_here

pytestmark = pytest.mark.faults


def one_line(capsys) -> str:
    """The single line on stderr, apart from the progress bar."""
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line.strip() and "training:" not in line
    ]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("flag", ["--lora_layers", "--lora_blocks"])
def test_lora_layer_that_matches_nothing(tmp_path, capsys, flag):
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, flag, "to_qq") == 2
    assert "matches no layer" in one_line(capsys)


@pytest.mark.parametrize("word", [None, "TOKYO", "a sTOK"])
def test_token_that_no_caption_has(tmp_path, capsys, word):
    flags = ("--trigger_word", word) if word else ()  # a part of a word is no word
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, "--train_text_encoder_ti", *flags) == 2
    assert "--token_abstraction TOK: no caption contains it" in one_line(capsys)


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run_here(QUICKEST, tmp_path / "file", "-d", SAMPLE) == 2
    assert "can't be written to" in one_line(capsys)


@pytest.mark.xdist_group("processes")
def test_full_disk_while_a_checkpoint_is_written(tmp_path):
    """A limit on file sizes stands in for a full disk: the second checkpoint is bigger than what is left."""
    from ready_process import start

    output, log = tmp_path / "x", tmp_path / "log"
    flags = ("-d", SAMPLE, "--checkpointing_steps", 2, "--max_train_steps", 2)
    assert run_here(QUICKEST, output, *flags) == 0
    flags = ("-d", SAMPLE, "--checkpointing_steps", 1, "--max_train_steps", 3)
    flags += ("--resume_from_checkpoint", "latest")
    argv = quick_flags(QUICKEST, output, *flags)
    process = start(ROOT / QUICKEST.script, argv, {}, log, file_limit=100_000)
    process.join(120)
    printed = log.read_text()
    assert process.exitcode == 2
    assert "checkpoint-3 could not be written" in printed.splitlines()[-1]
    assert "the last good checkpoint is checkpoint-2" in printed
    assert "Traceback" not in printed
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-2"]


def test_a_tracker_without_pictures_runs(tmp_path):
    flags = ("-d", SAMPLE, "--report_to", "tensorboard", "--max_train_steps", 2)
    assert run_here(QUICKEST, tmp_path / "x", *flags) == 0
    assert len(losses(tmp_path / "x")) == 2
