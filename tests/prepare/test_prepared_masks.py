"""Masks go through all steps with their pictures."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from photo_folders import prepare
from PIL import Image

from lora_training.data.folders import folder_examples
from lora_training.data.images import decode_image
from lora_training.data.masks import attach_masks

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


def spotted(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    """Black with a white spot at its upper left, or clear but for the spot.

    It is turned by EXIF where it is a JPEG file.
    """
    image = Image.new("L", size, 0)
    image.paste(255, (size[0] // 8, size[1] // 8, size[0] // 2, size[1] // 2))
    if mode == "RGBA":
        image.putalpha(image.copy())
    exif = Image.Exif()
    exif[274] = 6 if path.suffix == ".jpg" and mode == "RGB" else 1  # 6: to be turned by a quarter
    image.convert(mode).save(path, exif=exif, **({"quality": 98} if path.suffix == ".jpg" else {}))


MASKED = {
    "copied": ("--image_filtering", "min_size=32"),
    "cropped": ("--image_resizing", "target_resolution=96x64", "crop_position=top"),
    "padded": ("--image_resizing", "target_resolution=96x96", "mode=contain", "fill=black"),
    "bucketed": ("--aspect_ratio_bucketing", "base_resolution=64", "resize_images=true"),
    "both": (
        *("--image_resizing", "target_resolution=128"),
        "--aspect_ratio_bucketing",
        "custom_buckets=64,96;96,64",
    ),
}


@pytest.mark.parametrize("where", ["alpha", "folder", "-mask"])
@pytest.mark.parametrize("steps", MASKED)
def test_a_mask_goes_through_all_steps_with_its_picture(steps, where, tmp_path):
    """The picture is its own mask: what is done to the one must have been done to the other, names too."""
    photos, masks, out = tmp_path / "photos", tmp_path / "masks", tmp_path / "out"
    (photos / "one").mkdir(parents=True), (masks / "one").mkdir(parents=True)
    mode, size = "RGBA" if where == "alpha" else "RGB", (160, 120)
    for name in ("one/ä?.png", "two.png" if where == "alpha" else "two.jpg"):
        spotted(photos / name, size, mode)
        mask = {"folder": masks / name, "-mask": (photos / name).with_stem(f"{Path(name).stem}-mask")}.get(
            where
        )
        if mask:
            spotted(mask, size)
    place = {"folder": masks}.get(where, where)
    assert (
        prepare("-d", photos, "-o", out, f"--masked_loss={place}", "--trigger_word", "sks", *MASKED[steps])
        == 0
    )
    examples = attach_masks(folder_examples(out, None), out, "-mask")
    assert len(examples) == 2 and all(e.read_mask for e in examples)
    for example in examples:
        image = decode_image(example.read())
        mask = Image.open(io.BytesIO(example.read_mask()))
        assert mask.mode == "L" and mask.size == image.size
        picture, values = (np.asarray(i.convert("L")).astype(int) for i in (image, mask))
        if where == "alpha":  # laid on white, only the mask shows the spot
            assert picture.min() > 250 or steps == "padded"
            assert 0.05 < (values > 127).mean() < 0.5 and values[:3, :3].max() < 200
        else:
            assert np.abs(picture - values).max() <= 24
    report = (out / "report.html").read_text()
    assert report.count('class="mask"') == 2 and "red: what hardly counts" in report


def test_masks_are_written_once_and_go_with_their_pictures(tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a", "b", "c"):
        spotted(photos / f"{name}.png", (160, 120))
    for name in ("a", "b"):
        spotted(photos / f"{name}-mask.png", (160, 120))
    arguments = ("-d", photos, "-o", out, "--image_resizing", "target_resolution=64")
    assert prepare(*arguments, "--masked_loss=-mask") == 0
    printed = capsys.readouterr().out
    assert "1 images without one" in printed and f"-d {out} --masked_loss=-mask" in printed
    before = (out / "a-mask.png").stat().st_mtime_ns
    (photos / "b.png").unlink(), (photos / "b-mask.png").unlink()
    assert prepare(*arguments, "--masked_loss=-mask") == 0
    assert (out / "a-mask.png").stat().st_mtime_ns == before
    assert sorted(f.name for f in out.glob("*.[jp]*g")) == ["a-mask.png", "a.jpg", "c.jpg"]
    capsys.readouterr()
    Image.new("L", (160, 120)).save(photos / "a-mask.png")
    spotted(photos / "d.png", (160, 120))
    Image.new("L", (60, 120), 255).save(photos / "d-mask.png")
    assert prepare(*arguments, "--masked_loss=-mask") == 0
    printed = capsys.readouterr().out
    assert "left out: a.png: the mask of a.png is black" in printed
    assert "left out: d.png: the mask of d.png has another shape" in printed
    assert [f.name for f in out.glob("*-mask*")] == []
    assert prepare(*arguments, "--masked_loss", "alpha") == 2
    assert "a-mask.png: a picture's name that ends with -mask" in capsys.readouterr().err
    assert prepare(*arguments, "--masked_loss", "alfa") == 2
    assert "neither alpha" in capsys.readouterr().err
