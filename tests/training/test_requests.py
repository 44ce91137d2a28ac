"""scripts/control.py: what it asks of a run that goes on."""

from __future__ import annotations

import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, SAMPLE, losses, run_here, weights

from lora_training.files import read_metrics
from lora_training.training.requests import received_requests, send_requests, take_requests
from scripts import control

pytestmark = pytest.mark.run
FLAGS = ("-d", SAMPLE, "--resolution", 64, "--max_train_steps", 40, "--seed", 5, "--train_batch_size", 2)
FLAGS += ("--validation_prompt", "a sks circle", "--num_validation_images", 1, "--validation_steps", 40)
FLAGS += ("--validation_inference_steps", 2, "--checkpointing_steps", 100)


def run_asked(output, *requests: str) -> tuple[int, list[int]]:
    """(exit code of a run, those of control.py) of a run that is asked after its second step."""
    codes = []

    def ask() -> None:
        while len(read_metrics(output)) < 2:
            time.sleep(0.01)
        codes.append(control.main([str(output), *(f"--{name}" for name in requests)]))

    thread = threading.Thread(target=ask)
    thread.start()
    code = run_here(FAMILIES["sd15"], output, *FLAGS)
    thread.join(30)
    return code, codes


def test_a_run_asked_to_draw_and_to_save_goes_on_as_one_that_was_not(tmp_path):
    assert run_asked(tmp_path / "asked", "sample", "save") == (0, [0])
    drawn = sorted(folder.name for folder in (tmp_path / "asked" / "samples").iterdir())
    assert len(drawn) == 3 and drawn[0] == "step-000000" and drawn[2] == "step-000040"
    step = int(drawn[1].removeprefix("step-"))
    assert list((tmp_path / "asked" / "samples" / drawn[1]).glob("00_00_*.png"))
    assert (tmp_path / "asked" / f"checkpoint-{step}" / "manifest.json").is_file()
    assert (
        f"step {step}: control.py asks to sample and to save" in (tmp_path / "asked" / "log.txt").read_text()
    )
    assert run_here(FAMILIES["sd15"], tmp_path / "plain", *FLAGS) == 0
    asked, plain = weights(tmp_path / "asked"), weights(tmp_path / "plain")
    assert all(torch.equal(asked[name], plain[name]) for name in plain)
    assert losses(tmp_path / "asked") == losses(tmp_path / "plain")


def test_a_run_asked_to_stop_saves_and_goes_on_later(tmp_path):
    code, (answer,) = run_asked(tmp_path / "x", "stop", "skip_validation")
    assert (code, answer) == (143, 0)
    assert len(list((tmp_path / "x").glob("checkpoint-*"))) == 1
    assert run_here(FAMILIES["sd15"], tmp_path / "x", *FLAGS, "--resume_from_checkpoint", "latest") == 0
    assert len(losses(tmp_path / "x")) == 40


def fake_run(output, processes=1, gathered=None):
    """What `received_requests` needs of a run."""
    accelerator = SimpleNamespace(
        num_processes=processes, is_main_process=True, device="cpu", gather=gathered or (lambda own: own)
    )
    return SimpleNamespace(
        args=SimpleNamespace(output_dir=str(output)),
        accelerator=accelerator,
        stop=SimpleNamespace(number=0),
        skips_pictures=False,
        validation_steps=set(),
        pictures=SimpleNamespace(steps=set()),
    )


def test_several_processes_agree_every_ten_steps(tmp_path):
    """A signal to one and a request to the main one are known to all."""
    other = torch.tensor([15, 0, 0, 0, 0])
    run = fake_run(tmp_path, 2, lambda own: torch.cat([own, other]))
    send_requests(tmp_path, ["save", "sample"])
    assert received_requests(run, 9) == (0, False)
    assert received_requests(run, 10) == (15, True)
    assert run.validation_steps == run.pictures.steps == {10}
    assert received_requests(run, 20) == (15, False) and not run.skips_pictures


def test_asking_twice_is_asking_once_and_a_step_without_requests_asks_the_disk_once(tmp_path, monkeypatch):
    send_requests(tmp_path, ["save"]), send_requests(tmp_path, ["save", "skip_validation"])
    assert take_requests(tmp_path, ("skip_validation",)) == {"skip_validation"}
    assert take_requests(tmp_path) == {"save"}
    calls, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: calls.append(a) or stat(*a, **k))
    assert take_requests(tmp_path) == set() and len(calls) <= 1


def test_nobody_is_asked_where_no_run_is(tmp_path, capsys):
    assert control.main([str(tmp_path / "nowhere"), "--save"]) == 2
    assert control.main([str(tmp_path)]) == 2
    assert control.main([str(tmp_path), "--save"]) == 2
    (tmp_path / ".lock_owner").write_text(f"process 99999999 on {socket.gethostname()} since 2026")
    assert control.main([str(tmp_path), "--save"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "no such folder" in errors[0] and "--sample, --save, --stop" in errors[1]
    assert all(line.endswith("no run writes there now") for line in errors[2:]) and len(errors) == 4
    (tmp_path / ".lock_owner").write_text(f"process {os.getpid()} on {socket.gethostname()} since 2026")
    os.utime(tmp_path / ".lock_owner", (time.time() + 60,) * 2)
    assert control.main([str(tmp_path), "--save", "--wait", "0.2"]) == 1
    assert "not seen yet: save" in capsys.readouterr().out
