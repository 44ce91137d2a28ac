"""--doctor: what is wrong with a data set, and nothing where nothing is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import FAMILIES, ROOT, run_here
from photo_folders import EVERY_STEP, photo, prepare, tree

from lora_training.data.examples import hold_out
from lora_training.data.folders import Example, folder_examples

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


HEALTHY = "nothing that will hurt"


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
        ("duplicate", "held-out images that look like trained ones: 1 (",
         ("--validation_split", "0.1", "--seed", "SEED")),
    ],
)  # fmt: skip
def test_the_doctor_finds(healthy, capsys, how, expected, flags):
    spoil(healthy, how)
    if "SEED" in flags:  # one that holds out one of the two copies
        names = sorted(f.name for f in healthy.glob("*.*g"))

        def leaks(seed: int) -> bool:
            examples = [Example(n, [], None) for n in names]
            hold_out(examples, SimpleNamespace(validation_split=0.1, seed=seed))
            return {e.name: e.held_out for e in examples}["1.jpg"]

        flags = [str(next(s for s in range(100) if leaks(s))) if f == "SEED" else f for f in flags]
    before = tree(healthy)
    assert prepare("--doctor", "-d", healthy, *flags) == 1
    printed = capsys.readouterr().out
    assert expected in printed, printed
    place = printed.splitlines()
    hurting = [i for i, line in enumerate(place) if line.startswith("HURTS") and expected in line]
    assert hurting and place[hurting[0] + 1].strip().startswith("->")
    assert tree(healthy) == before


def test_the_doctor_leaves_a_healthy_set_in_peace(healthy, capsys):
    assert prepare("--doctor", "-d", healthy, "--trigger_word", "sks", "--train_batch_size", "4") == 0
    printed = capsys.readouterr().out
    assert HEALTHY in printed and "HURTS" not in printed
    for file in healthy.glob("*.txt"):
        file.unlink()
    assert prepare("--doctor", "-d", healthy, "--instance_prompt", "a photo of sks") == 0
    assert "HURTS" not in capsys.readouterr().out


def test_the_doctor_follows_prepared_buckets(phone, tmp_path, capsys):
    out = tmp_path / "out"
    assert prepare("-d", phone, "-o", out, "--trigger_word", "sks", *EVERY_STEP) == 0
    capsys.readouterr()
    assert prepare("--doctor", "-d", out, "--instance_prompt", "sks") == 0
    printed = capsys.readouterr().out
    assert re.search(r"112 x 144 +\d +0%", printed) and "enlarged" not in printed


def test_training_says_what_the_doctor_would(healthy, tmp_path, capsys):
    spoil(healthy, "duplicate")
    spoil(healthy, "small")
    assert run_here(FAMILIES["sd15"], tmp_path / "run", "-d", healthy, "--resolution", "256") == 0
    printed = capsys.readouterr().out
    assert "9 images from 200 x 200 to 600 x 600 pixels" in printed
    assert "warning: images enlarged to fill their bucket: 1 of 9 (0.jpg: 200 x 200, 1.3 times); " in printed
    assert "prepare_dataset.py --doctor looks closer" in printed and "look the same" not in printed


def test_a_caption_edited_beside_the_metadata_is_trained(healthy):
    named = [{"file_name": f"{i}.jpg", "text": f"from the metadata {i}"} for i in range(8)]
    named[2]["text"] = ["sks, a thing number 2", "another"]
    (healthy / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in named))
    (healthy / "3.txt").unlink()
    captions = {e.name: e.captions for e in folder_examples(healthy, None)}
    assert captions["1.jpg"] == ["sks, a thing number 1"]
    assert captions["2.jpg"] == ["sks, a thing number 2", "another"]
    assert captions["3.jpg"] == ["from the metadata 3"]
    assert folder_examples(healthy, "text")[1].captions == ["from the metadata 1"]
