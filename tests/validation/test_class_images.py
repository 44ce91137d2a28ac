"""Class images of prior preservation: drawn, counted, and trained on with their captions."""

from __future__ import annotations

import pytest
from conftest import QUICKEST, SAMPLE, load_script, run_here
from PIL import Image
from toy_parts import arguments

from lora_training.validation.class_images import load_class_examples

pytestmark = pytest.mark.run

PRIOR = ("--with_prior_preservation", "--class_prompt")


@pytest.mark.faults
def test_class_images_that_are_not_whole_do_not_count(recipe, tmp_path):
    picture = next(SAMPLE.glob("*.png")).read_bytes()
    for name, raw in {
        "class_00000.png": picture,
        "class_00004.png": picture,
        "mine.png": picture,
        "mine.txt": b"a green circle",
        ".class_00001.png": picture,
        "class_00002.png": picture[: len(picture) // 2],
        "class_00003.png": b"",
        "text.png": b"this is no picture",
        "class_00005.png": bytes(1000),
        "notes.md": b"mine",
    }.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "folder.png").mkdir()
    args = arguments(recipe, *PRIOR, "a  circle", "--class_data_dir", tmp_path, "--num_class_images", 9)
    captions = {example.name: example.captions for example in load_class_examples(args)}
    one = ["a circle"]
    assert captions == {"class_00000.png": one, "class_00004.png": one, "mine.png": ["a green circle"]}


def test_captions_of_class_images_are_trained_on(tmp_path, monkeypatch):
    recipe = load_script(QUICKEST.script)
    captions, original = [], recipe.compute_loss
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"a {color} square")

    def recorded(batch, *rest):
        captions.extend(batch["captions"])
        return original(batch, *rest)

    monkeypatch.setattr(recipe, "compute_loss", recorded)
    prior = (*PRIOR, "a thing", "--class_data_dir", tmp_path, "--num_class_images", 3)
    assert run_here(QUICKEST, tmp_path / "x", "-d", SAMPLE, *prior) == 0
    trained = {caption for caption in captions if "square" in caption}
    assert trained == {"a red square", "a green square", "a blue square"}


def test_prior_preservation_makes_keeps_and_counts_class_images(tmp_path, capsys):
    folder = tmp_path / "class"
    flags = ("--instance_data_dir", SAMPLE, "--instance_prompt", "a sks circle", *PRIOR, "a circle")
    flags += ("--class_data_dir", folder, "--validation_inference_steps", 1, "--train_batch_size", 2)
    flags += ("--max_train_steps", 1)
    assert run_here(QUICKEST, tmp_path / "x", *flags, "--num_class_images", 3) == 0
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(first) == 3
    capsys.readouterr()
    cached = ("--cache_latents", "--train_text_encoder")
    assert run_here(QUICKEST, tmp_path / "y", *flags, "--num_class_images", 5, *cached) == 0
    assert "3 of 5 class images" in capsys.readouterr().out
    second = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(second) == 5 and first.items() <= second.items()
