"""Nobody waits in silence: bars and lines of what takes long, and what stands at the end of a run, however it
ended.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import QUICKEST, ROOT, SAMPLE, SD15, quick_flags, run_here, same_weights

from lora_training.console import print_status, progress
from lora_training.training.metrics import MetricsLogger

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("processes")]

SLOW = {  # functions of a run, each slowed once, and what must be on the screen meanwhile
    "libraries.import_training_libraries": "importing",
    "DiffusionPipeline.download": "downloading some/base",
    "data.image_store.measure_example": "images",
    "AutoencoderKL.from_pretrained": "loading vae",
    "data.latents.encode_pixels": "latents",
    "recipe.encode_prompts": "captions for clip_l",
    "lora.adapters.add_lora": "adding the LoRA",
    "validation.probes:Probe.evaluate": "probes of the base",
    "validation.sample_images.draw_latents": "control pictures",
    "Accelerator.init_trackers": "starting the trackers",
    "validation.sample_images.decode_latents": "control pictures",
    "validation.sample_images.draw_images": "pictures at step 0",
    "recipe.backward": "training",
    "training.checkpoints.write_weights": "training",
    "report.results.comparison_image": "writing the results",
}
NEVER_IN_A_BAR = re.compile(r"(\d\d:\d\d|s/it\]|it/s\]).*(LoRA  |step \d+: learned|median)")


def read_terminal(terminal: int, process, seconds: float) -> list[tuple[float, str]]:
    """(time, text) of what a process writes to a terminal, until it ends."""
    parts, limit = [], time.monotonic() + seconds
    while time.monotonic() < limit:
        if select.select([terminal], [], [], 0.05)[0]:
            parts.append((time.time(), os.read(terminal, 65536).decode(errors="replace")))
        elif process.exitcode is not None:
            break
    process.join(20)
    return parts


def test_no_part_of_a_run_is_silent_in_a_terminal(tmp_path):
    """A wait is noticed after 0.2 s here, not 2; each slowed part has its name on the screen, and the time
    moves.
    """
    from ready_process import start

    log = tmp_path / "slowed.jsonl"
    flags = ("-d", SAMPLE, "--num_validation_images", 1, "--validation_inference_steps", 1, "--cache_latents")
    flags += ("--report_to", "tensorboard", "-m", "some/base")
    argv = [SD15.base, *quick_flags(SD15, tmp_path / "x", *flags)]
    environment = {"SLOWED": json.dumps(list(SLOW)), "SLOWED_LOG": str(log)}
    terminal, side_of_the_process = pty.openpty()
    screen = Path(os.ttyname(side_of_the_process))
    process = start(ROOT / "tests" / "slowed_training.py", argv, environment, screen)
    parts = read_terminal(terminal, process, 200)
    os.close(side_of_the_process)
    os.close(terminal)
    text = "".join(part for _, part in parts)
    assert process.exitcode == 0, text[-3000:]
    waits = [json.loads(line) for line in log.read_text().splitlines()]
    assert {function for function, _, _ in waits} == set(SLOW)
    for function, begin, end in waits:
        meanwhile = "".join(part for at, part in parts if begin + 0.15 < at < end)
        assert SLOW[function] in meanwhile, (function, meanwhile)
    for line in re.split(r"[\r\n]+", text):  # lines stand alone: none begins or ends in a bar
        assert not NEVER_IN_A_BAR.search(line), line


def test_a_log_file_tells_of_a_long_wait_in_lines(capfd, monkeypatch):
    monkeypatch.setattr(progress, "appears_after", 0.2)
    with progress("loading the base"):
        time.sleep(0.7)
        print_status("a line")
    with progress("not noticed"):
        pass
    printed = capfd.readouterr()
    assert "loading the base 00:0" in printed.err and printed.err.count("\n") == 1
    assert "not noticed" not in printed.err
    assert printed.out == "a line\n"


def summary_lines(printed: str) -> dict[str, str]:
    """The summary's lines: {"LoRA": file, ..., "draw": command}."""
    names = "LoRA|for others|new tokens|pictures|report|draw|go on"
    lines = [line for line in printed.splitlines() if re.match(rf"({names})  +\S", line)]
    return {line[:12].strip(): line[12:] for line in lines}


def run_printed_command(line: str, folder: Path) -> str:
    """Runs a command that a run has printed, as typed in a folder; returns what it prints."""
    from ready_process import start

    python, program, *argv = shlex.split(line)
    assert python == sys.executable
    log = folder / "command.log"
    process = start(Path(program), argv, {}, log, folder)
    process.join(200)
    assert process.exitcode == 0, log.read_text()
    return log.read_text()


def test_the_last_lines_are_true_after_ctrl_c_at_the_end_and_of_a_finished_run(tmp_path, monkeypatch, capsys):
    """Its files exist and its commands run, from the folder in which the run was started."""
    monkeypatch.chdir(tmp_path)
    original, output = MetricsLogger.log, tmp_path / "it's mine"

    def log_and_signal(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step, *rest)

    flags = ("-d", SAMPLE, "--max_train_steps", 4, "--checkpointing_steps", 4, "--seed", 3)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "log", log_and_signal)
        assert run_here(QUICKEST, output, *flags) == 130
    printed = capsys.readouterr().out
    shown = summary_lines(printed)
    assert "stopped by signal 2 (SIGINT) after step 2; checkpoint-2 is written" in printed
    assert Path(shown["LoRA"]) == output / "checkpoint-2" / "pytorch_lora_weights.safetensors"
    assert all(Path(shown[name]).exists() for name in ("LoRA", "for others"))
    small = " --num_inference_steps 1 --paths.infer_path drawn"
    assert "000_scale1_000.png" in run_printed_command(shown["draw"] + small, tmp_path)
    shown = summary_lines(run_printed_command(shown["go on"], tmp_path))
    assert all(Path(shown[name]).exists() for name in ("LoRA", "for others"))
    assert "000_scale1_000.png" in run_printed_command(shown["draw"] + small, tmp_path)
    assert run_here(QUICKEST, tmp_path / "whole" / "x", *flags) == 0
    assert same_weights(tmp_path / "whole" / "x", output)
    capsys.readouterr()
    file, resuming = output / "pytorch_lora_weights.safetensors", ("--resume_from_checkpoint", "latest")
    before = file.stat().st_mtime_ns
    assert run_here(QUICKEST, output, *flags, *resuming) == 0
    printed = capsys.readouterr().out
    assert "this run is finished, at step 4" in printed and summary_lines(printed) == shown
    assert file.stat().st_mtime_ns == before
    assert run_here(QUICKEST, output, *flags, "--max_train_steps", 5, *resuming) == 0
    assert "median" in capsys.readouterr().out  # a longer run goes on
