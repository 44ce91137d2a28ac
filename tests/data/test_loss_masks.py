"""--masked_loss: a mask goes where its picture goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import QUICKEST, losses, run_here, training_data
from PIL import Image

from lora_training.base_model.reading import import_class
from lora_training.data.batches import Slot
from lora_training.data.buckets import bucket_sizes
from lora_training.data.examples import load_examples
from lora_training.data.image_store import prepare_examples
from lora_training.errors import UserError

pytestmark = pytest.mark.unit


def masked_data(recipe, *flags):
    """TrainingData of 8 x 8 latents as a run has it, from flags."""
    args = recipe.parse_args(["-m", "base", "--resolution", "64", "--seed", "1", *map(str, flags)])
    store = prepare_examples(load_examples(args), bucket_sizes(args), args)
    scheduler = import_class("diffusers", "DDPMScheduler")()
    config = {"latent_channels": 4, "block_out_channels": [1, 1, 1, 1]}
    return training_data(recipe, store, None, args, config, scheduler)


def half_white(path, size=(96, 64), mode="L"):
    """A picture that is white on its left and black, or clear, on its right."""
    image = Image.new("L", size, 0)
    image.paste(255, (0, 0, size[0] // 3, size[1]))
    if mode == "RGBA":
        image.putalpha(image.copy())
    image.convert(mode).save(path)


@pytest.mark.parametrize("where", ["alpha", "folder", "-mask"])
def test_a_mask_goes_with_its_picture(recipe, where, tmp_path):
    """The picture is its own mask: both look the same however they are cropped, mirrored and rotated."""
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    half_white(folder / "inner" / "a.png", mode="RGBA" if where == "alpha" else "RGB")
    if where == "folder":
        where = tmp_path / "masks"
        (where / "inner").mkdir(parents=True)
        half_white(where / "inner" / "a.jpg", (192, 128))
    if where == "-mask":
        half_white(folder / "inner" / "a-mask.png")
    flags = ("-d", folder, "--trigger_word", "x", f"--masked_loss={where}", "--unmasked_weight", 0)
    rotation = ("--random_rotation", 20, "--random_rotation_prob", 0.5)
    data = masked_data(recipe, *flags, *rotation, "--random_flip")
    assert len(data.examples) == 1
    sides = set()
    for epoch in range(40):
        item = data[Slot(0, 0, epoch, 0, 1.0)]
        if where != "alpha":  # laid on white, it is white all over
            expected = torch.nn.functional.avg_pool2d(item["pixels"][:1] / 255, 8) + 1e-3
            assert torch.allclose(item["mask"] * expected.mean(), expected, atol=0.06)
        assert item["mask"].shape == (1, 8, 8) and item["mask"].mean().item() == pytest.approx(1, abs=1e-5)
        sides.add(bool(item["mask"][0, :, 0].mean() > item["mask"][0, :, -1].mean()))
    assert sides == {True, False}  # mirrored, too


def test_a_white_mask_changes_nothing_and_a_mask_is_cached(tmp_path):
    data, masks = tmp_path / "data", tmp_path / "masks"
    for folder in (data, masks):
        folder.mkdir()
    for number in range(2):
        half_white(data / f"{number}.png", (64, 64), "RGB")
        Image.new("L", (64, 64), 255).save(masks / f"{number}.png")
    flags = ("-d", data, "--trigger_word", "sks")
    masked = (*flags, "--masked_loss", masks)

    def losses_of_a_run(name: str, *flags) -> list[float]:
        assert run_here(QUICKEST, tmp_path / name, *flags) == 0
        return losses(tmp_path / name)

    plain = losses_of_a_run("plain", *flags)
    assert losses_of_a_run("white", *masked) == plain
    for number in range(2):
        half_white(masks / f"{number}.png", (64, 64))
    half = losses_of_a_run("half", *masked)
    assert half != plain
    assert half == pytest.approx(losses_of_a_run("half cached", *masked, "--cache_latents"), rel=1e-4)


@pytest.mark.parametrize("largest", [1.0, 255.0, 255, 65535])
@pytest.mark.parametrize("low", [0, 0.25])
def test_a_mask_of_any_depth_is_scaled(recipe, tmp_path, largest, low):
    """A half-transparent grey counts half, in 16 bits and as floats too."""
    data, masks = tmp_path / "data", tmp_path / "masks"
    for folder in (data, masks):
        folder.mkdir()
    half_white(data / "a.png", (64, 64), "RGB")
    dtype = "float32" if isinstance(largest, float) else "uint16" if largest > 255 else "uint8"
    shares = np.repeat([1.0, 0.5], 32)[None].repeat(64, 0)
    Image.fromarray((shares * largest).astype(dtype)).save(masks / "a.tif")
    flags = ("-d", data, "--trigger_word", "x", "--masked_loss", masks, "--unmasked_weight", low)
    mask = masked_data(recipe, *flags)[Slot(0, 0, 0, 0, 1.0)]["mask"]
    expected = (1 + low) / 2
    assert (mask[0, 0, -1] / mask[0, 0, 0]).item() == pytest.approx(expected, abs=0.01)


def test_what_is_wrong_with_masks_is_said(recipe, tmp_path, capsys):
    data, masks = tmp_path / "data", tmp_path / "masks"
    for folder in (data, masks):
        folder.mkdir()
    half_white(data / "a.png", (64, 64), "RGB")
    half_white(data / "b.png", (64, 64), "RGB")
    flags = ("-d", data, "--trigger_word", "x", "--masked_loss")
    with pytest.raises(UserError, match="no mask for any of 2 images"):
        masked_data(recipe, *flags, masks)
    with pytest.raises(UserError, match="neither alpha, nor a folder"):
        masked_data(recipe, *flags, "alfa")
    for message, size in {"has another shape": (64, 32), "is black": (64, 64), "can't be read": None}.items():
        if size:
            Image.new("L", size, 255 if size[1] == 32 else 0).save(masks / "a.png")
        else:
            (masks / "a.png").write_bytes(b"no picture")
        with pytest.raises(UserError, match=message):
            masked_data(recipe, *flags, masks)[Slot(0, 0, 0, 0, 1.0)]
    assert "1 images have no mask" in capsys.readouterr().out
