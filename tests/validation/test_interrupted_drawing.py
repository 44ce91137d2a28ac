"""Weights are there before the last pictures, and what a run was killed in is made up for."""

from __future__ import annotations

import errno

import pytest
from conftest import QUICKEST, SAMPLE, metrics, run_here
from safetensors.torch import load_file

from lora_training.validation import probes, sample_images

pytestmark = pytest.mark.faults

LORA = "pytorch_lora_weights.safetensors"
DRAWING = ("-d", SAMPLE, "--num_validation_images", 1, "--validation_inference_steps", 1)
DRAWING += ("--max_train_steps", 2, "--validation_steps", 2)
ODD_PROMPTS = (
    "a\ncircle",
    "two\r\n\tcircles",
    "a\u2028b",
    "🎉 {name} %s",
    "../../etc/passwd",
    "word " * 3000,
)


def test_odd_prompts_cost_no_lora(tmp_path):
    output = tmp_path / "x"
    assert run_here(QUICKEST, output, *DRAWING, "--validation_prompt", *ODD_PROMPTS) == 0
    assert (output / LORA).exists() and (output / "comparison.png").exists()
    assert len(list((output / "samples" / "step-000002").glob("0*.png"))) == len(ODD_PROMPTS)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), ValueError("a picture"), MemoryError()]
)
def test_the_lora_is_there_whatever_befalls_the_last_pictures(tmp_path, monkeypatch, error):
    original, output = sample_images.draw_samples, tmp_path / "x"

    def fail_at_the_end(run, step):
        if step == run.max_steps:
            raise error
        return original(run, step)

    with monkeypatch.context() as patch:
        patch.setattr(sample_images, "draw_samples", fail_at_the_end)
        assert run_here(QUICKEST, output, *DRAWING) == 1
    assert load_file(output / LORA) and not (output / "comparison.png").exists()
    if isinstance(error, ValueError):  # the others have left the same
        assert run_here(QUICKEST, output, *DRAWING, "--resume_from_checkpoint", "latest") == 0  # draws them
        assert (output / "comparison.png").exists()
        assert [row["step"] for row in metrics(output) if "learned" in row] == [2]


class Killed(BaseException):
    """The end of a process."""


KILLED_IN = {  # where a run is killed: (class or module, function, at which of its calls in step 2)
    "before its pictures": (sample_images, "draw_samples", 1),
    "after one picture": (sample_images, "save_sample", 2),
    "before its row": (probes.Probe, "measure", 1),
}


@pytest.mark.parametrize("moment", KILLED_IN)
def test_a_run_killed_in_a_validation_gets_its_pictures_and_its_row(tmp_path, monkeypatch, moment):
    owner, name, last_call = KILLED_IN[moment]
    original, steps = getattr(owner, name), []

    def killed_at_step_2(*arguments):
        steps.append(2 if name == "measure" else arguments[1])
        if steps[-1] == 2 and steps.count(2) == last_call:
            raise Killed
        return original(*arguments)

    output = tmp_path / "x"
    flags = (*DRAWING, "--validation_prompt", "a circle", "a square", "--max_train_steps", 3)
    flags += ("--skip_final_inference",)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, killed_at_step_2)
        run_here(QUICKEST, output, *flags)
    assert run_here(QUICKEST, output, *flags, "--resume_from_checkpoint", "checkpoint-2") == 0
    assert [row["step"] for row in metrics(output) if "learned" in row] == [2, 3]
    assert len(list((output / "samples" / "step-000002").glob("0*.png"))) == 2
