"""Each method brings something that the base has never seen, as the judge sees it in 64 images.

LoRA is proven for every family, over a base of another precision in each (in float32, the other proofs train
them all); each other method for one UNet and one transformer, so that every kind of text encoder learns in
one of them; test_training_modes.py runs each method for every family. Steps are those that the toys need with
some to spare.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from conftest import FAMILIES, SAMPLE, run_here
from PIL import Image

from scripts.dev.toys.parts.toy_world import describe, draw, random_scene, write_concept

TEXT_ENCODER = ("sd3", "sdxl")
SMILEY = ("sks circle", ("smiley", None), ("yellow", "black"))
UNKNOWN = 16  # images of what is not known: a score below a tenth leaves room for one


def pytest_generate_tests(metafunc):
    """For the families of the test's mark.

    One group per family, so that a worker takes a family and shares its runs.
    """
    mark = metafunc.definition.get_closest_marker("families")
    names = mark.args if mark else sorted(FAMILIES)
    marks = {n: [pytest.mark.learn, pytest.mark.xdist_group(f"learn-{n}")] for n in names}
    metafunc.parametrize("family", [pytest.param(FAMILIES[n], marks=m, id=n) for n, m in marks.items()])


def with_text_encoder(family):
    """The flags of a run that trains the text encoders too.

    Prior preservation adds as many pictures to each batch.
    """
    rate, text_rate, steps = family.text_rates
    return (
        *("--train_text_encoder", "--text_encoder_lr", text_rate, "--learning_rate", rate),
        *("--train_batch_size", 4, "--max_train_steps", steps),
    )


def train(family, output, *flags):
    """Trains into `output` and returns it; what an earlier test has trained there is taken as it is."""
    has_lora = "--train_transformer_frac" not in flags
    layers = ("--lora_layers", *family.lora_layers, "--rank", 16) if has_lora else ()
    settings = ("--train_batch_size", 8, "--cache_latents", "--lr_scheduler", "cosine")
    settings += ("--max_train_steps", family.steps, "--learning_rate", family.learning_rate)
    if not (output / "README.md").exists():
        assert run_here(family, output, *layers, *settings, "--logging_steps", 50, *flags) == 0
    return output


# the base's precision while a LoRA is trained on it (it is drawn with the base as it was), and rates and
# steps that leave room on either side of what is asked
LORA_RUNS = {
    "flux": (
        *("--quantize_base", "nf4", "--mixed_precision", "bf16", "--weighting_scheme", "logit_normal"),
        *("--learning_rate", 4e-4, "--max_train_steps", 270),
    ),
    "sd15": ("--mixed_precision", "bf16"),
    "sd3": (
        *("--quantize_base", "fp8", "--mixed_precision", "bf16"),
        *("--blocks_to_swap", 4, "--gradient_checkpointing"),
    ),
    "sdxl": ("--learning_rate", 1.5e-3, "--max_train_steps", 220),
}


def test_lora_learns_and_leaves_the_rest_alone(family, studio, tmp_path):
    before = studio.pipeline(None, quick=True)
    assert studio.concept_score(before, *SMILEY, UNKNOWN) < 0.1
    output = train(family, tmp_path / "lora", "-d", SAMPLE, *LORA_RUNS[family.name])
    after = studio.pipeline(output, quick=True)
    assert studio.concept_score(after, *SMILEY) > 0.8
    assert studio.world_score(after) >= studio.world_score(before) - 0.1


@pytest.mark.families(*TEXT_ENCODER)
def test_lora_with_text_encoder_learns(family, studio, shelf):
    output = train(family, shelf / family.name / "both", "-d", SAMPLE, *with_text_encoder(family))
    assert studio.concept_score(studio.pipeline(output, quick=True), *SMILEY) > 0.8


@pytest.mark.families("flux", "sdxl")
def test_pivotal_tuning_learns(family, studio, tmp_path):
    data = tmp_path / "data"
    write_concept(data, "smiley", "a TOK circle on a {background} background", 12, seed=0)
    before = studio.pipeline(None, quick=True)
    _, target, avoid = SMILEY
    assert studio.concept_score(before, "TOK circle", target, avoid, UNKNOWN) < 0.1
    steps = ("--max_train_steps", family.steps + 50)  # half of them for the tokens
    flags = ("-d", data, "--train_text_encoder_ti", "--text_encoder_lr", family.token_rate, *steps)
    after = studio.pipeline(train(family, tmp_path / "pivotal", *flags), quick=True)
    assert studio.concept_score(after, "<s0><s1> circle", target, avoid) > 0.8
    assert studio.world_score(after) >= studio.world_score(before) - 0.1


def inversion(family, studio, tmp_path, *more):
    """Two new tokens alone find what the base can draw, and every prompt without them is left alone."""
    data, caption = tmp_path / "data", family.token_caption
    write_concept(data, "star", f"a {caption} on a {{background}} background", 12, seed=0)
    target, avoid = ("star", "purple"), ("purple",)
    before = studio.pipeline(None, quick=True)
    assert studio.concept_score(before, caption, target, avoid, UNKNOWN) < 0.1
    flags = ("-d", data, "--train_text_encoder_ti", "--train_transformer_frac", 0)
    flags += ("--text_encoder_lr", family.token_rate, "--max_train_steps", 150, *more)
    after = studio.pipeline(train(family, tmp_path / "ti", *flags), quick=True)
    assert studio.concept_score(after, caption.replace("TOK", "<s0><s1>"), target, avoid) > 0.8
    assert studio.world_score(after) == studio.world_score(before)


@pytest.mark.families("sd15")
def test_textual_inversion_alone_finds_what_the_base_can_draw(family, studio, tmp_path):
    inversion(family, studio, tmp_path)


@pytest.mark.families("flux")
def test_textual_inversion_with_t5_finds_what_the_base_can_draw(family, studio, tmp_path):
    inversion(family, studio, tmp_path, "--enable_t5_ti")


@pytest.mark.families(*TEXT_ENCODER)
def test_prior_preservation_keeps_the_class(family, studio, shelf):
    """The class is what its prompt draws: "a circle".

    The run without prior preservation is otherwise the same.
    """
    folder = shelf / family.name
    flags = ("-d", SAMPLE, *with_text_encoder(family))
    prior = ("--with_prior_preservation", "--class_prompt", "a circle", "--prior_loss_weight", 2)
    prior += ("--num_class_images", 32, "--class_data_dir", folder / "class", "--sample_batch_size", 32)
    prior += ("--validation_inference_steps", 12, "--validation_guidance_scale", family.guidance)
    runs = (train(family, folder / "both", *flags), train(family, folder / "prior", *flags, *prior))
    before, without, preserved = (studio.pipeline(output, quick=True) for output in (None, *runs))
    circles = (["a circle"] * 64, [("circle", None, None)] * 64)
    scores = [studio.score(pipeline, *circles) for pipeline in (before, without, preserved)]
    assert studio.concept_score(preserved, *SMILEY) > 0.8
    assert scores[2] >= 0.8 * scores[0]
    assert scores[1] <= scores[2] - 0.2


PRESERVED = {"sdxl": (2, 2e-3), "flux": (1, 2e-3)}  # --preserve_weight, learning rate: docs/preservation.md


@pytest.mark.families(*PRESERVED)
def test_a_class_is_kept_without_class_images(family, studio, tmp_path):
    """As with prior preservation: at the same steps without it "a circle" is a smiley, too (a score under
    0.1).
    """
    weight, rate = PRESERVED[family.name]
    flags = ("-d", SAMPLE, "--trigger_word", "sks", "--preserve_class", "circle", "--preserve_weight", weight)
    flags += ("--max_train_steps", 250, "--learning_rate", rate)
    output = train(family, tmp_path / "preserved", *flags)
    before, after = studio.pipeline(None, quick=True), studio.pipeline(output, quick=True)
    circles = (["a circle"] * 64, [("circle", None, None)] * 64)
    scores = [studio.score(pipeline, *circles) for pipeline in (before, after)]
    concept = studio.concept_score(after, *SMILEY)
    assert concept > 0.8 and scores[1] >= 0.8 * scores[0], (concept, scores)


def with_flaw_and_masks(data, masks, ending="") -> None:
    """Gives a concept's pictures a black bar at their lower edge, and masks that show the concept alone."""
    masks.mkdir(exist_ok=True)
    for file in sorted(data.glob("*.png")):
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
        shape = np.abs(pixels.astype(int) - pixels[2, 2]).sum(axis=2) > 60
        Image.fromarray(shape.astype(np.uint8) * 255).save(masks / f"{file.stem}{ending}.png")
        pixels[-len(pixels) // 6 :] = 0
        Image.fromarray(pixels).save(file)


def bars(pictures) -> float:
    """The share of pictures with a dark lower edge."""
    return np.mean([np.asarray(picture)[-6:].mean() < 70 for picture in pictures])


@pytest.mark.families("sd15")
def test_a_mask_keeps_a_flaw_out(family, studio, tmp_path):
    """All pictures share a black bar at their lower edge; masks of the smiley keep it out of the LoRA."""
    data, masks = tmp_path / "data", tmp_path / "masks"
    write_concept(data, "smiley", "a sks circle on a {background} background", 12, seed=0)
    with_flaw_and_masks(data, masks)
    shares = {}
    for name, flags in {"plain": (), "masked": ("--masked_loss", masks, "--unmasked_weight", 0)}.items():
        output = train(family, tmp_path / name, "-d", data, *flags, "--max_train_steps", 300)
        pipeline = studio.pipeline(output, quick=True)
        shares[name] = bars(studio.draw(pipeline, ["a sks circle on a red background"] * 16))
    assert studio.concept_score(pipeline, *SMILEY) > 0.8
    assert shares["plain"] > 0.8 and shares["masked"] == 0, shares


TWO_CONCEPTS = """
- {train_data_dir: DATA/smiley, masked_loss: DATA/masks, repeats: 2}
- {train_data_dir: DATA/mushroom, masked_loss: -mask}
- {train_data_dir: DATA/shapes, class_prompt: a star, weight: 0.5}
"""
PROMPTED = (("sks circle", "red"), ("ukj heart", "blue"), ("green star", "purple"))


@pytest.mark.families("sd15")
def test_two_concepts_with_masks_and_regularisation_from_one_file(family, studio, tmp_path):
    """Each is called by its word and not by the other's, without the flaw that all pictures share.

    Other shapes stay.
    """
    concepts = {
        "smiley": ("sks circle", SMILEY[1:]),
        "mushroom": ("ukj heart", (("mushroom", None), ("red", "white"))),
    }
    for concept, (word, _) in concepts.items():
        write_concept(tmp_path / concept, concept, f"a {word} on a {{background}} background", 12, seed=0)
    with_flaw_and_masks(tmp_path / "smiley", tmp_path / "masks")
    with_flaw_and_masks(tmp_path / "mushroom", tmp_path / "mushroom", "-mask")
    (tmp_path / "shapes").mkdir()
    rng = random.Random(5)
    for k in range(48):
        scene = (("star", "square", "triangle", "cross")[k % 4], *random_scene(rng)[1:])
        draw(*scene, rng, 256).save(tmp_path / "shapes" / f"{k}.png")
        (tmp_path / "shapes" / f"{k}.txt").write_text(describe(*scene))
    (tmp_path / "sets.yaml").write_text(TWO_CONCEPTS.replace("DATA", str(tmp_path)))
    prompts = [f"a {word} on a {colour} background" for word, colour in PROMPTED]
    shown = ("--validation_prompt", *prompts, "--num_validation_images", 4, "--validation_steps", 10**6)
    shown += ("--validation_inference_steps", 20, "--validation_guidance_scale", family.guidance)
    sets = ("--dataset_config", tmp_path / "sets.yaml", "--unmasked_weight", 0)
    steps = ("--max_train_steps", 350, "--train_batch_size", 6, "--learning_rate", 5e-3)
    output = train(family, tmp_path / "out", *sets, *shown, *steps)
    before, after = studio.pipeline(None, quick=True), studio.pipeline(output, quick=True)
    for concept, (word, target) in concepts.items():
        assert studio.concept_score(after, word, *target) > 0.8, concept
        other = next(target for name, (_, target) in concepts.items() if name != concept)
        assert studio.concept_score(after, word, *other, UNKNOWN) < 0.1, concept
        assert bars(studio.draw(after, [f"a {word} on a blue background"] * 16)) == 0, concept
    assert studio.world_score(after, "star") >= studio.world_score(before, "star") - 0.1
    assert (output / "comparison.png").is_file() and len(list((output / "training_pictures").iterdir())) > 1
