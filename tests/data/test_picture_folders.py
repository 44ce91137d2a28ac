"""Folders of pictures as people have them: odd names and links, damaged files, all kinds of colour."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICKEST, SAMPLE, metrics, run_here, write_pictures
from PIL import Image
from toy_parts import arguments

from lora_training.data.examples import load_examples
from lora_training.data.image_store import prepare_examples
from lora_training.data.images import decode_image, to_rgb
from lora_training.data.samples import TrainingData
from lora_training.errors import UserError

pytestmark = pytest.mark.faults
TROUBLED = pytest.mark.xdist_group("troubled pictures")  # whose tests share a run


@pytest.fixture(scope="module")
def troubled(tmp_path_factory) -> Path:
    """A folder with everything that goes wrong in a picture folder, beside seven good pictures."""
    folder = write_pictures(tmp_path_factory.mktemp("troubled") / "pictures")
    image = Image.open(folder / "0.png").convert("RGB").resize((300, 300))
    (folder / "no_image.png").write_bytes(b"this is text")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    (folder / "truncated.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.crop((0, 0, 300, 100)).save(folder / "turned.jpg", exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((80, 80), 40000, dtype="uint16")).save(folder / "deep.png")
    image.convert("RGBA").save(folder / "clear.png")
    image.convert("P").save(folder / "palette.gif")
    Image.new("1", (20000, 20000)).save(folder / "huge.png")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    (folder / ".DS_Store").write_bytes(b"\0\0")
    (folder / "0.txt").write_text("")
    (folder / "1.txt").write_bytes("un chât noir".encode("latin-1"))
    (folder / "2.txt").write_bytes("a cat".encode("utf-16"))
    return folder


@pytest.fixture(scope="module")
def troubled_run(troubled) -> tuple[str, dict[Path, bytes]]:
    """(what a training on the troubled folder has printed, the folder's files before it)."""
    files, output = {file: file.read_bytes() for file in troubled.iterdir()}, troubled.parent
    flags = ("-d", troubled, "--default_caption", "a thing", "--cache_latents")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run_here(QUICKEST, output / "x", *flags, "--cache_folder", output / "cache") == 0
    return printed.getvalue(), files


@TROUBLED
def test_troubled_folder_trains_and_says_what_was_left_out(troubled_run):
    printed, _ = troubled_run
    assert "no_image.png is left out: not an image" in printed
    assert "truncated.jpg is left out: damaged" in printed
    assert "1.txt is not UTF-8; read as Windows-1252" in printed
    assert "not images, left alone: 1 x .pdf" in printed
    assert "12 images" in printed


@TROUBLED
def test_originals_are_never_changed(troubled, troubled_run):
    _, files = troubled_run
    assert files == {file: file.read_bytes() for file in troubled.iterdir()}


@TROUBLED
def test_huge_picture_is_left_out(troubled_run):
    assert "huge.png is left out" in troubled_run[0]


@TROUBLED
def test_colour_modes_and_rotation(troubled):
    def load(name):
        return decode_image((troubled / name).read_bytes())

    assert load("turned.jpg").size == (100, 300)
    assert {load(n).mode for n in ("cmyk.jpg", "deep.png", "clear.png", "palette.gif")} == {"RGB"}
    assert load("deep.png").getpixel((0, 0)) == (156, 156, 156)  # 40000 of 65535
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)


def test_folder_without_images_or_captions(recipe, tmp_path, pictures):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images in"):
        load_examples(arguments(recipe, "-d", tmp_path / "empty"))
    for file in pictures.glob("*.txt"):
        file.unlink()
    with pytest.raises(UserError, match="no image has a caption"):
        load_examples(arguments(recipe, "-d", pictures))


def test_file_names_and_links_of_all_kinds(pictures, tmp_path, capsys):
    """A good picture counts under any name; links to pictures lead anywhere; other links are named."""
    raw = (pictures / "0.png").read_bytes()
    names = [b"\xff\xfe.png", b"caf\xe9.PNG", "字 \n.png".encode(), b"-rf.png", b"%s{}.png"]
    for name in names:
        Path(os.fsdecode(os.path.join(os.fsencode(pictures), name))).write_bytes(raw)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "z.png").write_bytes(raw)
    (pictures / "out.png").symlink_to(elsewhere / "z.png")
    (pictures / "folder").symlink_to(elsewhere)
    (pictures / "gone.png").symlink_to(elsewhere / "nothing.png")
    (pictures / "metadata.jsonl").write_text('{"file_name": "out.png", "text": "through a link"}')
    flags = ("-d", pictures, "--default_caption", "a thing", "--cache_latents")
    assert run_here(QUICKEST, tmp_path / "x", *flags, "--max_train_steps", 1) == 0
    printed = capsys.readouterr().out
    assert f"{7 + len(names) + 1} images" in printed
    assert "folder, gone.png: a link to a folder, which is not entered, or to nothing" in printed
    captions = dict(row[:2] for row in json.loads((tmp_path / "x" / "data.json").read_text())["captions"])
    assert captions["out.png"] == "through a link" and captions["\\udcff\\udcfe.png"] == "a thing"


@pytest.mark.parametrize("how", ["gone", "replaced by text", "cut"])
def test_a_picture_that_vanishes_while_training_is_named(recipe, pictures, how):
    args = arguments(recipe, "-d", pictures)
    store = prepare_examples(load_examples(args), [(64, 64)], args)
    store.covers.clear()  # as if there were more pictures than memory
    file = pictures / "3.png"
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(b"text" if "text" in how else file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"3\.png could be read when the run began, and can't now"):
        store.cover(3, 0)


def test_a_loaders_process_that_dies_or_fails_is_one_line(tmp_path, monkeypatch, capsys):
    def die(self, slot):
        os._exit(9)

    def fail(self, slot):
        raise UserError("7.png could be read")

    flags = ("-d", SAMPLE, "--dataloader_num_workers", 1)
    for function, reason in ((die, "fewer --dataloader_num_workers"), (fail, "error: 7.png could be read")):
        with monkeypatch.context() as patch:
            patch.setattr(TrainingData, "__getitem__", function)
            assert run_here(QUICKEST, tmp_path / function.__name__, *flags) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        assert len(lines) == 1 and reason in lines[0]
        assert not multiprocessing.active_children()  # for which Python would wait at its end


@pytest.mark.run
def test_datasets_from_disk_and_from_a_builder_file(pictures, tmp_path):
    import datasets

    files = sorted(pictures.glob("*.png"))
    rows = {"image": [str(file) for file in files], "text": [f"a thing {i}" for i in range(len(files))]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "table")
    assert run_here(QUICKEST, tmp_path / "x", "--dataset_name", tmp_path / "table") == 0
    (tmp_path / "mine.py").write_text(BUILDER)
    flags = ("--dataset_name", tmp_path / "mine.py", "--train_data_dir", pictures)
    assert run_here(QUICKEST, tmp_path / "y", *flags) == 0
    assert len(metrics(tmp_path / "x")) == len(metrics(tmp_path / "y")) == 3


BUILDER = """
import pathlib
import datasets

class Mine(datasets.GeneratorBasedBuilder):
    def _info(self):
        columns = {"image": datasets.Image(), "prompt": datasets.Value("string")}
        return datasets.DatasetInfo(features=datasets.Features(columns))

    def _split_generators(self, manager):
        return [datasets.SplitGenerator("train", {"folder": pathlib.Path(self.config.data_dir)})]

    def _generate_examples(self, folder):
        for file in sorted(folder.glob("*.png")):
            yield file.name, {"image": str(file), "prompt": file.with_suffix(".txt").read_text()}
"""
