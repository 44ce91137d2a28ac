"""The files, keys and metadata that runs leave: what they draw is what the training run has shown."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import FAMILIES, KINDS, QUICKEST, SAMPLE, Studio, load_script, losses, run_here, weights
from PIL import Image
from safetensors import safe_open

from lora_training.seeds import validation_seed
from lora_training.validation import drawing

pytestmark = pytest.mark.run

PROMPT = "a sks circle on a blue background"
STEPS = 3
DRAWN = ("--num_validation_images", 1, "--validation_inference_steps", STEPS)
DRAWN += ("--validation_prompt", PROMPT, "--validation_guidance_scale", 3)


def drawn_plainly(pipeline, family, kind: str):
    """The picture that a run draws with DRAWN, by a plain pipeline: an image, or its latents."""
    generator = torch.Generator().manual_seed(validation_seed(3, 0, 0))
    options = {"num_inference_steps": STEPS, "guidance_scale": 3, "generator": generator}
    options |= {"width": 64, "height": 64, "output_type": kind}
    return pipeline(PROMPT, **options, **dict(family.extra)).images[0]


def largest_difference(image, file) -> int:
    """The largest difference of an image's channels, of 0 to 255, from those in a file."""
    return np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(file)).astype(int)).max()


def keys_and_metadata(file):
    with safe_open(file, "pt") as stored:
        return list(stored.keys()), stored.metadata()


def check_files(output, family) -> None:
    """The files that a run called "my lora" leaves, their keys and metadata."""
    assert (output / "comparison.png").is_file()
    keys, metadata = keys_and_metadata(output / "pytorch_lora_weights.safetensors")
    saved, parts = json.loads(metadata["lora_adapter_metadata"]), {key.split(".")[0] for key in keys}
    assert load_script(family.script).FAMILY.denoiser in parts and "text_encoder" in parts
    assert all(saved[f"{part}.lora_alpha"] == 4 and saved[f"{part}.r"] == 8 for part in parts)
    file = output / "my lora.safetensors"
    keys, metadata = keys_and_metadata(file)
    modules = {key.split(".")[0] for key in keys}
    for end in ("alpha", "lora_down.weight", "lora_up.weight"):
        assert all(f"{module}.{end}" in keys for module in modules)
    with safe_open(file, "pt") as stored:
        alphas = [stored.get_tensor(f"{module}.alpha").item() for module in modules]
        ranks = [len(stored.get_tensor(f"{module}.lora_down.weight")) for module in modules]
    assert all(alpha / rank == 0.5 for alpha, rank in zip(alphas, ranks, strict=True))
    assert metadata["modelspec.title"] == "my lora" and metadata["modelspec.trigger_phrase"] == "sks"
    card = (output / "README.md").read_text()
    assert "load_lora_weights" in card and "`sks`" in card and "comparison.png" in card
    assert len(losses(output)) == 5


def test_files_of_a_run_and_its_image_is_the_plain_pipelines(family, studio, tmp_path, monkeypatch):
    """What the training run shows is what people get: the same image from the plain pipeline and the saved
    files; the last latents, in float32, to 1e-4.
    """
    drawn, output = [], tmp_path / "my lora"
    original = drawing.unpack_output

    def recorded(latents, size):
        drawn.append(original(latents, size))
        return drawn[-1]

    monkeypatch.setattr(drawing, "unpack_output", recorded)
    flags = ("-d", SAMPLE, "--train_text_encoder", "--text_encoder_lr", 1e-2, "--learning_rate", 1e-2)
    flags += ("--rank", 8, "--lora_alpha", 4, "--lora_layers", *family.lora_layers, "--trigger_word", "sks")
    assert run_here(family, f"{output}/", *flags, *DRAWN, "--max_train_steps", 5) == 0
    check_files(output, family)
    assert len(drawn) == 10  # four control pictures come first and last
    for trained, step, latents in ((None, 0, drawn[4]), (output, 5, drawn[5])):
        pipeline = studio.pipeline(trained)
        (file,) = (output / "samples" / f"step-{step:06d}").glob("00_00_*.png")
        assert largest_difference(drawn_plainly(pipeline, family, "pil"), file) <= 1
        plain = drawn_plainly(pipeline, family, "latent")
        assert (original(plain[None], (64, 64)) - latents).abs().max() < 1e-4
    assert (drawn[4] - drawn[5]).abs().max() > 0.05


@pytest.mark.parametrize(("name", "start"), [("flux", "pissa"), ("sdxl", "olora")])
def test_starts_that_change_the_base_save_a_lora_for_the_unchanged_one(name, start, tmp_path):
    family = FAMILIES[name]
    flags = ("-d", SAMPLE, "--init_lora_weights", start, "--learning_rate", 1e-3, *DRAWN)
    assert run_here(family, tmp_path / "x", *flags) == 0
    image = drawn_plainly(Studio(family).pipeline(tmp_path / "x"), family, "pil")
    (file,) = (tmp_path / "x" / "samples" / "step-000003").glob("00_00_*.png")
    assert largest_difference(image, file) <= 3


@pytest.mark.families(*KINDS)
def test_merged_base_draws_what_base_and_lora_draw(family, studio, tmp_path):
    assert run_here(family, tmp_path / "x", "-d", SAMPLE, "--merge_lora", "--learning_rate", 1e-2) == 0
    images = []
    for pipeline in (studio.pipeline(tmp_path / "x"), studio.kind.from_pretrained(tmp_path / "x" / "merged")):
        pipeline.set_progress_bar_config(disable=True)
        images.append(drawn_plainly(pipeline, family, "np"))
    assert np.abs(images[0] - images[1]).max() < 1e-3


def test_text_encoder_lora_is_in_the_file_and_loads(family, script, studio, tmp_path):
    flags = ("-d", SAMPLE, "--train_text_encoder", "--text_encoder_lr", 1e-2, "--learning_rate", 1e-2)
    assert run_here(family, tmp_path / "x", *flags) == 0
    saved = weights(tmp_path / "x")
    pipeline = studio.pipeline(tmp_path / "x")
    for key in script.TEXT_LORA_ENCODERS:
        encoder = script.FAMILY.text_encoders[key][1]
        names = [name for name in saved if name.startswith(f"lora.{encoder}.")]
        assert any(saved[name].any() for name in names if "lora_B" in name or "up" in name)
        loaded = [p for n, p in getattr(pipeline, encoder).named_parameters() if "lora_B" in n]
        assert loaded and any(parameter.any() for parameter in loaded)


def test_folder_name_with_a_slash_names_the_files(tmp_path):
    flags = ("-d", SAMPLE, "--train_text_encoder_ti", "--token_abstraction", "circle")
    assert run_here(QUICKEST, f"{tmp_path}/name/", *flags, "--max_train_steps", 1) == 0
    names = {file.name for file in (tmp_path / "name").glob("*.safetensors")}
    assert names == {"pytorch_lora_weights.safetensors", "name.safetensors", "name_emb.safetensors"}
