"""Masks that models make: where they lie, how soft they are, what is kept, and models that are no use."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from photo_folders import prepare
from PIL import Image, ImageFilter

from lora_training.data.folders import folder_examples
from lora_training.data.images import decode_image
from lora_training.data.masks import attach_masks
from lora_training.prepare import segmenter
from lora_training.prepare.masks import soft_mask
from lora_training.prepare.segmenter import load_segmenter
from lora_training.prepare.settings import Masks

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]

SIZE = (320, 240)
RESIZING = ("--image_resizing", "target_resolution=128x96")


@pytest.fixture(scope="module")
def finders(tmp_path_factory) -> dict[str, Path]:
    """Small models for which what is red is the subject, a person, or what a text says."""
    folder = tmp_path_factory.mktemp("finders")
    return {
        "subject": tiny_models.make_subject_finder(folder / "subject"),
        "person": tiny_models.make_segformer(folder / "person"),
        "text": tiny_models.make_clipseg(folder / "text"),
    }


@pytest.fixture
def photos(tmp_path) -> Path:
    """A landscape as PNG, one that EXIF turns, and a grey one; with a red and a blue rectangle each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    first, second, third = tiny_models.coloured_squares(3, 64)[0]
    first.resize(SIZE, Image.Resampling.NEAREST).save(folder / "a.png")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    turned = second.resize(SIZE, Image.Resampling.NEAREST).rotate(90, expand=True)
    turned.save(folder / "b.jpg", exif=exif, quality=98, subsampling=0)
    third.paste((120, 120, 120), (0, 0, 64, 64))
    third.resize(SIZE).save(folder / "c.png")
    return folder


def redness(image: Image.Image) -> np.ndarray:
    """Where a picture is red."""
    red, _, blue = np.asarray(image.convert("RGB")).astype(int).transpose(2, 0, 1)
    return red - blue > 90


def masks_of(out: Path) -> dict[str, tuple[Image.Image, Image.Image]]:
    """{name: (picture, its mask)} of a prepared folder, as training reads them."""
    examples = attach_masks(folder_examples(out, None), out, "-mask")
    return {
        example.name: (decode_image(example.read()), Image.open(io.BytesIO(example.read_mask())))
        for example in examples
        if example.read_mask
    }


@pytest.mark.parametrize("kind", ["subject", "person", "text"])
def test_a_made_mask_lies_on_what_was_meant(kind, finders, photos, tmp_path, capsys):
    """In pictures of their own shape, upright, cropped with them; one without anything has none."""
    out, prompt = tmp_path / "out", ["prompt=a red thing"] if kind == "text" else []
    step = ("--masks", f"model_type={kind}", f"model_name={finders[kind]}", *prompt)
    assert prepare("-d", photos, "-o", out, *step, "soft_edge=0", *RESIZING) == 0
    made = masks_of(out)
    assert made.keys() == {"a.jpg", "b.jpg"}
    for picture, mask in made.values():
        assert mask.mode == "L" and mask.size == picture.size == (128, 96)
        inside, values = redness(picture), np.asarray(mask) > 127
        assert (inside & values).sum() > 0.9 * (inside | values).sum() > 200
    printed = capsys.readouterr().out
    what = "a red thing" if kind == "text" else kind
    assert f"no {what} in c.png, which count as a whole" in printed
    assert f"-d {out} --masked_loss=-mask" in printed
    report = (out / "report.html").read_text()
    assert report.count('class="mask"') == 2 and "red: what hardly counts" in report


def test_masks_made_by_hand_are_kept(finders, photos, tmp_path, capsys):
    by_hand, step = photos / "a-mask.png", ("--masks", f"model_name={finders['subject']}")
    Image.linear_gradient("L").resize(SIZE).save(by_hand)
    assert prepare("-d", photos, "-o", tmp_path / "x", *step) == 2
    assert "a mask's: rename it, or give --masked_loss=-mask" in capsys.readouterr().err
    out = tmp_path / "out"
    assert prepare("-d", photos, "-o", out, *step, "--masked_loss=-mask") == 0
    made = masks_of(out)
    assert made["a.png"][1].tobytes() == Image.open(by_hand).tobytes() and "b.jpg" in made
    assert "1 kept" in capsys.readouterr().out
    assert prepare("-d", photos, "-o", out, *step, "--masked_loss", "alpha") == 2
    assert "--masked_loss alpha gives every picture a mask" in capsys.readouterr().err


def test_a_mask_is_made_once(finders, photos, tmp_path, monkeypatch):
    """A second run loads no model; another picture, or another setting, is looked at anew."""
    out, looked_at = tmp_path / "out", []
    original = segmenter.SubjectFinder.__call__

    def find(self, images):
        looked_at.append(len(images))
        return original(self, images)

    monkeypatch.setattr(segmenter.SubjectFinder, "__call__", find)
    arguments = ("-d", photos, "-o", out, "--masks", f"model_name={finders['subject']}", "batch_size=2")
    assert prepare(*arguments) == 0 and looked_at == [2, 1]
    first = {name: mask.tobytes() for name, (_, mask) in masks_of(out).items()}
    monkeypatch.setattr(segmenter, "load_segmenter", None)  # nothing may be loaded
    assert prepare(*arguments) == 0
    retouched = Image.new("L", SIZE, 255)
    retouched.save(out / "a-mask.png")
    (out / "b-mask.png").unlink()
    assert prepare(*arguments) == 0
    assert masks_of(out)["a.png"][1].tobytes() == retouched.tobytes()
    assert masks_of(out)["b.jpg"][1].tobytes() == first["b.jpg"]
    monkeypatch.setattr(segmenter, "load_segmenter", load_segmenter)
    Image.open(photos / "a.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "d.png")
    assert prepare(*arguments) == 0 and looked_at == [2, 1, 1]
    assert prepare(*arguments, "soft_edge=0") == 0 and looked_at == [2, 1, 1, 2, 2]
    next((out / ".prepare" / "masks").glob("*.png")).unlink()
    looked_at.clear()  # one file is gone, of this setting or of an earlier one
    assert prepare(*arguments, "soft_edge=0") == 0 and sum(looked_at) <= 1


@pytest.mark.parametrize(("threshold", "soft_edge"), [(0.5, 0.0), (0.5, 0.05), (0.8, 0.0), (None, 0.0)])
def test_an_edge_is_as_soft_as_it_is_set(threshold, soft_edge):
    """A ramp from left to right: where the threshold is, or the blur of a step there."""
    ramp = np.tile(np.linspace(0, 1, 101, dtype=np.float32), (51, 1))
    mask = np.asarray(soft_mask(ramp, (404, 204), threshold, soft_edge)).astype(int)
    assert mask.shape == (204, 404)
    row = mask[100]
    if threshold is None:
        assert np.abs(row - np.linspace(0, 255, 404)).max() < 4
        return
    edge = int(np.argmax(row > 127))
    assert edge == pytest.approx(threshold * 404, abs=3)
    step = Image.fromarray(np.where(np.arange(404) >= edge, 255, 0).astype(np.uint8)[None].repeat(204, 0))
    expected = step.filter(ImageFilter.GaussianBlur(soft_edge * 204)) if soft_edge else step
    assert np.abs(row - np.asarray(expected)[100].astype(int)).max() <= 2
    width = ((row > 25) & (row < 230)).sum()
    assert width == pytest.approx(2 * 1.28 * soft_edge * 204, abs=4)  # of a normal distribution: 80%


def test_nothing_found_is_no_mask():
    assert soft_mask(np.full((8, 8), 0.4, np.float32), (20, 10), 0.5, 0.01) is None
    assert soft_mask(np.full((8, 8), 0.4, np.float32), (20, 10), None, 0.01) is None
    assert soft_mask(np.full((8, 8), 0.4, np.float32), (20, 10), 0.3, 0.1).getextrema() == (255, 255)


@pytest.mark.parametrize("logits", [True, False])
def test_a_subject_finder_is_given_what_its_settings_say(logits, tmp_path):
    """Mean and deviation of preprocessor_config.json, else ImageNet's; logits become probabilities."""
    settings = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [1.0, 1.0, 1.0],
        "size": {"width": 9, "height": 9},
    }
    picture = Image.new("RGB", (64, 64), (150, 120, 130))
    for number, config in enumerate((None, settings)):
        folder = tiny_models.make_subject_finder(tmp_path / str(number), logits, config)
        (found,) = load_segmenter(Masks(model_name=str(folder)))([picture])
        mean, std = ((0.5,) * 3, (1.0,) * 3) if config else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        values = [(v / 255 - m) / s for v, m, s in zip((150, 120, 130), mean, std, strict=True)]
        expected = 1 / (1 + np.exp(4 - 2 * (values[0] - values[1] - values[2])))
        assert found.shape == (64, 64) and np.abs(found - expected).max() < 1e-4


def test_mask2former_gives_the_scores_of_its_own_processor(tmp_path, monkeypatch):
    """Pictures of several shapes fill up their batch: what fills it up is no part of a mask."""
    from transformers import Mask2FormerImageProcessorPil
    from transformers.models.mask2former import modeling_mask2former

    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)  # scipy, for its loss
    folder = tiny_models.make_mask2former(tmp_path / "model")
    model = load_segmenter(Masks(model_type="person", model_name=str(folder)))
    pictures = [
        p.resize(s) for p, s in zip(tiny_models.coloured_squares(3, 64)[0], (SIZE, (90, 200), (64, 64)))
    ]
    together, processor = model(pictures), Mask2FormerImageProcessorPil.from_pretrained(folder)
    for picture, found in zip(pictures, together, strict=True):
        assert found.shape[0] / found.shape[1] == pytest.approx(picture.height / picture.width, rel=0.2)
    inputs = processor(images=pictures[:1], return_tensors="pt")
    with torch.no_grad():
        outputs = model.model(**{k: inputs[k] for k in ("pixel_values", "pixel_mask")})
    outputs.masks_queries_logits = torch.nn.functional.interpolate(
        outputs.masks_queries_logits, (384, 384), mode="bilinear"
    )
    size = [inputs["pixel_values"].shape[-2:]]
    (scored,) = processor.post_process_semantic_segmentation(outputs, size, return_segmentation_scores=True)
    own = scored["segmentation_scores"][0].clamp(0, 1).numpy()
    (alone,) = model(pictures[:1])
    assert alone.shape == own.shape and np.abs(alone - own).max() < 0.03


def test_a_text_decides_what_clipseg_finds(finders):
    pictures, targets = tiny_models.coloured_squares(4, 64)
    for k, colour in enumerate(("red", "blue")):
        settings = Masks(model_type="text", prompt=f"a {colour} thing", model_name=str(finders["text"]))
        for found, target in zip(load_segmenter(settings)(pictures), targets[:, k].numpy(), strict=True):
            inside = target > 0.5
            assert found[inside].mean() > 0.8 and found[~inside].mean() < 0.2


@pytest.mark.faults
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("model_name=nobody/nothing", "masks: model_name: nobody/nothing is neither a local folder"),
        ("model_name=/no/where", "masks: model_name: no such folder: /no/where"),
        ("model_type=person model_name=nobody/nothing", "nobody/nothing is neither a local folder"),
        ("model_name=PERSON", "no onnx/model.onnx or model.onnx in"),
        ("model_name=BROKEN", "masks: "),
        ("model_type=person model_name=SUBJECT", "names no model, which is not one of CLIPSeg, Mask2Former"),
        ("model_type=person model_name=GIT", "names GitForCausalLM, which is not one of CLIPSeg"),
        ("model_type=text prompt=dog model_name=PERSON", "knows no class 'dog'; the nearest are "),
        ("model_type=person model_name=CUT", "is no segmentation model: it has no weights for 1 tensors"),
        ("model_type=text", "model_type text and prompt go together"),
        ("prompt=dog", "model_type text and prompt go together"),
        ("device=cuda model_name=SUBJECT", "device cuda: this onnxruntime has no CUDA"),
        ("soft_edge=3", "soft_edge"),
        ("treshold=3", "unknown parameter; the nearest is threshold"),
    ],
)
def test_one_line_says_why_no_mask_is_made(arguments, expected, useless, photos, tmp_path, capsys):
    for name, folder in useless.items():
        arguments = arguments.replace(f"={name}", f"={folder}")
    try:
        code = prepare("-d", photos, "-o", tmp_path / "out", "--masks", *arguments.split())
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and expected in error[-1] and not any("Traceback" in line for line in error)
    assert len(error[-1]) < 500


@pytest.fixture(scope="module")
def useless(finders, tmp_path_factory) -> dict[str, Path]:
    """Models by name of which each is wrong for something."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("useless")
    for name in ("broken", "git", "cut"):
        (folder / name).mkdir()
    (folder / "broken" / "model.onnx").write_bytes(b"no graph")
    (folder / "git" / "config.json").write_text(json.dumps({"architectures": ["GitForCausalLM"]}))
    for file in finders["person"].iterdir():
        (folder / "cut" / file.name).write_bytes(file.read_bytes())
    state = load_file(finders["person"] / "model.safetensors")
    state.pop(next(key for key in state if "classifier" in key))
    save_file(state, folder / "cut" / "model.safetensors", {"format": "pt"})
    named = {"PERSON": finders["person"], "SUBJECT": finders["subject"]}
    return named | {name.upper(): folder / name for name in ("broken", "git", "cut")}
