"""Nobody waits in silence: bars and lines of what takes long, and what stands at the end of a run, however it ended."""

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
from conftest import FAMILIES, ROOT, SAMPLE, load_script, quick_flags, run_here, same_weights

from lora_training.console import print_status, progress
from lora_training.training.metrics import MetricsLogger

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("processes")]

# parts of a run, each slowed once, and what must be on the screen meanwhile
SLOW = {
    "lora_training.libraries:import_training_libraries": "importing",
    "huggingface_hub:snapshot_download": "downloading some/base",
    "lora_training.data.image_store:measure_example": "images",
    "diffusers:AutoencoderKL.from_pretrained": "loading vae",
    "lora_training.base_model.vae:encode_pixels": "latents",
    "recipe:encode_prompts": "captions for clip_l",
    "lora_training.lora.adapters:add_lora": "adding the LoRA",
    "lora_training.validation.probes:Probe.evaluate": "probes of the base",
    "lora_training.validation.drawing:draw_latents": "control pictures",
    "accelerate:Accelerator.init_trackers": "starting the trackers",
    "lora_training.validation.drawing:decode_latents": "control pictures",
    "lora_training.validation.drawing:draw_images": "pictures at step 0",
    "recipe:backward": "training",
    "lora_training.training.weights:write_weights": "training",
    "lora_training.validation.comparison:comparison_image": "writing the results",
}
SLOWED = """
import functools, importlib, importlib.util, json, sys, time
sys.path.insert(0, {root!r})
spec = importlib.util.spec_from_file_location("recipe", {script!r})
recipe = sys.modules["recipe"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
from lora_training.console import progress
progress.appears_after = 0.2
import huggingface_hub
huggingface_hub.snapshot_download = lambda *arguments, **options: {base!r}

def slow(place):
    module, path = place.split(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, begins = getattr(owner, name), []

    def slowly(*arguments, **options):
        if not begins:
            begins.append(time.time())
            time.sleep(0.5)
            with open({log!r}, "a") as log:
                log.write(json.dumps([place, begins[0], time.time()]) + "\\n")
        return original(*arguments, **options)

    setattr(owner, name, slowly)
    for other, loaded in list(sys.modules.items()):  # those that have imported it by its name
        if other.startswith(("lora_training", "recipe")) and vars(loaded).get(name) is original:
            setattr(loaded, name, slowly)

for place in {places!r}:
    slow(place)
main = recipe.main
"""


def test_no_part_of_a_run_is_silent_in_a_terminal(tmp_path):
    """A wait is noticed after 0.2 s here, not 2; each slowed part has its name on the screen, and the time moves."""
    from ready_process import start

    family, log = FAMILIES["sd15"], tmp_path / "slowed.jsonl"
    files = {"root": str(ROOT), "script": str(ROOT / family.script), "base": family.base, "log": str(log)}
    code = SLOWED.format(**files, places=list(SLOW))
    (tmp_path / "slowed.py").write_text(code)
    pictures = ("--num_validation_images", 1, "--validation_inference_steps", 2, "--cache_latents")
    flags = quick_flags(
        family, tmp_path / "x", "-d", SAMPLE, *pictures, "--report_to", "tensorboard", "-m", "some/base"
    )
    ours, its = pty.openpty()
    process = start(tmp_path / "slowed.py", flags, {}, Path(os.ttyname(its)))
    seen, limit = [], time.monotonic() + 200
    while time.monotonic() < limit:
        if select.select([ours], [], [], 0.05)[0]:
            seen.append((time.time(), os.read(ours, 65536).decode(errors="replace")))
        elif process.exitcode is not None:
            break
    process.join(20)
    os.close(its)
    os.close(ours)
    text = "".join(part for _, part in seen)
    assert process.exitcode == 0, text[-3000:]
    slowed = [json.loads(line) for line in log.read_text().splitlines()]
    assert {place for place, _, _ in slowed} == set(SLOW)
    for place, begin, end in slowed:
        meanwhile = "".join(part for at, part in seen if begin + 0.15 < at < end)
        assert SLOW[place] in meanwhile, (place, meanwhile)
    # lines stand alone: none begins or ends in a bar
    for line in re.split(r"[\r\n]+", text):
        assert not re.search(r"(\d\d:\d\d|s/it\]|it/s\]).*(LoRA  |step \d+: learned|median)", line), line


def test_a_log_file_tells_of_a_long_wait_in_lines(capfd):
    script = load_script("train_lora_sd15.py")
    before, progress.appears_after = progress.appears_after, 0.2
    try:
        with progress("loading the base"):
            time.sleep(0.7)
            print_status("a line")
        with progress("not noticed"):
            pass
    finally:
        progress.appears_after = before
    said = capfd.readouterr()
    assert "loading the base 00:0" in said.err and said.err.count("\n") == 1 and "not noticed" not in said.err
    assert said.out == "a line\n"


def lines_by_name(said: str) -> dict[str, str]:
    """The summary's lines: {"LoRA": file, …, "draw": command}."""
    names = "LoRA|for others|new tokens|pictures|report|draw|go on"
    return {line[:12].strip(): line[12:] for line in said.splitlines() if re.match(rf"({names})  +\S", line)}


def run_line(line: str, folder: Path) -> str:
    """Runs a command that a run has printed, as typed in a folder; returns what it says."""
    from ready_process import start

    python, program, *words = shlex.split(line)
    assert python == sys.executable
    process = start(Path(program), words, {}, folder / "said.log", folder)
    process.join(200)
    said = (folder / "said.log").read_text()
    assert process.exitcode == 0, said
    return said


@pytest.mark.families("flux")
def test_the_last_lines_are_true_after_ctrl_c_at_the_end_and_of_a_finished_run(
    family, script, tmp_path, monkeypatch, capsys
):
    """Its files exist and its commands run, from the folder in which the run was started."""
    monkeypatch.chdir(tmp_path)
    original = MetricsLogger.log

    def log_and_signal(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step, *rest)

    output = tmp_path / "it's mine"
    flags = ("-d", SAMPLE, "--max_train_steps", 4, "--checkpointing_steps", 4, "--seed", 3)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLogger, "log", log_and_signal)
        assert run_here(family, output, *flags) == 130
    said = capsys.readouterr().out
    shown = lines_by_name(said)
    assert "stopped by signal 2 (SIGINT) after step 2; checkpoint-2 is written" in said
    assert Path(shown["LoRA"]) == output / "checkpoint-2" / "pytorch_lora_weights.safetensors"
    assert all(Path(shown[name]).exists() for name in ("LoRA", "for others"))
    small = " --num_inference_steps 1 --paths.infer_path drawn"
    assert "000_scale1_000.png" in run_line(shown["draw"] + small, tmp_path)
    shown = lines_by_name(run_line(shown["go on"], tmp_path))
    assert all(Path(shown[name]).exists() for name in ("LoRA", "for others"))
    assert "000_scale1_000.png" in run_line(shown["draw"] + small, tmp_path)
    assert run_here(family, tmp_path / "whole" / "x", *flags) == 0
    assert same_weights(tmp_path / "whole" / "x", output)
    capsys.readouterr()
    before = (output / "pytorch_lora_weights.safetensors").stat().st_mtime_ns
    assert run_here(family, output, *flags, "--resume_from_checkpoint", "latest") == 0
    again = capsys.readouterr().out
    assert "this run is finished, at step 4" in again and lines_by_name(again) == shown
    assert (output / "pytorch_lora_weights.safetensors").stat().st_mtime_ns == before
    assert run_here(family, output, *flags, "--max_train_steps", 5, "--resume_from_checkpoint", "latest") == 0
    assert "median" in capsys.readouterr().out  # a longer run goes on
