"""Each method brings something that the base has never seen, as the judge sees it in 64 images with fixed seeds."""

import pytest
from conftest import SAMPLE, run_here
from toy_world import write_concept

pytestmark = pytest.mark.learn
SMILEY = ("sks circle", ("smiley", None), ("yellow", "black"))


def train(family, output, *flags) -> None:
    layers = ("--lora_layers", *family.lora_layers) if "--train_transformer_frac" not in flags else ()
    rank = ("--rank", 16) if layers else ()
    settings = (
        "--train_batch_size",
        8,
        "--cache_latents",
        "--lr_scheduler",
        "cosine",
        "--max_train_steps",
        family.steps,
    )
    code = run_here(
        family,
        output,
        *layers,
        *rank,
        *settings,
        "--learning_rate",
        family.learning_rate,
        "--logging_steps",
        50,
        *flags,
    )
    assert code == 0


def test_lora_learns_and_leaves_the_rest_alone(family, studio, tmp_path):
    before = studio.pipeline(None, quick=True)
    assert studio.concept_score(before, *SMILEY) < 0.1
    train(family, tmp_path / "lora", "-d", SAMPLE)
    after = studio.pipeline(tmp_path / "lora", quick=True)
    assert studio.concept_score(after, *SMILEY) > 0.8
    assert studio.world_score(after) >= studio.world_score(before) - 0.1


def test_lora_with_text_encoder_learns(family, studio, tmp_path):
    train(family, tmp_path / "both", "-d", SAMPLE, "--train_text_encoder", "--text_encoder_lr", 1e-3)
    assert studio.concept_score(studio.pipeline(tmp_path / "both", quick=True), *SMILEY) > 0.8


def test_pivotal_tuning_learns(family, studio, tmp_path):
    before = studio.pipeline(None, quick=True)
    data = tmp_path / "data"
    write_concept(data, "smiley", "a TOK circle on a {background} background", 12, seed=0)
    train(family, tmp_path / "pivotal", "-d", data, "--train_text_encoder_ti", "--text_encoder_lr", 2e-2)
    after = studio.pipeline(tmp_path / "pivotal", quick=True)
    word, wanted, avoid = SMILEY
    assert studio.concept_score(before, word, wanted, avoid) < 0.1
    assert studio.concept_score(after, "<s0><s1> circle", wanted, avoid) > 0.8
    assert studio.world_score(after) >= studio.world_score(before) - 0.1


def test_textual_inversion_alone_finds_what_the_base_can_draw(family, studio, tmp_path):
    data = tmp_path / "data"
    write_concept(data, "star", "a TOK on a {background} background", 12, seed=0)
    train(
        family,
        tmp_path / "ti",
        "-d",
        data,
        "--train_text_encoder_ti",
        "--train_transformer_frac",
        0,
        "--text_encoder_lr",
        2e-2,
    )
    wanted, avoid = ("star", "purple"), ("purple",)
    assert studio.concept_score(studio.pipeline(None, quick=True), "TOK", wanted, avoid) < 0.1
    after = studio.pipeline(tmp_path / "ti", quick=True)
    assert studio.concept_score(after, "<s0><s1>", wanted, avoid) > 0.8
    assert studio.world_score(after) == studio.world_score(
        studio.pipeline(None, quick=True)
    )  # nothing but two new rows has changed


def test_prior_preservation_keeps_the_class(family, studio, tmp_path):
    train_class = ("--instance_data_dir", SAMPLE, "--instance_prompt", "a sks circle")
    prior = (
        "--with_prior_preservation",
        "--class_prompt",
        "a circle",
        "--class_data_dir",
        tmp_path / "class",
        "--num_class_images",
        64,
    )
    sampling = (
        "--validation_inference_steps",
        20,
        "--validation_guidance_scale",
        family.guidance,
        "--sample_batch_size",
        32,
    )
    train(family, tmp_path / "without", *train_class)
    train(family, tmp_path / "with", *train_class, *prior, *sampling)
    before, without, kept = (studio.pipeline(p, quick=True) for p in (None, tmp_path / "without", tmp_path / "with"))
    base_score = studio.world_score(before, "circle")
    assert studio.concept_score(before, *SMILEY) < 0.1
    assert studio.concept_score(kept, *SMILEY) > 0.8
    assert studio.world_score(kept, "circle") >= 0.8 * base_score
    assert studio.world_score(without, "circle") <= studio.world_score(kept, "circle") - 0.05
