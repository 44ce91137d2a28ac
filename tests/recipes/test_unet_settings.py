"""What SD 1.5 and SDXL alone have: skipped layers of CLIP, and a noise schedule that ends without signal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, SAMPLE, load_script, prompts_of, quick_flags, run_here

from lora_training.base_model.components import Components

pytestmark = pytest.mark.faults


@pytest.mark.parametrize(("name", "skip"), [("sd15", 50), ("sd15", 2), ("sdxl", 50), ("sdxl", 1)])
def test_clip_skip_beyond_the_encoder_is_refused(name, skip, tmp_path, capsys):
    base = FAMILIES[name].base
    layers = json.loads((Path(base) / "text_encoder" / "config.json").read_text())["num_hidden_layers"]
    skip = skip if skip > 10 else layers - (name == "sdxl")
    assert run_here(FAMILIES[name], tmp_path / "x", "-d", SAMPLE, "--clip_skip", skip) == 2
    assert f"--clip_skip {skip}: " in capsys.readouterr().err


@pytest.mark.parametrize(("name", "skip"), [("sd15", None), ("sd15", 1), ("sdxl", 1)])
def test_pictures_skip_the_layers_that_the_pipeline_skips(name, skip, tmp_path):
    """Prompt embeddings with --clip_skip, and the unconditional half, which the pipeline takes from the usual
    layer.
    """
    import diffusers

    family = FAMILIES[name]
    recipe = load_script(family.script)
    base = tmp_path / "base"
    shutil.copytree(family.base, base)
    index = json.loads((base / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (base / "model_index.json").write_text(json.dumps(index))
    flags = ("--clip_skip", skip) if skip else ()
    args = recipe.parse_args(quick_flags(family, tmp_path / "x", "-d", SAMPLE, "-m", base, *flags))
    prompts = prompts_of(recipe, args, Components(base, args, torch.float32, torch.device("cpu")))
    embeds = prompts.for_pipeline("a red circle")
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(base)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    can_skip = name == "sdxl"  # SD 1.5's pipeline fails with the pinned transformers
    skipping = {"clip_skip": skip} if can_skip else {}
    expected, negative, *_ = pipeline.encode_prompt("a red circle", **options, **skipping)
    assert torch.allclose(embeds["negative_prompt_embeds"], negative, atol=1e-5)
    assert torch.allclose(embeds["prompt_embeds"], expected, atol=1e-5) == (can_skip or not skip)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_schedule_that_ends_without_signal(name, tmp_path, monkeypatch):
    family, runs = FAMILIES[name], []
    recipe = load_script(family.script)
    original = recipe.train

    def recorded(run, first_step):
        runs.append(run)
        original(run, first_step)

    monkeypatch.setattr(recipe, "train", recorded)
    flags = ("-d", SAMPLE, "--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--snr_gamma", 5)
    drawing = ("--num_validation_images", 1, "--validation_inference_steps", 1, "--max_train_steps", 2)
    assert run_here(family, tmp_path / "x", *flags, *drawing, "--skip_final_inference") == 0
    training, drawing = runs[0].scheduler, runs[0].components.get("scheduler")
    assert training.alphas_cumprod[-1] == 0 and drawing.alphas_cumprod[-1] < 1e-6
    assert drawing.config.prediction_type == "v_prediction" and drawing.config.timestep_spacing == "trailing"
