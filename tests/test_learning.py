"""Each method brings something that the base has never seen, as the judge sees it in 64 images with fixed seeds."""

import pytest
from conftest import FAMILIES, SAMPLE, run_here
from toy_world import write_concept

PROVEN = ("sd15", "sdxl")  # SD3 learns the concept too, but its settings for prior preservation are still to be found
SMILEY = ("sks circle", ("smiley", None), ("yellow", "black"))
TEXT = ("--train_text_encoder", "--text_encoder_lr", 4e-3, "--learning_rate", 5e-3, "--max_train_steps", 400)


def pytest_generate_tests(metafunc):
    """One group per family, so that parallel workers take a family each and share its runs."""
    marks = {n: [pytest.mark.learn, pytest.mark.xdist_group(f"learn-{n}")] for n in PROVEN}
    metafunc.parametrize("family", [pytest.param(FAMILIES[n], marks=m, id=n) for n, m in marks.items()])


def train(family, output, *flags):
    """Trains into `output` and returns it; what an earlier test has trained there is taken as it is."""
    layers = ("--lora_layers", *family.lora_layers, "--rank", 16) if "--train_transformer_frac" not in flags else ()
    settings = (
        "--train_batch_size",
        8,
        "--cache_latents",
        "--lr_scheduler",
        "cosine",
        "--max_train_steps",
        family.steps,
    )
    rate = ("--learning_rate", family.learning_rate, "--logging_steps", 50)
    if not (output / "README.md").exists():
        assert run_here(family, output, *layers, *settings, *rate, *flags) == 0
    return output


def test_lora_learns_and_leaves_the_rest_alone(family, studio, tmp_path):
    before = studio.pipeline(None, quick=True)
    assert studio.concept_score(before, *SMILEY) < 0.1
    after = studio.pipeline(train(family, tmp_path / "lora", "-d", SAMPLE), quick=True)
    assert studio.concept_score(after, *SMILEY) > 0.8
    assert studio.world_score(after) >= studio.world_score(before) - 0.1


def test_lora_with_text_encoder_learns(family, studio, shelf):
    output = train(family, shelf / family.name / "both", "-d", SAMPLE, *TEXT)
    assert studio.concept_score(studio.pipeline(output, quick=True), *SMILEY) > 0.8


def test_pivotal_tuning_learns(family, studio, tmp_path):
    data = tmp_path / "data"
    write_concept(data, "smiley", "a TOK circle on a {background} background", 12, seed=0)
    before = studio.pipeline(None, quick=True)
    word, wanted, avoid = SMILEY
    assert studio.concept_score(before, word, wanted, avoid) < 0.1
    flags = ("-d", data, "--train_text_encoder_ti", "--text_encoder_lr", 2e-2)
    after = studio.pipeline(train(family, tmp_path / "pivotal", *flags), quick=True)
    assert studio.concept_score(after, "<s0><s1> circle", wanted, avoid) > 0.8
    assert studio.world_score(after) >= studio.world_score(before) - 0.1


def test_textual_inversion_alone_finds_what_the_base_can_draw(family, studio, tmp_path):
    data = tmp_path / "data"
    write_concept(data, "star", "a TOK on a {background} background", 12, seed=0)
    wanted, avoid = ("star", "purple"), ("purple",)
    before = studio.pipeline(None, quick=True)
    assert studio.concept_score(before, "TOK", wanted, avoid) < 0.1
    flags = ("-d", data, "--train_text_encoder_ti", "--train_transformer_frac", 0, "--text_encoder_lr", 2e-2)
    after = studio.pipeline(train(family, tmp_path / "ti", *flags, "--max_train_steps", 200), quick=True)
    assert studio.concept_score(after, "<s0><s1>", wanted, avoid) > 0.8
    assert studio.world_score(after) == studio.world_score(before)  # two new rows, and nothing else, are different


def test_prior_preservation_keeps_the_class(family, studio, shelf):
    """The class is what its prompt draws: "a circle". The run without prior preservation is otherwise the same."""
    prior = (
        "--with_prior_preservation",
        "--class_prompt",
        "a circle",
        "--num_class_images",
        64,
        "--prior_loss_weight",
        2,
    )
    prior += ("--class_data_dir", shelf / family.name / "class", "--sample_batch_size", 32)
    sampling = ("--validation_inference_steps", 20, "--validation_guidance_scale", family.guidance)
    runs = (
        train(family, shelf / family.name / "both", "-d", SAMPLE, *TEXT),
        train(family, shelf / family.name / "prior", "-d", SAMPLE, *TEXT, *prior, *sampling),
    )
    before, without, kept = (studio.pipeline(p, quick=True) for p in (None, *runs))
    scores = [studio.score(p, ["a circle"] * 64, [("circle", None, None)] * 64) for p in (before, without, kept)]
    assert studio.concept_score(kept, *SMILEY) > 0.8
    assert scores[2] >= 0.8 * scores[0]
    assert scores[1] <= scores[2] - 0.2
