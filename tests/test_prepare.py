"""prepare_dataset.py: every step with real files and small models, the second run, the doctor, and its errors."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import tiny_models
from conftest import FAMILIES, ROOT, load_script, run_here
from PIL import Image, ImageCms, ImageFilter
from tiny_models import COLOURS

from scripts.dataset import prepare_dataset
from scripts.dataset.parts import caption_models, image_steps, settings
from scripts.dataset.parts.looks import look_of, near_duplicates

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]
SCRIPT = load_script("train_lora_sd15.py")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {"blip2": tiny_models.make_blip2, "florence2": tiny_models.make_florence2, "git": tiny_models.make_git}
    made |= {"vit": tiny_models.make_vit, "tagger": tiny_models.make_tagger}
    return {name: make(folder / name) for name, make in made.items()}


def prepare(*words: object) -> int:
    return prepare_dataset.main([str(w) for w in words])


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture that looks like no other, with fine detail."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(smooth).astype(int) + rng.integers(-25, 25, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }


def rows(folder: Path, name: str = "metadata.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def texts(folder: Path) -> dict[str, object]:
    return {r["file_name"]: r["text"][0] if len(r["text"]) == 1 else r["text"] or "" for r in rows(folder)}


@pytest.fixture
def phone(tmp_path) -> Path:
    """What a phone's folder holds: colours to tell apart, two folders, captions in three encodings, and broken things."""
    folder = tmp_path / "phone"
    (folder / "trip").mkdir(parents=True)
    for i, (name, rgb) in enumerate(COLOURS.items()):
        noise = np.random.default_rng(i).integers(-4, 4, (320, 320, 3))
        picture = Image.fromarray((np.array(rgb) + noise).clip(0, 255).astype(np.uint8))
        picture.save(folder / "trip" / f"{name}.png")
    photo(400, 300, 1).save(folder / "IMG_1.JPG", quality=95)
    photo(300, 400, 2).save(folder / "IMG_2.jpg", quality=95)
    photo(320, 320, 3).save(folder / "IMG_3.webp")
    photo(320, 320, 4).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(400, 300, 5).save(folder / "turned.jpg", exif=exif, quality=95)
    (folder / "IMG_1.txt").write_bytes("ein Bär vor der Tür".encode("cp1252"))
    (folder / "IMG_2.caption").write_bytes("a döner".encode("utf-16"))
    (folder / "metadata.jsonl").write_text('{"file_name": "IMG_3.webp", "text": ["first <b>", "second"]}\n')
    photo(400, 300, 1).resize((360, 270)).save(folder / "IMG_1 (copy).jpg", quality=60)
    photo(100, 100, 6).save(folder / "tiny.png")
    photo(900, 300, 7).save(folder / "long.png")
    photo(400, 300, 8).filter(ImageFilter.GaussianBlur(9)).save(folder / "blurred.png")
    (folder / "damaged.jpg").write_bytes((folder / "IMG_1.JPG").read_bytes()[:9000])
    (folder / "text.png").write_bytes(b"no picture")
    return folder


EVERY_STEP = [
    *("--image_filtering", "remove_duplicates=true", "blur_threshold=30"),
    *("--image_resizing", "quality=95"),
    *("--aspect_ratio_bucketing", "base_resolution=128", "resize_images=true"),
]


def described(models) -> list[str]:
    """The two steps that need models."""
    return [
        *("--auto_caption", f"model_name={models['blip2']}", "max_new_tokens=8", "batch_size=3"),
        *("--auto_tagging", f"model_name={models['tagger']}", "exclude_tags=o_o, Hatsune Miku", "batch_size=2"),
    ]


def test_a_phones_folder_goes_through_all_steps(phone, models, tmp_path, capsys):
    before, out = tree(phone), tmp_path / "out"
    assert prepare("-d", phone, "-o", out, "--trigger_word", "sks", *EVERY_STEP, *described(models)) == 0
    assert tree(phone) == before
    reasons = {row["file_name"]: row["reason"] for row in rows(out, "left_out.jsonl")}
    assert {name: re.match(r"[\w ]+", reason)[0] for name, reason in reasons.items()} == {
        "IMG_1 (copy).jpg": "duplicate of IMG_1",
        "blurred.png": "blurred",
        "damaged.jpg": "damaged ",
        "long.png": "too long",
        "text.png": "not an image",
        "tiny.png": "too small",
    }
    captions = texts(out)
    for name in COLOURS:  # both models saw this picture and no other
        background = {"yellow": "red background, green background"}.get(name, f"{name} background")
        assert captions[f"trip/{name}.jpg"].startswith(f"sks, a {name} picture, ")
        assert background in captions[f"trip/{name}.jpg"]
    assert captions["IMG_1.jpg"].startswith("sks, ein Bär vor der Tür")
    assert captions["IMG_2.jpg"].startswith("sks, a döner")
    assert [c[:11] for c in captions["IMG_3.jpg"]] == ["sks, first ", "sks, second"]
    assert not any("o_o" in str(c) or "miku" in str(c) or "general" in str(c) for c in captions.values())
    assert set(captions) == {
        *(f"trip/{c}.jpg" for c in COLOURS),
        *("IMG_1.jpg", "IMG_2.jpg", "IMG_3.jpg", "cmyk.jpg", "turned.jpg"),
    }
    for row in rows(out):
        image = Image.open(out / row["file_name"])
        assert (image.mode, image.format, len(image.getexif())) == ("RGB", "JPEG", 0)
        assert f"{image.width} x {image.height}" == row["bucket"]
        beside = (out / row["file_name"]).with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert beside == row["text"][0]  # a list in each row, because one image has two captions
    assert Image.open(out / "turned.jpg").size == (112, 144)  # upright
    close = np.asarray(Image.open(out / "cmyk.jpg").resize((8, 8), 4)).astype(int)
    assert np.abs(close - np.asarray(photo(320, 320, 4).resize((8, 8), 4))).mean() < 12
    said = capsys.readouterr().out
    assert re.search(r"auto_caption +9 +6 +0 +3 kept", said)
    assert re.search(r"112 x 144 +\d", said)


def test_a_lora_trains_on_the_buckets_as_they_are(phone, tmp_path, capsys):
    out, family = tmp_path / "out", FAMILIES["sd15"]
    assert prepare("-d", phone, "-o", out, "--trigger_word", "sks", *EVERY_STEP) == 0
    flags = ["-d", out, "--resolution", "128", "--train_batch_size", "2", "--max_train_steps", "2"]
    assert run_here(family, tmp_path / "run", *flags) == 0
    said = capsys.readouterr().out
    assert f"buckets as prepared: {out / 'buckets.json'}" in said
    assert re.findall(r"(\d+ x \d+) +(\d+)   0%", said[said.index("buckets as") :])
    assert "left alone" not in said
    assert run_here(family, tmp_path / "run", "-d", out, "--resolution", "64") == 2
    error = capsys.readouterr().err
    assert "--resolution 64: the pictures are prepared for 128" in error and error.count("\n") == 1
    assert run_here(family, tmp_path / "run", "-d", out, "--aspect_ratio_buckets", "64,64", "--overwrite") == 0
    (out / "buckets.json").write_text("[]")
    assert run_here(family, tmp_path / "run", "-d", out) == 2
    assert "prepare the folder again" in capsys.readouterr().err


def test_the_buckets_are_those_that_training_makes(tmp_path):
    args = SimpleNamespace(resolution=[512], aspect_ratio_buckets="auto")
    schema = prepare_dataset_schema()
    made = image_steps.make_buckets(schema["aspect_ratio_bucketing"](base_resolution=512))
    assert sorted(made) == sorted(SCRIPT.bucket_sizes(args))
    wider = image_steps.make_buckets(schema["aspect_ratio_bucketing"](base_resolution=512, max_aspect_ratio=3))
    assert max(w / h for w, h in wider) > 2.5 and set(made) < set(wider)
    narrow = image_steps.make_buckets(
        schema["aspect_ratio_bucketing"](base_resolution=512, max_aspect_ratio=1.3, divisibility=64)
    )
    assert all(w % 64 == h % 64 == 0 and 0.7 < w / h < 1.4 for w, h in narrow)
    custom = schema["aspect_ratio_bucketing"](custom_buckets="512,256;256,512")
    assert image_steps.make_buckets(custom) == [(256, 512), (512, 256)]


def prepare_dataset_schema() -> dict:
    """{step name: its pydantic model}."""
    steps = settings.build_schema()[1]
    return {name: field.annotation.__args__[0] for name, field in steps.model_fields.items()}


def test_a_second_run_does_only_what_is_missing(phone, models, tmp_path, capsys, monkeypatch):
    out, words = tmp_path / "out", [*EVERY_STEP, *described(models)]
    assert prepare("-d", phone, "-o", out, *words) == 0
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in out.rglob("*.*") if f.is_file()}
    del before[out / "report.html"]

    def refuse(*_):
        raise AssertionError("nothing is to be done")

    with monkeypatch.context() as patch:
        for place, name in ((caption_models, "Captioner"), (caption_models, "Tagger")):
            patch.setattr(place, name, refuse)
        patch.setattr(image_steps, "render", refuse)
        original, read = image_steps.measure, []
        patch.setattr(image_steps, "measure", lambda raw, *more: read.append(raw) or original(raw, *more))
        assert prepare("-d", phone, "-o", out, *words) == 0
        assert {*read} == {(phone / n).read_bytes() for n in ("damaged.jpg", "text.png")}  # perhaps it's readable now
        left = {f: f.read_bytes() for f in before}
    assert left == {f: content for f, (_, content) in before.items()}
    images = [f for f in before if f.suffix in (".jpg", ".txt")]
    assert all(f.stat().st_mtime_ns == before[f][0] for f in images)
    capsys.readouterr()
    photo(320, 320, 20).save(phone / "AAA.png")
    (out / "IMG_2.jpg").unlink()
    assert prepare("-d", phone, "-o", out, *words) == 0
    said = capsys.readouterr().out
    assert re.search(r"reading +16 +1 +13", said)
    assert re.search(r"auto_caption +10 +1 +6", said)
    assert re.search(r"resizing \+ bucketing +10 +2 +8", said)
    words[words.index("base_resolution=128")] = "base_resolution=64"
    assert prepare("-d", phone, "-o", out, *words) == 0
    assert Image.open(out / "AAA.jpg").size == (64, 64)


def test_an_interrupted_run_goes_on(phone, models, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    words = ["--num_workers", 1, *EVERY_STEP, *described(models)]
    assert prepare("-d", phone, "-o", whole, *words) == 0
    original, calls = image_steps.render, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(image_steps, "render", interrupted)
        assert prepare("-d", phone, "-o", out, *words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    journal = out / ".prepare" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'["image", "cut o')
    assert prepare("-d", phone, "-o", out, *words) == 0
    done, known = re.search(r"resizing \+ bucketing +9 +(\d) +(\d)", capsys.readouterr().out).groups()
    assert int(done) >= 1 and int(known) >= 3 and int(done) + int(known) == 9
    ignored = ("report.html", ".prepare/journal.jsonl")
    first, second = ({k: v for k, v in tree(f).items() if k not in ignored} for f in (whole, out))
    assert first == second


def test_what_a_person_edits_stays_and_what_is_gone_goes(phone, tmp_path, capsys):
    out, words = tmp_path / "out", ["--image_resizing", "target_resolution=64", "--trigger_word", "sks"]
    assert prepare("-d", phone, "-o", out, *words) == 0
    (out / "IMG_1.txt").write_text("sks, by my own hand\n")
    (out / "tiny.txt").write_text("")
    photo(64, 64, 40).save(out / "cmyk.jpg")  # retouched
    retouched = (out / "cmyk.jpg").read_bytes()
    changed = (out / "metadata.jsonl").read_text(encoding="utf-8").replace("a döner", "a kebab")
    (out / "metadata.jsonl").write_text(changed, encoding="utf-8")
    (phone / "long.png").unlink()
    for _ in range(2):
        assert prepare("-d", phone, "-o", out, *words) == 0
        said = capsys.readouterr().out
        assert "3 edited by hand kept" in said
        assert (out / "cmyk.jpg").read_bytes() == retouched
        captions = texts(out)
        assert captions["IMG_1.jpg"] == "sks, by my own hand"
        assert captions["tiny.jpg"] == "" and (out / "tiny.txt").read_text() == ""
        assert captions["IMG_2.jpg"] == "sks, a kebab"
        assert (out / "IMG_2.txt").read_text() == "sks, a kebab\n"
    assert not (out / "long.jpg").exists() and not (out / "long.txt").exists()
    (out / "IMG_1.txt").unlink()
    assert prepare("-d", phone, "-o", out, *words) == 0
    assert texts(out)["IMG_1.jpg"] == "sks, ein Bär vor der Tür"


def test_names_that_clash_get_captions_of_their_own_for_good(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    photo(300, 300, 1).save(folder / "a.png")
    (folder / "metadata.csv").write_text("file_name,text\na.png,the png\n")
    assert prepare("-d", folder, "-o", out, "--image_resizing") == 0
    photo(300, 300, 2).save(folder / "a.jpg")
    photo(300, 300, 3).save(folder / "A.webp")
    (folder / "metadata.csv").write_text("file_name,text\na.png,the png\na.jpg,the jpg\nA.webp,the webp\n")
    assert prepare("-d", folder, "-o", out, "--image_resizing") == 0
    captions = texts(out)
    assert captions["a.jpg"] == "the png"
    assert sorted(captions.values()) == ["the jpg", "the png", "the webp"]
    for name, seed in (("the png", 1), ("the jpg", 2), ("the webp", 3)):
        file = next(f for f, c in captions.items() if c == name)
        there, wanted = (
            np.asarray(i.resize((8, 8), 4)).astype(int) for i in (Image.open(out / file), photo(300, 300, seed))
        )
        assert np.abs(there - wanted).mean() < 6


def test_filtering_alone_copies_files_as_they_are(phone, tmp_path):
    out = tmp_path / "out"
    assert prepare("-d", phone, "-o", out, "--image_filtering", "min_size=64", "max_aspect_ratio=4") == 0
    assert (out / "IMG_3.webp").read_bytes() == (phone / "IMG_3.webp").read_bytes()
    assert (out / "IMG_1.jpg").read_bytes() == (phone / "IMG_1.JPG").read_bytes()
    assert {"tiny.png", "long.png", "IMG_1 (copy).jpg", "blurred.png"} <= set(texts(out))
    assert not (out / "buckets.json").exists()


def test_of_copies_the_largest_stays():
    looks = {seed: look_of(photo(400, 300, seed)) for seed in range(12)}
    assert near_duplicates(list(looks.values())) == []
    step = prepare_dataset_schema()["image_filtering"](remove_duplicates=True, min_size=1)
    sources = {"large": photo(400, 300, 1), "small": photo(200, 150, 1), "other": photo(400, 300, 2)}
    sources["captioned"] = sources["large"]
    pictures = [
        image_steps.Picture(name, None, ["a"] if name == "captioned" else [], size=i.size, look=look_of(i))
        for name, i in sources.items()
    ]
    image_steps.leave_out(pictures, step)
    assert {p.name: p.problem for p in pictures} == {
        "large": "duplicate of captioned",
        "small": "duplicate of captioned",
        "other": None,
        "captioned": None,
    }


@pytest.mark.unit
@pytest.mark.parametrize("change", ["scaled", "saved", "brighter", "one colour"])
def test_copies_look_the_same(change):
    image = photo(400, 300, 3)
    if change == "one colour":
        image = copy = Image.new("RGB", (300, 300), "red")
        assert not near_duplicates([look_of(image), look_of(Image.new("RGB", (300, 300), "blue"))])
    elif change == "scaled":
        copy = image.resize((133, 100))
    elif change == "brighter":
        copy = image.point(lambda v: min(255, int(v * 1.1)))
    else:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=35)
        copy = Image.open(buffer)
    assert near_duplicates([look_of(image), look_of(copy)]) == [(0, 1)]


@pytest.mark.unit
def test_sharpness_is_the_variance_of_the_laplacian():
    values = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
    padded = values.astype(float)
    laplacian = [
        padded[y - 1, x] + padded[y + 1, x] + padded[y, x - 1] + padded[y, x + 1] - 4 * padded[y, x]
        for y in range(1, 19)
        for x in range(1, 29)
    ]
    assert image_steps.sharpness(Image.fromarray(values)) == pytest.approx(np.var(laplacian), rel=1e-5)


def halves(width: int, height: int) -> Image.Image:
    """Left red, right blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "size", "pixels"),
    [
        ({}, (64, 64), {(4, 32): "red", (60, 32): "blue"}),
        ({"crop_position": "left"}, (64, 64), {(4, 32): "red", (58, 32): "red"}),
        ({"crop_position": "right"}, (64, 64), {(4, 32): "blue", (60, 32): "blue"}),
        ({"crop_position": "none"}, (128, 64), {(4, 32): "red", (120, 32): "blue"}),
        ({"mode": "contain", "fill": "#00ff00"}, (64, 64), {(4, 32): "red", (60, 32): "blue", (32, 4): "lime"}),
        ({"mode": "contain", "fill": "none"}, (64, 32), {(4, 16): "red", (60, 16): "blue"}),
        ({"target_resolution": "96x32"}, (96, 32), {(4, 16): "red", (90, 16): "blue"}),
    ],
)
def test_resizing_covers_or_contains(words, size, pixels):
    step = prepare_dataset_schema()["image_resizing"](**{"target_resolution": 64, "crop_position": "center"} | words)
    result = image_steps.resize(halves(200, 100), step)
    assert result.size == size == image_steps.resized_size((200, 100), step)
    for place, colour in pixels.items():
        expected = Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert np.abs(np.array(result.getpixel(place)) - expected).max() < 8


@pytest.mark.unit
def test_crop_and_scale_at_once_is_scale_and_crop():
    image = photo(301, 217, 1)
    size = image_steps.scaled_size(image.size, (96, 128), "cover")
    apart = image.resize(size, Image.Resampling.LANCZOS).crop(image_steps.crop_box(size, (96, 128), "top"))
    at_once = image_steps.cover(image, (96, 128), "lanczos", "top")
    assert np.abs(np.asarray(apart).astype(int) - np.asarray(at_once)).max() <= 1


def test_formats_quality_and_files_that_are_right_already(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    photo(64, 64, 1).save(folder / "right.jpg", quality=80)
    photo(200, 200, 2).save(folder / "large.png")
    assert prepare("-d", folder, "-o", out, "--image_resizing", "target_resolution=64", "quality=30") == 0
    assert (out / "right.jpg").read_bytes() == (folder / "right.jpg").read_bytes()
    small = (out / "large.jpg").stat().st_size
    assert prepare("-d", folder, "-o", out, "--image_resizing", "target_resolution=64") == 0
    assert (out / "large.jpg").stat().st_size > 1.5 * small
    assert prepare("-d", folder, "-o", out, "--image_resizing", "target_resolution=64", "format=png") == 0
    assert sorted(f.name for f in out.glob("*.[jp]*g")) == ["large.png", "right.png"]
    assert Image.open(out / "large.png").format == "PNG"


def test_every_parameter_can_be_given_as_text():
    """The command line gives all values as text; each parameter takes its default back in that form."""
    for name, model in prepare_dataset_schema().items():
        made = model(**{"model_type": "blip2"} if name == "auto_caption" else {})
        given = {
            key: ",".join(value) if isinstance(value, list) else str(value).lower() if value is not None else "off"
            for key, value in made.model_dump().items()
            if value is not None or key in ("blur_threshold", "max_tags", "general_threshold", "character_threshold")
        }
        assert {k: v for k, v in model(**given).model_dump().items() if k != "model_name"} == {
            k: v for k, v in made.model_dump().items() if k != "model_name"
        }


def test_pictures_of_phones(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    pillow_heif.from_pillow(photo(320, 240, 1)).save(folder / "IMG_0001.HEIC")
    (folder / "IMG_0001.txt").write_text("from a phone")
    assert prepare("-d", folder, "-o", out, "--image_filtering", "min_size=100") == 0
    assert texts(out) == {"IMG_0001.jpg": "from a phone"}
    assert Image.open(out / "IMG_0001.jpg").format == "JPEG"
    (folder / "IMG_0001.HEIC").rename(folder / "IMG_0001.jpg")  # as some apps do
    assert prepare("-d", folder, "-o", tmp_path / "again", "--image_filtering", "min_size=100") == 0
    assert Image.open(tmp_path / "again" / "IMG_0001.jpg").format == "JPEG"
    assert Image.open(out / "IMG_0001.jpg").size == (320, 240)


def test_pictures_are_taken_a_few_at_a_time():
    """However many there are, no more than a window of them is in memory."""
    started, most = [], 0
    for done, (item, result) in enumerate(image_steps.in_parallel(started.append, list(range(200)), 2, "")):
        most = max(most, len(started) - done)
        assert item == done and result is None
    assert done == 199 and 1 < most <= 6


def test_many_copies_of_one_picture(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(30):
        photo(300, 300).save(folder / f"{i}.png")
    assert prepare("-d", folder, "-o", out, "--image_resizing", "--num_workers", 8) == 0
    assert len(rows(out)) == 30
    assert not list(out.rglob("*.partial"))
    assert prepare("-d", folder, "-o", out, "--image_resizing", "--image_filtering", "remove_duplicates=true") == 0
    assert len(rows(out)) == 1 and len(list(out.glob("*.jpg"))) == len(list(out.glob("*.txt"))) + 1 == 1


@pytest.mark.unit
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_damaged_files_are_named_and_never_stop_a_run(tmp_path, form):
    """Bytes changed and ends cut off: a picture, or a ValueError in plain words."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    photo(96, 80).save(buffer, form)
    for _ in range(150):
        raw = bytearray(buffer.getvalue())
        for place in rng.integers(0, min(len(raw), 900), rng.choice([1, 3, 10])):
            raw[place] = rng.integers(256)
        known = image_steps.measure(bytes(raw[: rng.integers(len(raw) // 2, len(raw) + 1)]), SCRIPT, tmp_path / "t.jpg")
        assert known.get("problem", "") or known["size"]


@pytest.mark.unit
def test_colours_are_those_of_the_profile():
    """A profile in which red and blue have changed places, as Display P3 has its own red."""
    plain = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    (number,) = struct.unpack(">I", plain[128:132])
    tags = {
        plain[132 + 12 * i : 136 + 12 * i]: struct.unpack(">II", plain[136 + 12 * i : 144 + 12 * i])
        for i in range(number)
    }
    (red, length), (blue, _) = tags[b"rXYZ"], tags[b"bXYZ"]
    swapped = bytearray(plain)
    swapped[red : red + length], swapped[blue : blue + length] = plain[blue : blue + length], plain[red : red + length]
    swapped = bytes(swapped).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))

    def decoded(profile: bytes):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 30, 20)).save(buffer, "PNG", icc_profile=profile)
        return SCRIPT.decode_image(buffer.getvalue()).getpixel((3, 3))

    assert np.abs(np.array(decoded(swapped)) - (20, 30, 200)).max() <= 2
    assert decoded(plain) == decoded(b"no profile at all") == (200, 30, 20)


def test_a_datasets_data_set_as_input(tmp_path):
    import datasets

    images = [photo(300, 200, i) for i in range(3)]
    table = datasets.Dataset.from_dict(
        {"picture": images, "words": ["one", ["two", "deux"][0], None]},
        features=datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")}),
    )
    table.save_to_disk(tmp_path / "set")
    flags = ["--dataset_name", tmp_path / "set", "--image_column", "picture", "--caption_column", "words"]
    out = tmp_path / "out"
    assert prepare(*flags, "-o", out, "--image_filtering", "min_size=100") == 0
    assert texts(out) == {"row_0.png": "one", "row_1.png": "two", "row_2.png": ""}
    assert prepare(*flags, "-o", out, "--image_column", "image", "--image_filtering") == 2


def test_captions_of_each_model_and_what_is_kept(models, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("red", "blue"):
        tiny_models.colour_pictures(name)[0].resize((300, 300)).save(folder / f"{name}.png")
    (folder / "red.txt").write_text("my own words")

    def captions(number: int, *words: str) -> list[object]:
        out = tmp_path / f"out{number}"
        assert prepare("-d", folder, "-o", out, "--auto_caption", "max_new_tokens=8", *words) == 0
        return [texts(out)["red.png"], texts(out)["blue.png"]]

    florence = ("model_type=florence2", f"model_name={models['florence2']}")
    assert captions(1, *florence) == ["my own words", "a blue picture in detail"]
    assert captions(2, *florence, "overwrite=true", "trigger_word=sks") == [
        "sks, a red picture in detail",
        "sks, a blue picture in detail",
    ]
    assert captions(3, "model_type=auto", f"model_name={models['git']}") == ["my own words", "a blue picture"]
    assert captions(5, "model_type=auto", f"model_name={models['vit']}") == ["my own words", "a blue picture"]
    assert captions(4, f"model_name={models['blip2']}", "prompt=a", "overwrite=true") == ["red picture", "blue picture"]


def caption_step(models, **changes):
    return prepare_dataset_schema()["auto_caption"](model_name=str(models["blip2"]), max_new_tokens=8, **changes)


def test_a_batch_that_does_not_fit_is_halved(models, monkeypatch):
    import torch

    captioner, sizes = caption_models.Captioner(caption_step(models)), []
    original = captioner.describe

    def tight(images):
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError
        return original(images)

    monkeypatch.setattr(captioner, "describe", tight)
    assert captioner(tiny_models.colour_pictures()) == [f"a {c} picture" for c in COLOURS]
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_a_model_of_another_kind_is_refused(models, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    photo(300, 300).save(folder / "a.png")

    def error(*words: str) -> str:
        assert prepare("-d", folder, "-o", tmp_path / "out", *words) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in said)
        return said[-1]

    said = error("--auto_caption", "model_type=florence2", f"model_name={models['git']}")
    assert "can't be loaded as florence2" in said or "is no florence2 model" in said
    assert "no such folder: /no/where" in error("--auto_caption", "model_name=/no/where")
    assert "neither a local folder nor to be had from the hub" in error("--auto_caption", "model_name=nobody/nothing")
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "config.json").write_text('{"model_type": "florence2_old", "auto_map": {"AutoModel": "code.Model"}}')
    assert "trust_remote_code=true" in error("--auto_caption", "model_type=auto", f"model_name={strange}")
    assert "no model.onnx" in error("--auto_tagging", f"model_name={strange}")
    (strange / "model.onnx").write_bytes(b"no graph")
    (strange / "selected_tags.csv").write_text("tag_id,name,category,count\n0,x,0,1\n")
    assert "model.onnx" in error("--auto_tagging", f"model_name={strange}")
    (strange / "model.onnx").write_bytes((models["tagger"] / "model.onnx").read_bytes())
    assert "8 probabilities for 1 tags" in error("--auto_tagging", f"model_name={strange}")


def test_code_that_a_model_brings_runs_only_when_asked_for(models, tmp_path, capsys):
    own, folder = tmp_path / "own", tmp_path / "in"
    for place in (own, folder):
        place.mkdir()
    for file in models["git"].iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "mine.py").write_text(
        "from transformers import GitConfig, GitForCausalLM\n"
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "class Config(GitConfig):\n    model_type = 'mine'\n"
        "class Model(GitForCausalLM):\n    config_class = Config\n"
    )
    tiny_models.colour_pictures("blue")[0].resize((300, 300)).save(folder / "a.png")
    words = ["-d", folder, "-o", tmp_path / "out", "--auto_caption", "model_type=auto", f"model_name={own}"]
    assert prepare(*words) == 2
    assert "comes with code of its own: trust_remote_code=true runs that" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert prepare(*words, "trust_remote_code=true", "max_new_tokens=8") == 0
    assert (tmp_path / "ran").exists() and texts(tmp_path / "out") == {"a.png": "a blue picture"}


def test_weights_that_are_missing_are_not_made_up(models, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in models["git"].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    state = load_file(copy / "model.safetensors")
    state.pop(next(k for k in state if "visual_projection" in k))
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    step = prepare_dataset_schema()["auto_caption"](model_type="auto", model_name=str(copy))
    with pytest.raises(caption_models.ModelError, match="no weights for 1 tensors"):
        caption_models.Captioner(step)


def tagger(models, **changes):
    step = prepare_dataset_schema()["auto_tagging"](model_name=str(models["tagger"]), **changes)
    return caption_models.Tagger(step)


def test_tags_thresholds_and_their_order(models):
    (red,) = tiny_models.colour_pictures("red")
    assert tagger(models)([red]) == ["hatsune miku, red background, o_o"]
    assert tagger(models, character_threshold=0.9)([red]) == ["red background, o_o"]
    assert tagger(models, general_threshold=0.8)([red]) == ["hatsune miku, red background"]
    assert "o_o, never, " in tagger(models, threshold=0)([red])[0]
    assert tagger(models, max_tags=1)([red]) == ["red background"]
    assert tagger(models, replace_underscore=False, exclude_tags="o o")([red]) == ["hatsune_miku, red_background"]


def test_tagger_input_is_white_padded_bgr(models):
    made = tagger(models)
    tall = made.prepare(Image.new("RGB", (20, 400), (10, 20, 30)))
    assert tall.shape == (448, 448, 3) and tall.dtype == np.float32
    assert tall[200, 224].tolist() == [30, 20, 10] and tall[200, 10].tolist() == [255, 255, 255]
    assert made([Image.new("RGB", (20, 400)), Image.new("RGB", (20, 20))]) == [
        "hatsune miku, white border, o_o",
        "hatsune miku, o_o",
    ]


def test_a_tagger_with_a_fixed_batch(tmp_path):
    folder = tiny_models.make_tagger(tmp_path / "fixed", batch=3)
    made = caption_models.Tagger(prepare_dataset_schema()["auto_tagging"](model_name=str(folder)))
    assert made.batch_size == 3
    assert [t.split(", ")[1] for t in made(tiny_models.colour_pictures("blue", "red"))] == [
        "blue background",
        "red background",
    ]


@pytest.mark.parametrize(
    ("mode", "expected"), [("append", "red thing, o_o"), ("missing", "red thing"), ("replace", "o_o")]
)
def test_where_tags_go(models, tmp_path, mode, expected):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    Image.new("RGB", (300, 300), (90, 90, 90)).save(folder / "a.png")
    Image.new("RGB", (300, 300), (60, 90, 90)).save(folder / "b.png")
    (folder / "a.txt").write_text("red thing")
    words = [f"model_name={models['tagger']}", "character_threshold=1", f"captions={mode}"]
    assert prepare("-d", folder, "-o", out, "--auto_tagging", *words) == 0
    assert texts(out)["a.png"] == expected
    assert texts(out)["b.png"] != ""


def test_yaml_and_json_say_the_same_as_flags(phone, tmp_path, capsys):
    values = {
        "data_dir": str(phone),
        "output_dir": str(tmp_path / "out"),
        "trigger_word": "sks",
        "steps": ["image_filtering", {"image_resizing": {"target_resolution": 96}}],
    }
    (tmp_path / "c.json").write_text(json.dumps(values))
    assert prepare("--config", tmp_path / "c.json", "--image_resizing", "target_resolution=64") == 0
    assert Image.open(tmp_path / "out" / "cmyk.jpg").size == (64, 64)
    assert prepare("--config", ROOT / "config" / "prepare_dataset.yaml", "-d", phone, "-o", tmp_path / "two") == 2
    assert "blip2-opt-2.7b is neither a local folder" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("steps:\n  image_resising: {}\n")
    assert prepare("--config", tmp_path / "c.yaml", "-d", phone, "-o", tmp_path / "three") == 2
    assert "image_resising: unknown step; the nearest is image_resizing" in capsys.readouterr().err


@pytest.mark.faults
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("-d IN -o OUT", "no step is switched on"),
        ("-d IN --image_filtering", "--output_dir is missing"),
        ("-o OUT --image_filtering", "give --data_dir"),
        ("-d NOWHERE -o OUT --image_filtering", "--data_dir NOWHERE: no such folder"),
        ("-d IN -o IN/out --image_filtering", "lie in one another"),
        ("-d IN -o USED --image_filtering", "holds files that are not from here"),
        ("-d IN -o OUT --image_filterin", "did you mean --image_filtering?"),
        ("-d IN -o OUT --image_filtering min_siz=3", "--image_filtering.min_siz: unknown parameter; the nearest is min_size"),
        ("-d IN -o OUT --image_filtering min_size=big", "--image_filtering.min_size: input should be a valid integer"),
        ("-d IN -o OUT --image_filtering min_size", "NAME=VALUE"),
        ("-d IN -o OUT --image_filtering min_aspect_ratio=3", "min_aspect_ratio is above max_aspect_ratio"),
        ("-d IN -o OUT --image_resizing mode=fit", "'cover' or 'contain'"),
        ("-d IN -o OUT --image_resizing fill=blu", "fill 'blu' is no colour"),
        ("-d IN -o OUT --image_resizing target_resolution=0", "should be one number, or width x height"),
        ("-d IN -o OUT --aspect_ratio_bucketing custom_buckets=5,5", "multiples of 8"),
        ("-d IN -o OUT --auto_caption model_type=auto", "model_type auto needs model_name"),
        ("-d IN -o OUT --auto_caption trigger_word=a --trigger_word b", "trigger_word is given as a and as b"),
        ("-d IN -o OUT --image_filtering --seed 3", "--seed is read by --doctor alone"),
        ("-d IN --doctor --image_filtering", "--doctor changes nothing"),
        ("-d IN --doctor --resolution 300", "--resolution 300 is not divisible by 8"),
        ("-d IN --doctor --aspect_ratio_buckets 3", "'3' is no \"height,width\""),
        ("-d IN --doctor --family flux --resolution 520", "--resolution 520 is not divisible by 16"),
        ("-d IN --doctor --validation_split 0.9", "leaves none of 1 images to train on"),
        ("--config NOWHERE.yaml", "--config NOWHERE.yaml: No such file"),
        ("-d EMPTY -o OUT --image_filtering", "no images in"),
        ("-d IN -o OUT --image_filtering min_size=4000", "none of 1 images is left"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(tmp_path, monkeypatch, capsys, words, expected):
    monkeypatch.chdir(tmp_path)
    for name in ("IN", "USED", "EMPTY"):
        (tmp_path / name).mkdir()
    photo(300, 300).save(tmp_path / "IN" / "a.png")
    (tmp_path / "USED" / "thesis.txt").write_text("mine")
    try:
        code = prepare(*words.split())
    except SystemExit as stop:
        code = stop.code
    error = [line for line in capsys.readouterr().err.splitlines() if line and "images/s" not in line]
    assert code == 2 and len(error) == 1, error
    assert expected in error[0]


def test_the_report_is_one_file_that_escapes_what_people_write(phone, tmp_path):
    out = tmp_path / "out"
    (phone / "IMG_2.caption").write_text("<script>alert(1)</script> & co")
    assert prepare("-d", phone, "-o", out, *EVERY_STEP) == 0
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in html and "<script>alert" not in html
    assert not re.search(r'(src|href)="(?!data:image/jpeg;base64,)', html)
    assert html.count("<figure") == 15 and html.count("data:image") == 13  # two could not be decoded
    for words in ("duplicate of IMG_1.JPG", "too small: 100 x 100", "no caption", "112 × 144", "400 × 300 → "):
        assert words in html, words


HEALTHY = "nothing that will hurt"


@pytest.fixture
def healthy(tmp_path) -> Path:
    """Eight pictures with nothing wrong."""
    folder = tmp_path / "healthy"
    folder.mkdir()
    for i in range(8):
        photo(512, 512, i).save(folder / f"{i}.jpg", quality=95)
        (folder / f"{i}.txt").write_text(f"sks, a thing number {i}")
    return folder


def spoil(folder: Path, how: str) -> None:
    """Does one thing to a healthy set that hurts."""
    if how == "duplicate":
        photo(512, 512, 1).resize((600, 600)).save(folder / "again.png")
        (folder / "again.txt").write_text("sks, once more")
    elif how == "damaged":
        (folder / "0.jpg").write_bytes((folder / "0.jpg").read_bytes()[:5000])
    elif how == "small":
        photo(200, 200, 30).save(folder / "0.jpg")
    elif how == "long":
        photo(512, 1024, 30).save(folder / "0.jpg")
    elif how == "bare":
        (folder / "0.txt").unlink()
    elif how == "trigger":
        (folder / "0.txt").write_text("a thing")
    elif how == "same":
        for file in folder.glob("*.txt"):
            file.write_text("sks thing")
    elif how == "wordy":
        (folder / "0.txt").write_text("sks " + "word " * 80)
    elif how == "orphan":
        (folder / "O.txt").write_text("sks, whose?")
    elif how == "shared":
        photo(512, 512, 30).save(folder / "0.png")
    elif how == "missing":
        (folder / "metadata.jsonl").write_text('{"file_name": "gone.jpg", "text": "sks"}\n')
    elif how == "metadata":
        (folder / "metadata.jsonl").write_text("{")
    elif how == "phone":
        (folder / "x.heic").write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "expected", "flags"),
    [
        ("duplicate", "pairs of images that look the same: 1 (1.jpg = again.png)", ()),
        ("damaged", "images that can't be read: 1 (0.jpg: damaged", ()),
        ("small", "images enlarged to fill their bucket: 1 of 8 (0.jpg: 200 x 200, 2.6 times)", ()),
        ("long", "images that lose more than a quarter to the crop: 1 of 8 (0.jpg: 50%)", ()),
        ("long", "images alone in their bucket: 1 of 8 (0.jpg)",
         ("--aspect_ratio_buckets", "512,512;720,368", "--train_batch_size", "2")),
        ("bare", "images without a caption: 1 of 8 (0.jpg)", ()),
        ("trigger", "captions without the trigger word 'sks': 1 of 8 (0.jpg)", ("--trigger_word", "sks")),
        ("same", "all captions are the same ('sks thing')", ()),
        ("wordy", "captions longer than the 77 tokens that clip", ()),
        ("wordy", "longer than the 77 tokens that clip_l reads", ("-m", ROOT / "assets" / "toy_sd15")),
        ("orphan", "caption files without an image: 1 (O.txt)", ()),
        ("shared", "images that share a caption file: 2 (0.jpg, 0.png)", ()),
        ("missing", "images named in the metadata that are not there: 1 (gone.jpg)", ()),
        ("metadata", "line 1: not JSON", ()),
        ("phone", "HEIC files, which are not read in training: 1 (x.heic)", ()),
        ("duplicate", "held-out images that look like trained ones: 1 (", ("--validation_split", "0.1", "--seed", "SEED")),
    ],
)  # fmt: skip
def test_the_doctor_finds(healthy, capsys, how, expected, flags):
    spoil(healthy, how)
    if "SEED" in flags:  # one that holds out one of the two copies
        names = sorted(f.name for f in healthy.glob("*.*g"))

        def leaks(seed: int) -> bool:
            examples = [SCRIPT.Example(n, [], None) for n in names]
            SCRIPT.hold_out(examples, SimpleNamespace(validation_split=0.1, seed=seed))
            return {e.name: e.held_out for e in examples}["1.jpg"]

        flags = [str(next(s for s in range(100) if leaks(s))) if f == "SEED" else f for f in flags]
    before = tree(healthy)
    assert prepare("--doctor", "-d", healthy, *flags) == 1
    said = capsys.readouterr().out
    assert expected in said, said
    place = said.splitlines()
    hurting = [i for i, line in enumerate(place) if line.startswith("HURTS") and expected in line]
    assert hurting and place[hurting[0] + 1].strip().startswith("->")
    assert tree(healthy) == before


def test_the_doctor_leaves_a_healthy_set_in_peace(healthy, capsys):
    assert prepare("--doctor", "-d", healthy, "--trigger_word", "sks", "--train_batch_size", "4") == 0
    said = capsys.readouterr().out
    assert HEALTHY in said and "HURTS" not in said
    for file in healthy.glob("*.txt"):
        file.unlink()
    assert prepare("--doctor", "-d", healthy, "--instance_prompt", "a photo of sks") == 0
    assert "HURTS" not in capsys.readouterr().out


def test_the_doctor_follows_prepared_buckets(phone, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("-d", phone, "-o", out, "--trigger_word", "sks", *EVERY_STEP) == 0
    capsys.readouterr()
    assert prepare("--doctor", "-d", out, "--instance_prompt", "sks") == 0
    said = capsys.readouterr().out
    assert re.search(r"112 x 144 +\d +0%", said) and "enlarged" not in said


def test_training_says_what_the_doctor_would(healthy, tmp_path, capsys):
    spoil(healthy, "duplicate")
    spoil(healthy, "small")
    assert run_here(FAMILIES["sd15"], tmp_path / "run", "-d", healthy, "--resolution", "256") == 0
    said = capsys.readouterr().out
    assert "9 images from 200 x 200 to 600 x 600 pixels" in said
    assert "warning: images enlarged to fill their bucket: 1 of 9 (0.jpg: 200 x 200, 1.3 times); " in said
    assert "prepare_dataset.py --doctor looks closer" in said and "look the same" not in said


def test_a_caption_edited_beside_the_metadata_is_trained(healthy):
    named = [{"file_name": f"{i}.jpg", "text": f"from the metadata {i}"} for i in range(8)]
    named[2]["text"] = ["sks, a thing number 2", "another"]
    (healthy / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in named))
    (healthy / "3.txt").unlink()
    captions = {e.name: e.captions for e in SCRIPT.folder_examples(healthy, None)}
    assert captions["1.jpg"] == ["sks, a thing number 1"]
    assert captions["2.jpg"] == ["sks, a thing number 2", "another"]
    assert captions["3.jpg"] == ["from the metadata 3"]
    assert SCRIPT.folder_examples(healthy, "text")[1].captions == ["from the metadata 1"]


# ---- what an edited or damaged journal, links and odd names can do -----------------------------------------------------

BY_HAND = {
    "not JSON": b"nonsense\n",
    "not UTF-8": b"\xff\xfe\x88\n",
    "no list": b'{"image": 1}\n',
    "too short": b'["image", "a"]\n',
    "too deep": b"[" * 9000 + b"\n",
    "a key that is no text": b'["image", ["a"], null]\n',
    "another kind": b'["shell", "a", "rm"]\n',
    "a name outside": b'["name", "a.png", "../escaped"]\n',
    "a name elsewhere": b'["name", "a.png", "/tmp/escaped"]\n',
    "a name in Windows": b'["name", "a.png", "..\\\\escaped"]\n',
    "a name with a NUL": b'["name", "a.png", "a\\u0000b"]\n',
    "a name that is a number": b'["name", "a.png", 5]\n',
    "an image outside": b'["image", "gone", {"key": "x", "file": "../victim.txt", "bytes": 8}]\n',
    "an image elsewhere": b'["image", "gone", {"key": "x", "file": "VICTIM", "bytes": 8}]\n',
    "an image without a file": b'["image", "a", {"key": "x"}]\n',
    "an image that is a number": b'["image", "a", 7]\n',
    "a look without a size": b'["look", "DIGEST", {"look": [1, 2, ""], "facts": {}}]\n',
    "a text that is none": b'["text", "a", [1]]\n',
}


@pytest.mark.parametrize("name", BY_HAND)
def test_an_edited_journal_leads_nowhere_else(name, tmp_path, capsys):
    """What this program can't have written counts as not there; nothing outside the folder is written or taken away."""
    folder, out, victim = tmp_path / "in", tmp_path / "out", tmp_path / "victim.txt"
    folder.mkdir()
    victim.write_text("precious")
    photo(80, 60, 1).save(folder / "a.png")
    (folder / "a.txt").write_text("a cat")
    words = ("-d", folder, "-o", out, "--image_resizing", "target_resolution=64")
    assert prepare(*words) == 0
    first = tree(out)
    digest = hashlib.sha256((folder / "a.png").read_bytes()).hexdigest().encode()
    line = BY_HAND[name].replace(b"VICTIM", str(victim).encode()).replace(b"DIGEST", digest)
    with (out / ".prepare" / "journal.jsonl").open("ab") as journal:
        journal.write(line)
    capsys.readouterr()
    assert prepare(*words) == 0
    assert "1 lines of" in capsys.readouterr().out
    again = tree(out)
    kept = [f for f in first if not f.startswith(".prepare") and not f.endswith(".html")]
    assert kept and all(first[f] == again[f] for f in kept) and first.keys() == again.keys()
    assert victim.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "victim.txt"]
    assert not (tmp_path.parent / "escaped.jpg").exists()


def test_links_are_a_rule_and_said(tmp_path, capsys):
    """A link to a file is read as if the file lay there, a folder behind a link is left alone, none of both is written to."""
    folder, other, out = tmp_path / "in", tmp_path / "other", tmp_path / "out"
    folder.mkdir(), other.mkdir()
    photo(80, 60, 1).save(folder / "a.png")
    photo(80, 60, 2).save(other / "b.png")
    (folder / "linked.png").symlink_to(other / "b.png")
    (folder / "album").symlink_to(other)
    (folder / "gone.png").symlink_to(other / "nowhere.png")
    (folder / "inside.png").symlink_to(folder / "a.png")
    (folder / "round.png").symlink_to("round.png")
    before = tree(other)
    assert prepare("-d", folder, "-o", out, "--image_filtering", "min_size=10") == 0
    said = capsys.readouterr().out
    assert "1 symbolic links to files outside it: read as if they lay there (linked.png)" in said
    assert "1 symbolic links to folders: left alone (album)" in said
    assert {row["file_name"] for row in rows(out)} == {"a.png", "inside.png", "linked.png"}
    assert not (out / "linked.png").is_symlink() and tree(other) == before


@pytest.mark.parametrize("again", [False, True])
def test_a_link_in_the_output_is_not_followed_out_of_it(again, tmp_path, capsys):
    folder, other, out = tmp_path / "in", tmp_path / "other", tmp_path / "out"
    (folder / "trip").mkdir(parents=True), other.mkdir()
    photo(80, 60, 1).save(folder / "trip" / "a.png")
    words = ("-d", folder, "-o", out, "--image_resizing", "target_resolution=64")
    (folder / "b.png").write_bytes((folder / "trip" / "a.png").read_bytes())
    if again:
        assert prepare(*words) == 0
        shutil.rmtree(out / "trip")
        (folder / "trip" / "a.png").unlink()  # the copy of it would be taken away
    else:
        (out / ".prepare").mkdir(parents=True)
    (out / "trip").symlink_to(other)
    (other / "a.jpg").write_text("precious")
    assert prepare(*words) == 2
    assert "is a link that leads out of it" in capsys.readouterr().err
    assert (other / "a.jpg").read_text() == "precious" and len(list(other.iterdir())) == 1


def test_names_that_are_not_utf8_and_that_others_cannot_have(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    photo(80, 60, 1).save(folder / "a.png")
    for name in (b"\xff\xfe.png", b"line\nbreak.png", b"a:b.png", b"\xc3\xa4.png"):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes((folder / "a.png").read_bytes())
    assert prepare("-d", folder, "-o", out, "--image_resizing", "target_resolution=64") == 0
    names = {row["file_name"] for row in rows(out)}
    assert names == {"a.jpg", "_udcff_udcfe.jpg", "line_break.jpg", "a_b.jpg", "\u00e4.jpg"}
    first = tree(out)
    assert prepare("-d", folder, "-o", out, "--image_resizing", "target_resolution=64") == 0
    assert {f for f in tree(out) if f.endswith(".jpg")} == {f for f in first if f.endswith(".jpg")}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pictures_of_no_numbers_are_left_out(value, tmp_path, recwarn):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    photo(80, 60, 1).save(folder / "a.png")
    Image.fromarray(np.full((40, 50), value, dtype=np.float32)).save(folder / "n.tif")
    assert prepare("-d", folder, "-o", out, "--image_filtering", "min_size=10") == 0
    assert [row["reason"] for row in rows(out, "left_out.jsonl")] == ["damaged (values that are no numbers)"]
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize(
    ("words", "bucket", "error"),
    [
        (["--image_resizing", "target_resolution=256"], (256, 256), None),
        (["--image_resizing", "target_resolution=128x512"], (256, 256), None),
        (["--image_resizing", "quality=90"], (512, 512), None),
        (
            ["--image_resizing", "target_resolution=512", "--aspect_ratio_bucketing", "base_resolution=256"],
            None,
            "512x512",
        ),
        (
            ["--image_resizing", "target_resolution=64", "--aspect_ratio_bucketing", "custom_buckets=128,128"],
            None,
            "64x64",
        ),
        (
            ["--image_resizing", "target_resolution=128", "--aspect_ratio_bucketing", "custom_buckets=128,128"],
            (128, 128),
            None,
        ),
    ],
)
def test_a_target_resolution_beside_buckets_is_obeyed_or_an_error(words, bucket, error, tmp_path, capsys):
    """Buckets that pictures are written at have the target's area, unless they are given too."""
    (tmp_path / "in").mkdir()
    photo(600, 600, 1).save(tmp_path / "in" / "a.png")
    words = [*words] if "--aspect_ratio_bucketing" in words else [*words, "--aspect_ratio_bucketing"]
    code = prepare("-d", tmp_path / "in", "-o", tmp_path / "out", *words, "resize_images=true")
    if error:
        assert code == 2 and f"target_resolution {error} has no effect" in capsys.readouterr().err
    else:
        assert code == 0 and Image.open(tmp_path / "out" / "a.jpg").size == bucket


def test_the_readmes_commands_are_taken(tmp_path, monkeypatch, capsys):
    """Every prepare_dataset command in the README and in the program's own help passes the check of its settings."""
    text = (ROOT / "README.md").read_text(encoding="utf-8") + prepare_dataset.__doc__
    text = text.replace("\\\n", " ")
    commands = re.findall(r"(?:run_prepare_dataset\.sh|prepare_dataset\.py) (-d photos -o .*)", text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir(), (tmp_path / "prepared").mkdir()
    assert len(commands) >= 2
    for command in commands:
        settings.read_settings(shlex.split(command), SCRIPT)


def cpu_seconds(process: int) -> float:
    """What a process has computed so far: on a busy machine, how far it is."""
    return sum(psutil.Process(process).cpu_times()[:2])


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_at_any_time_ends_with_a_line(number, code, tmp_path):
    """While libraries are imported, pictures read and written; the same command then does the rest."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for k in range(60):
        photo(200, 150, k).save(folder / f"{k}.png")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "dataset" / "prepare_dataset.py"),
        "-d",
        str(folder),
        "-o",
        str(out),
    ]
    command += ["--image_resizing", "target_resolution=1024", "--num_workers", "1"]
    # Python has started and imports libraries; the folder is there; some pictures are
    moments = [lambda: cpu_seconds(process.pid) > 0.15, out.exists, lambda: len(list(out.glob("*.jpg"))) > 5]
    for moment in moments:
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        limit = time.monotonic() + 60
        while not moment() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)
        process.send_signal(getattr(signal, number))
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert f"stopped by {number}" in err and "Traceback" not in err
    assert prepare(*command[2:]) == 0
    assert len(rows(out)) == 60 and not list(out.rglob(".*.partial"))
    assert all(Image.open(out / row["file_name"]).size == (1024, 1024) for row in rows(out))


# ---- masks ----


def spotted(path: Path, size: tuple[int, int], mode: str = "RGB") -> None:
    """Black with a white spot at its upper left, or clear but for the spot; turned by EXIF where it is a JPEG file."""
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
    "both": (*("--image_resizing", "target_resolution=128"), "--aspect_ratio_bucketing", "custom_buckets=64,96;96,64"),
}


@pytest.mark.parametrize("where", ["alpha", "folder", "-mask"])
@pytest.mark.parametrize("steps", MASKED)
def test_a_mask_goes_through_all_steps_with_its_picture(steps, where, tmp_path):
    """The picture is its own mask: whatever is done to the one must have been done to the other, names included."""
    photos, masks, out = tmp_path / "photos", tmp_path / "masks", tmp_path / "out"
    (photos / "one").mkdir(parents=True), (masks / "one").mkdir(parents=True)
    mode, size = "RGBA" if where == "alpha" else "RGB", (160, 120)
    for name in ("one/ä?.png", "two.png" if where == "alpha" else "two.jpg"):
        spotted(photos / name, size, mode)
        mask = {"folder": masks / name, "-mask": (photos / name).with_stem(f"{Path(name).stem}-mask")}.get(where)
        if mask:
            spotted(mask, size)
    given = {"folder": masks}.get(where, where)
    assert prepare("-d", photos, "-o", out, f"--masked_loss={given}", "--trigger_word", "sks", *MASKED[steps]) == 0
    examples = SCRIPT.with_masks(SCRIPT.folder_examples(out, None), out, "-mask")
    assert len(examples) == 2 and all(e.read_mask for e in examples)
    for example in examples:
        image = SCRIPT.decode_image(example.read())
        mask = Image.open(io.BytesIO(example.read_mask()))
        assert mask.mode == "L" and mask.size == image.size
        picture, found = (np.asarray(i.convert("L")).astype(int) for i in (image, mask))
        if where == "alpha":  # laid on white, only the mask shows the spot
            assert picture.min() > 250 or steps == "padded"
            assert 0.05 < (found > 127).mean() < 0.5 and found[:3, :3].max() < 200
        else:
            assert np.abs(picture - found).max() <= 24
    report = (out / "report.html").read_text()
    assert report.count('class="mask"') == 2 and "red: what hardly counts" in report


def test_masks_are_written_once_and_go_with_their_pictures(tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a", "b", "c"):
        spotted(photos / f"{name}.png", (160, 120))
    for name in ("a", "b"):
        spotted(photos / f"{name}-mask.png", (160, 120))
    words = ("-d", photos, "-o", out, "--image_resizing", "target_resolution=64")
    assert prepare(*words, "--masked_loss=-mask") == 0
    said = capsys.readouterr().out
    assert "1 images without one" in said and f"-d {out} --masked_loss=-mask" in said
    before = (out / "a-mask.png").stat().st_mtime_ns
    (photos / "b.png").unlink(), (photos / "b-mask.png").unlink()
    assert prepare(*words, "--masked_loss=-mask") == 0
    assert (out / "a-mask.png").stat().st_mtime_ns == before
    assert sorted(f.name for f in out.glob("*.[jp]*g")) == ["a-mask.png", "a.jpg", "c.jpg"]
    capsys.readouterr()
    Image.new("L", (160, 120)).save(photos / "a-mask.png")
    spotted(photos / "d.png", (160, 120))
    Image.new("L", (60, 120), 255).save(photos / "d-mask.png")
    assert prepare(*words, "--masked_loss=-mask") == 0
    said = capsys.readouterr().out
    assert "left out: a.png: the mask of a.png is black" in said
    assert "left out: d.png: the mask of d.png has another shape" in said
    assert [f.name for f in out.glob("*-mask*")] == []
    assert prepare(*words, "--masked_loss", "alpha") == 2
    assert "a-mask.png: a picture's name that ends with -mask" in capsys.readouterr().err
    assert prepare(*words, "--masked_loss", "alfa") == 2
    assert "neither alpha" in capsys.readouterr().err
