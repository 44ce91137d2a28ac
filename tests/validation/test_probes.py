"""What a run says it has learned and forgotten, and the step it advises, agree with a judge of pictures."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from conftest import FAMILIES, QUICKEST, SAMPLE, Studio, load_script, metrics, quick_flags, run_here

from lora_training.validation.probes import Probe
from lora_training.validation.verdicts import make_verdict

SMILEY = ("sks circle", ("smiley", None), ("yellow",))
RATES = {"sd15": 1e-2, "sd3": 1e-2}  # several times the usual ones: trained to ruin within these steps
STEPS = 150  # by then much is lost


def ranks(values: list[float]) -> list[float]:
    """Their places in order; equal ones share the mean of theirs."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def spearman(first: list[float], second: list[float]) -> float:
    """The correlation of two lists' ranks."""
    return torch.corrcoef(torch.tensor([ranks(first), ranks(second)]))[0, 1].item()


@pytest.mark.learn
@pytest.mark.parametrize("name", sorted(RATES))
def test_the_advised_step_is_the_judges(name, tmp_path):
    family = FAMILIES[name]
    studio, output = Studio(family), tmp_path / "x"
    flags = ("-d", SAMPLE, "--rank", 16, "--lora_layers", *family.lora_layers, "--learning_rate", RATES[name])
    flags += ("--max_train_steps", STEPS, "--validation_steps", 50, "--train_batch_size", 8, "--seed", 1)
    flags += ("--cache_latents", "--num_validation_images", 1, "--skip_final_inference")
    flags += ("--validation_guidance_scale", 3, "--validation_inference_steps", 8, "--keep_best")
    flags += ("--control_prompt", "a red square on a blue background", "a green star on a white background")
    assert run_here(family, output, *flags) == 0
    rows = [row for row in metrics(output) if "learned" in row]
    assert [row["step"] for row in rows] == list(range(50, STEPS + 1, 50))
    worlds, means = [], []
    for row in rows:
        pipeline = studio.pipeline(output / f"checkpoint-{row['step']}", quick=True)
        worlds.append(studio.world_score(pipeline))
        means.append((studio.concept_score(pipeline, *SMILEY) + worlds[-1]) / 2)
    measured = [(row["step"], row["learned"], row["forgotten"]) for row in rows]
    table = list(zip(measured, worlds, means, strict=True))
    step = json.loads((output / "verdict.json").read_text())["step"]
    advised = means[[row["step"] for row in rows].index(step)]
    assert means[-1] < max(means) - 0.1, table  # over-trained, as it was meant to be
    assert advised >= max(means) - 0.05 and advised > means[-1], (step, table)
    assert spearman([row["forgotten"] for row in rows], worlds) <= -0.8 + 1e-6, table
    name = "pytorch_lora_weights.safetensors"
    assert (output / name).read_bytes() == (output / f"checkpoint-{step}" / name).read_bytes()


@pytest.mark.run
def test_probes_cost_little_and_nothing_without_pictures(tmp_path, monkeypatch):
    """Each probe is 8 + 4 passes without gradients; without pictures and held-out images there is none."""
    passes, original = [], Probe.evaluate

    def counted(self, *arguments):
        passes.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Probe, "evaluate", counted)
    flags = ("-d", SAMPLE, "--max_train_steps", 2, "--validation_steps", 1, "--validation_inference_steps", 1)
    drawing = ("--num_validation_images", 1, "--skip_final_inference")
    assert run_here(QUICKEST, tmp_path / "x", *flags, *drawing) == 0
    assert len(passes) == 3 * 12  # the base, and two validations
    passes.clear()
    assert run_here(QUICKEST, tmp_path / "y", *flags[:4]) == 0
    assert not passes and not (tmp_path / "y" / "verdict.json").exists()


@pytest.mark.run
def test_a_run_says_what_to_do_with_it(tmp_path, capsys):
    """The last lines name files that are there; config.yaml runs again, with the same settings."""
    output = tmp_path / "my lora"
    flags = ("-d", SAMPLE, "--trigger_word", "sks")
    flags += ("--num_validation_images", 1, "--validation_inference_steps", 1)
    assert run_here(QUICKEST, output, *flags) == 0
    lines = capsys.readouterr().out.splitlines()
    lines_by_name = {line[:12].rstrip(): line[12:] for line in lines}
    assert all((tmp_path / lines_by_name[name]).is_file() for name in ("LoRA", "pictures"))
    assert "draw" in lines_by_name
    assert any(line.startswith("advice: ") for line in lines)
    recipe = load_script(QUICKEST.script)
    again = recipe.parse_args(["--config", str(output / "config.yaml"), "-o", str(tmp_path / "again")])
    first = recipe.parse_args(quick_flags(QUICKEST, output, *flags))
    changed = {name for name in vars(first) if getattr(first, name) != getattr(again, name)}
    # where they come from: the command line, or a file
    assert changed <= {"config", "settings", "output_dir", "class_data_dir", "command_line_flags"}


@pytest.mark.unit
def test_verdict_in_words(tmp_path):
    def verdict(*rows, steps=400):
        lines = [{"step": step, "learned": a, "forgotten": b} | more for step, a, b, more in rows]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "metrics.jsonl").write_text(text + '{"step": 9')
        args = argparse.Namespace(output_dir=str(tmp_path))
        return make_verdict(argparse.Namespace(args=args, max_steps=steps, control_prompts=["a cat"]))

    early = verdict((100, 0.08, 0.15, {}), (200, 0.12, 0.2, {}), (400, 0.12, 0.6, {}))
    assert early["step"] == 200 and "100% of what was learned, and 67% less forgotten" in early["text"]
    last = verdict((200, 0.10, 0.2, {}), (400, 0.12, 0.2, {}))
    assert last["step"] == 400 and not last["warnings"]
    none = verdict((200, 0.001, 0.2, {}), (400, 0.002, 0.2, {}))
    assert "hardly anything was learned" in none["warnings"][0]
    chance = verdict((200, 0.0004, 0.5, {}), (400, 0.0001, 0.9, {}))  # nothing to choose from, and one advice
    assert chance["step"] == 400 and ["hardly" in line for line in chance["warnings"]] == [True]
    burnt = verdict((200, 0.2, 0.2, {}), (400, -0.5, 0.9, {}))
    assert burnt["step"] == 200 and "--learning_rate is too high" in burnt["warnings"][0]
    held_out = [{"held_out_loss": a, "learned_held_out": b} for a, b in ((0.10, 0.2), (0.12, 0.1))]
    risen = verdict((200, 0.2, 0.2, held_out[0]), (400, 0.4, 0.2, held_out[1]))
    assert "has risen since step 200" in risen["warnings"][0]
    assert "the LoRA bleeds" in verdict((400, 0.2, 0.7, {}))["warnings"][0]
    odd = verdict((200, 0.2, 0.2, {}), (400, "nan", "nan", {}))
    assert odd["step"] == 200 and [row["step"] for row in odd["rows"]] == [200]
    # and the LoRA is saved all the same
    assert verdict((400, "nan", 0.2, {})) is None and verdict() is None
