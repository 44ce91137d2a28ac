"""Prompts are encoded as the pipelines encode them, and beyond 77 tokens."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from conftest import SD15, Family, losses, prompts_of, run_here
from PIL import Image
from toy_parts import arguments, components_of
from transformers import CLIPTokenizer

from lora_training.text.chunks import chunk_ids, join_chunks

pytestmark = pytest.mark.unit


@functools.cache
def text_pipeline(family: Family):
    """The plain pipeline of a family's toy base, without what only draws."""
    denoiser = "unet" if "XL" in family.pipeline or family.name == "sd15" else "transformer"
    pipeline_class = getattr(diffusers, family.pipeline)
    return pipeline_class.from_pretrained(family.base, **{denoiser: None, "vae": None})


def test_prompts_are_encoded_as_the_pipeline_does(script, family):
    """The embeddings of training are the pipeline's, for short, empty and too long prompts."""
    pipeline = text_pipeline(family)
    extra = {"max_sequence_length": 40} if family.extra else {}
    base = components_of(script, *(f"--{name}={value}" for name, value in extra.items()))
    texts = ["a red circle on a blue background", "", "a blue star " * 40]
    embeds = prompts_of(script, base.args, base).lookup(texts)
    if family.name == "sd15":
        expected = {"prompt_embeds": pipeline.encode_prompt(texts, "cpu", 1, False)[0]}
    elif family.name == "flux":
        hidden, pooled, _ = pipeline.encode_prompt(texts, None, **extra)
        expected = {"prompt_embeds": hidden, "pooled_prompt_embeds": pooled}
    else:
        options = {"prompt_3": None, **extra} if family.name == "sd3" else {}
        options |= {"prompt_2": None, "do_classifier_free_guidance": False, "device": "cpu"}
        hidden, _, pooled, _ = pipeline.encode_prompt(texts, **options)
        expected = {"prompt_embeds": hidden, "pooled_prompt_embeds": pooled}
    assert embeds.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(embeds[name], value, atol=1e-5), name


@pytest.mark.families("sd15", "sdxl", "sd3")
def test_the_empty_prompt_is_the_pipelines(script, family):
    pipeline, base = text_pipeline(family), components_of(script)
    embeds = prompts_of(script, base.args, base).for_pipeline("a red circle")
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if family.name == "sd3":
        options |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": 77}
    expected = pipeline.encode_prompt("a red circle", **options)
    names = ("prompt_embeds", "negative_prompt_embeds")
    names += ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, value in zip(names, expected, strict=False):
        assert torch.allclose(embeds[name], value, atol=1e-4), name


@pytest.mark.families("sd15", "sdxl")
def test_skipped_layers_are_as_good_as_absent(script, family):
    """clip_skip 1 gives what an encoder without its last layer gives."""
    base = components_of(script)
    tokenizer, encoder = map(base.get, script.FAMILY.text_encoders["clip_l"])
    texts = ["a red circle"]
    args = arguments(script, "--clip_skip", 1)
    skipped = script.encode_prompts("clip_l", texts, tokenizer, encoder, args)
    body = getattr(encoder, "text_model", encoder)
    body.encoder.layers = body.encoder.layers[:-1]
    shorter = script.encode_prompts("clip_l", texts, tokenizer, encoder, arguments(script))
    assert torch.allclose(skipped["hidden"], shorter["hidden"], atol=1e-5)


def test_long_captions_are_read_in_chunks():
    """One chunk is what the tokenizer makes by itself; of three, each is what its 75 tokens give alone."""
    tokenizer = CLIPTokenizer.from_pretrained(f"{SD15.base}/tokenizer")
    long_prompt = "a red circle on a blue background, " * 40
    prompts = ["", "a circle", long_prompt]
    cut = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    assert torch.equal(chunk_ids(tokenizer, prompts, 1)[0], tokenizer(prompts, **cut).input_ids)
    ids = chunk_ids(tokenizer, prompts, 3)[0].view(3, 3, 77)
    content = tokenizer(long_prompt, add_special_tokens=False).input_ids
    assert ids[2, :, 1:-1].flatten().tolist() == content[:225]
    hidden = join_chunks(ids.view(9, 77, 1).float(), 3)
    assert hidden.shape == (3, 227, 1)
    assert hidden[2, 1:-1, 0].tolist() == content[:225]


LONG_PROMPTS = {75: "a red circle, " * 50, 225: "a red circle, " * 30}  # too long, and long enough


@pytest.mark.families("sd15", "sdxl")
def test_embeddings_depend_on_what_stands_after_75_tokens(script, family):
    for length, prompt in LONG_PROMPTS.items():
        base = components_of(script, "--max_token_length", length)
        embeds = prompts_of(script, base.args, base).lookup([prompt + end for end in ("star", "heart")])
        star, heart = embeds["prompt_embeds"]
        assert star.shape[0] == length + 2
        assert torch.equal(star, heart) == (length == 75)


@pytest.mark.run
def test_what_stands_after_75_tokens_is_learned_from(tmp_path):
    data, first_losses = tmp_path / "data", {}
    data.mkdir()
    Image.new("RGB", (64, 64), "red").save(data / "a.png")
    for length, prompt in LONG_PROMPTS.items():
        for end in ("star", "heart"):
            (data / "a.txt").write_text(prompt + end)
            flags = ("-d", data, "--max_token_length", length, "--max_train_steps", 1)
            assert run_here(SD15, tmp_path / f"{length}-{end}", *flags) == 0
            (first_losses[length, end],) = losses(tmp_path / f"{length}-{end}")
    assert first_losses[75, "star"] == first_losses[75, "heart"]
    assert first_losses[225, "star"] != first_losses[225, "heart"]
