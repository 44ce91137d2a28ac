"""One sample: its noise, its caption, its cached latents, and its way to the device."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    to_pixels,
)
from PIL import Image
from toy_parts import data_of

from lora_training.base_model.vae import encode_pixels
from lora_training.data.batches import BatchPlan, Slot
from lora_training.data.latents import cache_latents
from lora_training.data.loader import pack_batch, unpack_batch
from lora_training.data.samples import collate

pytestmark = pytest.mark.unit


def test_each_repeat_and_epoch_has_its_own_noise(recipe, tmp_path):
    data, _ = data_of(recipe, tmp_path, (96, 64), (64, 64))
    slots = [Slot(0, 0, epoch, repeat, 1.0) for epoch in range(3) for repeat in range(3)]
    items = [data[slot] for slot in slots]
    for key in ("noise", "posterior_noise"):
        assert len({tuple(item[key].flatten()[:4].tolist()) for item in items}) == 9
    assert len({item["timesteps"].item() for item in items}) > 5
    again = [data[slot] for slot in slots]
    assert all(torch.equal(a["noise"], b["noise"]) for a, b in zip(items, again, strict=True))


def test_class_images_keep_their_prompt(recipe, tmp_path):
    flags = ("--trigger_word", "sks", "--caption_dropout", 0.9)
    data, _ = data_of(recipe, tmp_path, (64, 64), (64, 64), *flags, captions=("a cat",), of_class=True)
    both = [
        [data[Slot(0, 0, n, 0, 1.0, is_class)]["caption"] for n in range(30)] for is_class in (False, True)
    ]
    assert set(both[0]) == {"", "sks, a cat"} and both[0].count("") > 20
    assert set(both[1]) == {"a cat"}


def test_mirrored_latents_are_those_of_the_mirrored_picture(recipe, tmp_path):
    flags = ("--random_flip", "--cache_latents", "--cache_dir", tmp_path)
    for _ in range(2):  # computed, then read
        data, base = data_of(recipe, tmp_path, (64, 64), (64, 64), *flags)
        data.args.cache_folder = str(tmp_path / "cache")
        plan = BatchPlan(data.examples, data.args, 1, 0)
        cache_latents(data, plan, base, data.args)
        pixels = to_pixels(Image.open(tmp_path / "x.png"))
        for flip in (False, True):
            expected = encode_pixels((pixels.flip(2) if flip else pixels)[None], base.vae())[0]
            assert torch.allclose(data.moments[False, 0, 0, flip], expected, atol=1e-4)


def test_a_batch_is_a_copy_for_each_type():
    def item(k: int) -> dict:
        values = {"pixels": torch.full((3, 2, 5), k, dtype=torch.uint8), "noise": torch.randn(4, 2)}
        return values | {"weight": torch.tensor(0.5), "size": torch.tensor((k, 7)), "caption": f"picture {k}"}

    items = [item(k) for k in range(3)]
    packed = pack_batch(items)
    assert len(packed["buffers"]) == 3
    whole, expected = unpack_batch(packed, torch.device("cpu")), collate(items)
    assert whole.keys() == expected.keys() and whole["captions"] == ["picture 0", "picture 1", "picture 2"]
    assert all(torch.equal(whole[k], expected[k]) for k in expected if k != "captions")
