"""Pictures that no flag asks for take about a tenth of a run; what is trained and measured stays the same."""

from __future__ import annotations

import argparse
import shutil

import pytest
from conftest import (
    QUICKEST,
    SAMPLE,
    metrics,
    quick_flags,
    run_argv_here,
    run_here,
    same_weights,
    without_flag,
)
from PIL import Image, ImageChops
from toy_parts import arguments

from lora_training.validation import picture_budget, sample_images
from lora_training.validation.picture_budget import Choice, PictureBudget, cost, spread

LATEST = ("--resume_from_checkpoint", "latest")


def run_without_flags(output, *flags) -> int:
    """Runs a training that no flag tells how many pictures to draw."""
    argv = quick_flags(QUICKEST, output, "-d", SAMPLE, *flags)
    return run_argv_here(QUICKEST, without_flag(argv, "--num_validation_images"))


def drawn(output, step: int, pattern: str = "0*") -> list[str]:
    """The names of the pictures of a step."""
    return sorted(file.name for file in (output / "samples" / f"step-{step:06d}").glob(f"{pattern}.png"))


@pytest.fixture
def counted(monkeypatch):
    """(number of pictures, inference steps, size) of everything that is drawn."""
    calls, original = [], sample_images.draw_latents

    def draw_latents(pipeline, embeds, seeds, size, args, autocast):
        calls.append((len(seeds), args.validation_inference_steps, size))
        return original(pipeline, embeds, seeds, size, args, autocast)

    monkeypatch.setattr(sample_images, "draw_latents", draw_latents)
    monkeypatch.setattr("lora_training.validation.drawing.draw_latents", draw_latents)
    return calls


@pytest.mark.run
def test_a_smoke_run_of_two_steps_draws_few_and_short_pictures(tmp_path, counted, capsys):
    """24 pictures of 28 steps were drawn for two steps of training."""
    assert run_without_flags(tmp_path / "x", "--max_train_steps", 2) == 0
    assert sum(number for number, _, _ in counted) == 2 + 4 + 2  # at the start, for probes, at the end
    assert {steps for _, steps, _ in counted} == {4}
    assert drawn(tmp_path / "x", 0) == drawn(tmp_path / "x", 2) and len(drawn(tmp_path / "x", 0)) == 2
    assert (tmp_path / "x" / "comparison.png").exists()
    printed = capsys.readouterr().out
    assert printed.count("pictures: 2 at the start and at the end; --num_validation_images") == 1
    assert [row["step"] for row in metrics(tmp_path / "x") if "learned" in row] == [1, 2]


@pytest.mark.run
def test_a_dry_run_draws_one_picture_of_the_largest_bucket(pictures, tmp_path, counted, capsys):
    """It drew twelve, and on a real base took minutes for what it has to say."""
    flags = ("-d", pictures, "--dry_run", "--aspect_ratio_buckets", "64,64;64,96;96,64;48,48")
    assert run_without_flags(tmp_path / "x", *flags) == 0
    ((number, _, size),) = counted
    assert number == 1 and size in ((96, 64), (64, 96))
    printed = capsys.readouterr().out
    assert "s per picture" in printed and "pictures:" not in printed
    assert not (tmp_path / "x").exists()


@pytest.mark.resume
def test_what_is_drawn_changes_no_number_and_ends_with_before_and_after(tmp_path, monkeypatch, capsys):
    """With time enough the start is completed later, from its own weights; a resumed run keeps its number."""
    monkeypatch.setattr(picture_budget, "SHARE", 1e6)
    flags = ("--max_train_steps", 12, "--checkpointing_steps", 7, "--learning_rate", 1e-2, "--use_ema")
    flags += ("--ema_decay", 0.9, "--validation_inference_steps", 2)
    plain, output, asked = (tmp_path / name / "x" for name in ("plain", "drawn", "asked"))
    assert run_here(QUICKEST, plain, "-d", SAMPLE, *flags) == 0
    assert run_without_flags(output, *flags) == 0
    assert same_weights(plain, output)
    losses = [[row["loss"] for row in metrics(folder) if "loss" in row] for folder in (plain, output)]
    assert losses[0] == losses[1]
    printed = capsys.readouterr().out
    assert printed.count("8 at the start, after steps 6, 8, 10 and at the end, 4 of control prompts") == 1
    for step in (0, 6, 8, 10, 12):
        assert len(drawn(output, step)) == 8
    assert not drawn(output, 2) and not drawn(output, 4)
    assert len(drawn(output, 0, "control_*")) == len(drawn(output, 12, "control_*")) == 4
    assert (output / "comparison.png").exists()

    assert run_here(QUICKEST, asked, "-d", SAMPLE, "--num_validation_images", 4, *flags[-2:]) == 0
    for name in drawn(asked, 0, "*"):
        pair = [Image.open(folder / "samples" / "step-000000" / name) for folder in (asked, output)]
        assert max(high for _, high in ImageChops.difference(*pair).getextrema()) <= 2, name

    broken = tmp_path / "broken" / "x"
    shutil.copytree(output, broken)
    for place in (broken / "checkpoint-12", broken / "samples" / "step-000012"):
        shutil.rmtree(place)
    for file in [*broken.glob("checkpoint-1?"), *broken.glob("checkpoint-8")]:
        shutil.rmtree(file)
    for file in [*broken.glob("*.safetensors"), broken / "comparison.png"]:
        file.unlink()
    assert run_without_flags(broken, *flags, *LATEST) == 0
    assert same_weights(output, broken) and (broken / "comparison.png").exists()
    assert drawn(broken, 12, "*") == drawn(output, 12, "*")


def budget_of(
    tmp_path, first_step: int = 0, prompts: int = 2, max_steps: int = 1000, **more
) -> PictureBudget:
    """A run's budget before the first step; pictures take a second each."""
    defaults = {"validation_inference_steps": 25}
    settings = {"limits_pictures": True, "num_validation_images": 4, "validation_prompt": None}
    settings |= {"output_dir": str(tmp_path), "logging_steps": 1, "defaults": defaults} | defaults
    part = argparse.Namespace(name="embeddings", last_step=more.pop("pivot", max_steps))
    run = argparse.Namespace(
        args=argparse.Namespace(**settings | more), parts=[part], max_steps=max_steps, draws_comparison=True
    )
    run.sample_prompts, run.validation_steps = ["a", "b"][:prompts], {200, 400, 600, 800, 1000}
    budget = PictureBudget(run, first_step)
    budget.seconds_per_picture = 1.0
    return budget


@pytest.mark.unit
@pytest.mark.parametrize("prompts", [1, 2])
def test_as_many_pictures_as_fit_and_never_more(tmp_path, prompts):
    budget, least = budget_of(tmp_path, prompts=prompts), Choice(2, 0, 0)
    assert budget.at_a_time == 2 and budget.choose(0, 6, 4) == budget.choose(5, 6, 4) == least
    costs = []
    for seconds in range(6, 80):
        choice = budget.choose(seconds, 6, 4)
        costs.append(cost(choice, least))
        assert costs[-1] <= seconds
    assert costs == sorted(costs) and costs[0] == 6
    most = budget.choose(1e9, 6, 4)
    assert most == Choice(4 * prompts, 4, 4)


@pytest.mark.unit
def test_rounds_between_are_spread_evenly():
    steps = [200, 400, 600, 800]
    assert [spread(steps, count) for count in range(5)] == [[], [400], [400, 600], [200, 400, 800], steps]


@pytest.mark.unit
def test_a_start_that_cant_be_drawn_any_more_decides_how_many_there_are(tmp_path):
    """After the pivot the new tokens' start is gone, and a resumed run has its start's pictures."""
    assert budget_of(tmp_path, pivot=5).choose(1e9, 6, 4) == Choice(2, 4, 0)
    start = tmp_path / "samples" / "step-000000"
    start.mkdir(parents=True)
    for name in ("00_00", "00_01", "01_00", "01_01", "control_0", "control_1"):
        Image.new("RGB", (8, 8)).save(start / f"{name}_a.png")
    resumed = budget_of(tmp_path, first_step=400)
    assert (resumed.per_prompt, resumed.controls, resumed.draws_start) == (2, 2, False)
    assert resumed.choose(1e9, 406, 2) == Choice(4, 2, 2)
    assert budget_of(tmp_path / "none", first_step=400).draws_start
    (start / "00_01_a.png").write_bytes(b"damaged")
    redrawn = budget_of(tmp_path, first_step=400)
    assert (redrawn.per_prompt, redrawn.controls, redrawn.draws_start) == (1, 0, True)


@pytest.mark.unit
@pytest.mark.parametrize(
    ("flags", "is_limited"),
    [
        ((), True),
        (("--num_validation_images", 4), False),
        (("--validation_prompt", "a cat"), False),
        (("--validation_steps", 100), False),
        (("--validation_epochs", 1), False),
        (("--control_prompt", "a cat"), True),
    ],
)
def test_what_flags_ask_for_is_done_as_asked(recipe, flags, is_limited):
    args = arguments(recipe, *flags)
    assert (args.limits_pictures, args.num_validation_images) == (is_limited, 4)


@pytest.mark.unit
def test_a_run_with_more_steps_than_a_picture_keeps_its_quality(tmp_path):
    assert budget_of(tmp_path).inference_steps == 25 and budget_of(tmp_path).probed_steps == 8
    assert budget_of(tmp_path, max_steps=10).inference_steps == 10
    assert budget_of(tmp_path, max_steps=10, validation_inference_steps=30).inference_steps == 30
