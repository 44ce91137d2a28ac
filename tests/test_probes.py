"""What a run says it has learned and forgotten agrees with a judge of the pictures, and so does the step that it advises."""

import json

import pytest
from conftest import FAMILIES, KINDS, SAMPLE, load_script, metrics, quick_flags, run_here

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
    import torch

    return torch.corrcoef(torch.tensor([ranks(first), ranks(second)]))[0, 1].item()


@pytest.mark.learn
@pytest.mark.parametrize("name", sorted(RATES))
def test_the_advised_step_is_the_judges(name, tmp_path):
    from conftest import Studio

    family = FAMILIES[name]
    studio, output = Studio(family), tmp_path / "x"
    flags = ("-d", SAMPLE, "--rank", 16, "--lora_layers", *family.lora_layers, "--learning_rate", RATES[name])
    flags += (
        "--max_train_steps",
        STEPS,
        "--validation_steps",
        50,
        "--train_batch_size",
        8,
        "--cache_latents",
    )
    flags += (
        "--num_validation_images",
        1,
        "--skip_final_inference",
        "--validation_guidance_scale",
        3,
        "--seed",
        1,
    )
    flags += ("--control_prompt", "a red square on a blue background", "a green star on a white background")
    assert run_here(family, output, *flags, "--keep_best", "--validation_inference_steps", 8) == 0
    rows = [row for row in metrics(output) if "learned" in row]
    assert [row["step"] for row in rows] == list(range(50, STEPS + 1, 50))
    worlds, means = [], []
    for row in rows:
        pipeline = studio.pipeline(output / f"checkpoint-{row['step']}", quick=True)
        worlds.append(studio.world_score(pipeline))
        means.append((studio.concept_score(pipeline, *SMILEY) + worlds[-1]) / 2)
    table = [
        (r["step"], r["learned"], r["forgotten"], w, m) for r, w, m in zip(rows, worlds, means, strict=True)
    ]
    found = json.loads((output / "verdict.json").read_text())
    advised = means[[row["step"] for row in rows].index(found["step"])]
    assert means[-1] < max(means) - 0.1, table  # over-trained, as it was meant to be
    assert advised >= max(means) - 0.05 and advised > means[-1], (found["step"], table)
    assert spearman([row["forgotten"] for row in rows], worlds) <= -0.8 + 1e-6, table
    kept = (output / "pytorch_lora_weights.safetensors").read_bytes()
    assert kept == (output / f"checkpoint-{found['step']}" / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.run
@pytest.mark.families(*KINDS)
def test_probes_cost_little_and_nothing_without_pictures(family, tmp_path, script, monkeypatch):
    """Each probe is 8 + 4 passes without gradients; with neither pictures nor held-out images there is none."""
    passes, original = [], Probe.evaluate

    def counted(self, *arguments):
        passes.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Probe, "evaluate", counted)
    flags = ("-d", SAMPLE, "--max_train_steps", 2, "--validation_steps", 1, "--validation_inference_steps", 1)
    assert (
        run_here(family, tmp_path / "x", *flags, "--num_validation_images", 1, "--skip_final_inference") == 0
    )
    assert len(passes) == 3 * 12  # the base, and two validations
    passes.clear()
    assert run_here(family, tmp_path / "y", *flags[:4]) == 0
    assert not passes and not (tmp_path / "y" / "verdict.json").exists()


@pytest.mark.run
@pytest.mark.families(*KINDS)
def test_a_run_says_what_to_do_with_it(family, tmp_path, capsys):
    """The last lines name files that are there; config.yaml runs again, with the same losses."""
    output = tmp_path / "my lora"
    flags = (
        "-d",
        SAMPLE,
        "--trigger_word",
        "sks",
        "--num_validation_images",
        1,
        "--validation_inference_steps",
        1,
    )
    assert run_here(family, output, *flags) == 0
    said = capsys.readouterr().out.splitlines()
    named = {
        line.split()[0]: line[12:] for line in said if line[:12].rstrip() in ("LoRA", "pictures", "draw")
    }
    assert set(named) == {"LoRA", "pictures", "draw"}
    assert all((tmp_path / named[what]).is_file() for what in ("LoRA", "pictures"))
    assert any(line.startswith("advice: ") for line in said)
    again = load_script(family.script).parse_args(
        ["--config", str(output / "config.yaml"), "-o", str(tmp_path / "again")]
    )
    first = load_script(family.script).parse_args(quick_flags(family, output, *flags))
    apart = {n for n in vars(first) if getattr(first, n) != getattr(again, n)} - {
        "config",
        "settings",
        "output_dir",
    }
    assert apart <= {
        "class_data_dir",
        "command_line_flags",
    }  # where they come from: the command line, or a file


@pytest.mark.unit
def test_verdict_in_words(tmp_path):
    import argparse

    def judged(*rows, steps=400):
        lines = [{"step": s, "learned": a, "forgotten": f} | more for s, a, f, more in rows]
        (tmp_path / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9'
        )
        args = argparse.Namespace(output_dir=str(tmp_path))
        return make_verdict(argparse.Namespace(args=args, max_steps=steps, control_prompts=["a cat"]))

    early = judged((100, 0.08, 0.15, {}), (200, 0.12, 0.2, {}), (400, 0.12, 0.6, {}))
    assert early["step"] == 200 and "100% of what was learned, and 67% less forgotten" in early["text"]
    last = judged((200, 0.10, 0.2, {}), (400, 0.12, 0.2, {}))
    assert last["step"] == 400 and not last["warnings"]
    none = judged((200, 0.001, 0.2, {}), (400, 0.002, 0.2, {}))
    assert "hardly anything was learned" in none["warnings"][0]
    chance = judged((200, 0.0004, 0.5, {}), (400, 0.0001, 0.9, {}))  # nothing to choose from, and one advice
    assert chance["step"] == 400 and ["hardly" in line for line in chance["warnings"]] == [True]
    burnt = judged((200, 0.2, 0.2, {}), (400, -0.5, 0.9, {}))
    assert burnt["step"] == 200 and "--learning_rate is too high" in burnt["warnings"][0]
    held = [{"held_out_loss": loss, "learned_held_out": share} for loss, share in ((0.10, 0.2), (0.12, 0.1))]
    assert (
        "has risen since step 200"
        in judged((200, 0.2, 0.2, held[0]), (400, 0.4, 0.2, held[1]))["warnings"][0]
    )
    assert "the LoRA bleeds" in judged((400, 0.2, 0.7, {}))["warnings"][0]
    odd = judged((200, 0.2, 0.2, {}), (400, "nan", "nan", {}))
    assert odd["step"] == 200 and [row["step"] for row in odd["rows"]] == [200]
    assert judged((400, "nan", 0.2, {})) is None and judged() is None  # and the LoRA is saved all the same
