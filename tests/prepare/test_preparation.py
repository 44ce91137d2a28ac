"""prepare_dataset.py from the first step to the last, with real files and small models; and run again."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import FAMILIES, load_script, run_here
from photo_folders import EVERY_STEP, model_steps, photo, prepare, read_captions, read_rows, tree
from PIL import Image
from tiny_models import COLOURS

from lora_training.prepare import captioning, images, reading

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


def test_a_phones_folder_goes_through_all_steps(phone, models, tmp_path, capsys):
    before, out = tree(phone), tmp_path / "out"
    assert prepare("-d", phone, "-o", out, "--trigger_word", "sks", *EVERY_STEP, *model_steps(models)) == 0
    assert tree(phone) == before
    reasons = {row["file_name"]: row["reason"] for row in read_rows(out, "left_out.jsonl")}
    assert {name: re.match(r"[\w ]+", reason)[0] for name, reason in reasons.items()} == {
        "IMG_1 (copy).jpg": "duplicate of IMG_1",
        "blurred.png": "blurred",
        "damaged.jpg": "damaged ",
        "long.png": "too long",
        "text.png": "not an image",
        "tiny.png": "too small",
    }
    captions = read_captions(out)
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
    for row in read_rows(out):
        image = Image.open(out / row["file_name"])
        assert (image.mode, image.format, len(image.getexif())) == ("RGB", "JPEG", 0)
        assert f"{image.width} x {image.height}" == row["bucket"]
        beside = (out / row["file_name"]).with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert beside == row["text"][0]  # a list in each row, because one image has two captions
    assert Image.open(out / "turned.jpg").size == (112, 144)  # upright
    close = np.asarray(Image.open(out / "cmyk.jpg").resize((8, 8), 4)).astype(int)
    assert np.abs(close - np.asarray(photo(320, 320, 4).resize((8, 8), 4))).mean() < 12
    printed = capsys.readouterr().out
    assert re.search(r"auto_caption +9 +6 +0 +3 kept", printed)
    assert re.search(r"112 x 144 +\d", printed)


def test_a_lora_trains_on_the_buckets_as_they_are(phone, tmp_path, capsys):
    out, family = tmp_path / "out", FAMILIES["sd15"]
    assert prepare("-d", phone, "-o", out, "--trigger_word", "sks", *EVERY_STEP) == 0
    flags = ["-d", out, "--resolution", "128", "--train_batch_size", "2", "--max_train_steps", "2"]
    assert run_here(family, tmp_path / "run", *flags) == 0
    printed = capsys.readouterr().out
    assert f"buckets as prepared: {out / 'buckets.json'}" in printed
    assert re.findall(r"(\d+ x \d+) +(\d+)   0%", printed[printed.index("buckets as") :])
    assert "left alone" not in printed
    assert run_here(family, tmp_path / "run", "-d", out, "--resolution", "64") == 2
    error = capsys.readouterr().err
    assert "--resolution 64: the pictures are prepared for 128" in error and error.count("\n") == 1
    assert (
        run_here(family, tmp_path / "run", "-d", out, "--aspect_ratio_buckets", "64,64", "--overwrite") == 0
    )
    parse_args = load_script(family.script).parse_args
    argv = ["-m", "BASE", "-d", str(out), "--aspect_ratio_buckets", "auto"]  # as the recipes have it
    prepared = parse_args(argv)
    assert prepared.resolution == [128] and ";" in prepared.aspect_ratio_buckets
    scaled = parse_args([*argv, "--resolution", "64"])
    assert (scaled.resolution, scaled.aspect_ratio_buckets) == ([64], "auto")
    assert "the pictures are prepared for 128, and scaled to 64" in capsys.readouterr().out
    (out / "buckets.json").write_text("[]")
    assert run_here(family, tmp_path / "run", "-d", out) == 2
    assert "prepare the folder again" in capsys.readouterr().err


def test_a_second_run_does_only_what_is_missing(phone, models, tmp_path, capsys, monkeypatch):
    out, arguments = tmp_path / "out", [*EVERY_STEP, *model_steps(models)]
    assert prepare("-d", phone, "-o", out, *arguments) == 0
    before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in out.rglob("*.*") if f.is_file()}
    del before[out / "report.html"]

    def refuse(*_):
        raise AssertionError("nothing is to be done")

    with monkeypatch.context() as patch:
        patch.setattr(captioning, "load_captioner", refuse)
        patch.setattr(captioning, "load_tagger", refuse)
        patch.setattr(images, "render_image", refuse)
        original, read = reading.measure_picture, []
        patch.setattr(reading, "measure_picture", lambda raw, *more: read.append(raw) or original(raw, *more))
        assert prepare("-d", phone, "-o", out, *arguments) == 0
        assert {*read} == {
            (phone / n).read_bytes() for n in ("damaged.jpg", "text.png")
        }  # perhaps it's readable now
        left = {f: f.read_bytes() for f in before}
    assert left == {f: content for f, (_, content) in before.items()}
    written = [f for f in before if f.suffix in (".jpg", ".txt")]
    assert all(f.stat().st_mtime_ns == before[f][0] for f in written)
    capsys.readouterr()
    photo(320, 320, 20).save(phone / "AAA.png")
    (out / "IMG_2.jpg").unlink()
    assert prepare("-d", phone, "-o", out, *arguments) == 0
    printed = capsys.readouterr().out
    assert re.search(r"reading +16 +1 +13", printed)
    assert re.search(r"auto_caption +10 +1 +6", printed)
    assert re.search(r"resizing \+ bucketing +10 +2 +8", printed)
    arguments[arguments.index("base_resolution=128")] = "base_resolution=64"
    assert prepare("-d", phone, "-o", out, *arguments) == 0
    assert Image.open(out / "AAA.jpg").size == (64, 64)


def test_an_interrupted_run_goes_on(phone, models, tmp_path, capsys, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = ["--num_workers", 1, *EVERY_STEP, *model_steps(models)]
    assert prepare("-d", phone, "-o", whole, *arguments) == 0
    original, calls = images.render_image, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(images, "render_image", interrupted)
        assert prepare("-d", phone, "-o", out, *arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    journal = out / ".prepare" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'["image", "cut o')
    assert prepare("-d", phone, "-o", out, *arguments) == 0
    done, known = re.search(r"resizing \+ bucketing +9 +(\d) +(\d)", capsys.readouterr().out).groups()
    assert int(done) >= 1 and int(known) >= 3 and int(done) + int(known) == 9
    ignored = ("report.html", ".prepare/journal.jsonl")
    first, second = ({k: v for k, v in tree(f).items() if k not in ignored} for f in (whole, out))
    assert first == second


def test_what_a_person_edits_stays_and_what_is_gone_goes(phone, tmp_path, capsys):
    out, arguments = tmp_path / "out", ["--image_resizing", "target_resolution=64", "--trigger_word", "sks"]
    assert prepare("-d", phone, "-o", out, *arguments) == 0
    (out / "IMG_1.txt").write_text("sks, by my own hand\n")
    (out / "tiny.txt").write_text("")
    photo(64, 64, 40).save(out / "cmyk.jpg")  # retouched
    retouched = (out / "cmyk.jpg").read_bytes()
    changed = (out / "metadata.jsonl").read_text(encoding="utf-8").replace("a döner", "a kebab")
    (out / "metadata.jsonl").write_text(changed, encoding="utf-8")
    (phone / "long.png").unlink()
    for _ in range(2):
        assert prepare("-d", phone, "-o", out, *arguments) == 0
        printed = capsys.readouterr().out
        assert "3 edited by hand kept" in printed
        assert (out / "cmyk.jpg").read_bytes() == retouched
        captions = read_captions(out)
        assert captions["IMG_1.jpg"] == "sks, by my own hand"
        assert captions["tiny.jpg"] == "" and (out / "tiny.txt").read_text() == ""
        assert captions["IMG_2.jpg"] == "sks, a kebab"
        assert (out / "IMG_2.txt").read_text() == "sks, a kebab\n"
    assert not (out / "long.jpg").exists() and not (out / "long.txt").exists()
    (out / "IMG_1.txt").unlink()
    assert prepare("-d", phone, "-o", out, *arguments) == 0
    assert read_captions(out)["IMG_1.jpg"] == "sks, ein Bär vor der Tür"


def test_filtering_alone_copies_files_as_they_are(phone, tmp_path):
    out = tmp_path / "out"
    assert prepare("-d", phone, "-o", out, "--image_filtering", "min_size=64", "max_aspect_ratio=4") == 0
    assert (out / "IMG_3.webp").read_bytes() == (phone / "IMG_3.webp").read_bytes()
    assert (out / "IMG_1.jpg").read_bytes() == (phone / "IMG_1.JPG").read_bytes()
    assert {"tiny.png", "long.png", "IMG_1 (copy).jpg", "blurred.png"} <= set(read_captions(out))
    assert not (out / "buckets.json").exists()


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
    assert read_captions(out) == {"row_0.png": "one", "row_1.png": "two", "row_2.png": ""}
    assert prepare(*flags, "-o", out, "--image_column", "image", "--image_filtering") == 2
