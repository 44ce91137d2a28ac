"""--caption_dropout trains what guidance leads away from: the pipeline's unconditional half."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import FAMILIES, SAMPLE, SDXL, Family, load_script, losses, prompts_of, run_here
from toy_parts import arguments

from lora_training.base_model.components import Components

pytestmark = pytest.mark.unit


def base_with(family: Family, folder, **changes):
    """A copy of a family's toy base whose model_index.json says otherwise."""
    base = shutil.copytree(family.base, folder)
    index = json.loads((base / "model_index.json").read_text()) | changes
    (base / "model_index.json").write_text(json.dumps(index))
    return base


def prompts_for(family: Family, base, *flags):
    script = load_script(family.script)
    args = arguments(script, *flags)
    return prompts_of(script, args, Components(base, args, torch.float32, torch.device("cpu")))


def unconditional(family: Family, base) -> dict[str, torch.Tensor]:
    """What the pipeline itself takes for the half without a prompt."""
    denoiser = "unet" if family.name in ("sd15", "sdxl") else "transformer"
    pipeline = getattr(diffusers, family.pipeline).from_pretrained(base, **{denoiser: None, "vae": None})
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if family.name == "sd3":
        options |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": 77}
    _, hidden, *pooled = pipeline.encode_prompt("a red circle", **options)
    return {"prompt_embeds": hidden} | ({"pooled_prompt_embeds": pooled[1]} if pooled else {})


@pytest.mark.parametrize(
    ("name", "changes", "flags", "is_zero"),
    [
        ("sdxl", {}, (), True),
        ("sdxl", {"force_zeros_for_empty_prompt": False}, (), False),
        ("sdxl", {}, ("--clip_skip", 1), True),
        ("sdxl", {"force_zeros_for_empty_prompt": False}, ("--clip_skip", 1), False),
        ("sd15", {}, ("--clip_skip", 1), False),
        ("sd15", {}, (), False),
        ("sd3", {}, (), False),
    ],
)
@pytest.mark.parametrize("live", [False, True])
def test_a_dropped_caption_is_the_pipelines_unconditional_half(tmp_path, name, changes, flags, is_zero, live):
    """Beside captions that stay as they are, also where the encoders run in the step and where they don't."""
    family = FAMILIES[name]
    base = base_with(family, tmp_path / "base", **changes)
    prompts, expected = prompts_for(family, base, *flags), unconditional(family, base)
    encoders = set(prompts.tokenizers) if live else ()
    for key in encoders:
        prompts.text_encoder(key).requires_grad_(True)
    embeds = prompts.lookup_captions(["a red circle", "", "a blue star"], live=encoders)
    plain = prompts.lookup(["a red circle", "a blue star"])
    for key, value in expected.items():
        assert torch.allclose(embeds[key][1], value[0], atol=1e-5)
        assert torch.equal(embeds[key][1], torch.zeros_like(value[0])) == is_zero
        assert torch.allclose(embeds[key][[0, 2]], plain[key], atol=1e-5)
        assert embeds[key].requires_grad == live


@pytest.mark.run
@pytest.mark.parametrize("how", ["cached", "embeddings alone", "text encoder", "preserved class"])
def test_a_run_drops_captions_as_the_base_says(tmp_path, how):
    """With whatever else changes the text; and nothing that is trained falls out of the graph."""
    flags = {
        "cached": ("--cache_latents", "--cache_folder", tmp_path / "cache"),
        "embeddings alone": (
            "--train_text_encoder_ti",
            "--train_transformer_frac",
            0,
            "--trigger_word",
            "TOK",
        ),
        "text encoder": ("--train_text_encoder",),
        "preserved class": ("--preserve_class", "circle", "--trigger_word", "sks"),
    }[how]
    dropout = ("--caption_dropout", 0.5 if how != "cached" else 1)
    found = []
    for zeros in (True, False):
        base = base_with(SDXL, tmp_path / f"base {zeros}", force_zeros_for_empty_prompt=zeros)
        output = tmp_path / f"run {zeros}"
        steps = ("--max_train_steps", 4, "--train_batch_size", 2)
        assert run_here(SDXL, output, "-m", base, "-d", SAMPLE, *flags, *dropout, *steps) == 0
        found.append(losses(output))
    assert found[0] != found[1]


@pytest.mark.parametrize(("name", "counts"), [("sdxl", True), ("sd15", True), ("flux", False)])
def test_a_negative_prompt_is_not_taken_for_an_empty_one(name, counts):
    """Zeros stand for no prompt at all; SDXL's pictures of --validation_prompts_file had them for any."""
    family = FAMILIES[name]
    prompts = prompts_for(family, Path(family.base))
    negative, empty = (prompts.for_pipeline("a red circle", text) for text in ("a blue star", ""))
    assert ("negative_prompt_embeds" in negative) == counts
    if counts:
        expected = prompts.lookup(["a blue star"])
        assert all(torch.equal(negative[f"negative_{key}"], value) for key, value in expected.items())
        assert not torch.equal(negative["negative_prompt_embeds"], empty["negative_prompt_embeds"])
