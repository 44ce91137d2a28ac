"""What an edited or damaged journal, links, and odd or clashing names can do."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from photo_folders import photo, prepare, read_captions, read_rows, tree
from PIL import Image

from lora_training.prepare.file_names import portable_path

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


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
    """What this program can't have written counts as not there.

    Nothing outside the folder is written or taken away.
    """
    folder, out, victim = tmp_path / "in", tmp_path / "out", tmp_path / "victim.txt"
    folder.mkdir()
    victim.write_text("precious")
    photo(80, 60, 1).save(folder / "a.png")
    (folder / "a.txt").write_text("a cat")
    arguments = ("-d", folder, "-o", out, "--image_resizing", "target_resolution=64")
    assert prepare(*arguments) == 0
    first = tree(out)
    digest = hashlib.sha256((folder / "a.png").read_bytes()).hexdigest().encode()
    line = BY_HAND[name].replace(b"VICTIM", str(victim).encode()).replace(b"DIGEST", digest)
    with (out / ".prepare" / "journal.jsonl").open("ab") as journal:
        journal.write(line)
    capsys.readouterr()
    assert prepare(*arguments) == 0
    assert "1 lines of" in capsys.readouterr().out
    again = tree(out)
    untouched = [f for f in first if not f.startswith(".prepare") and not f.endswith(".html")]
    assert untouched and all(first[f] == again[f] for f in untouched) and first.keys() == again.keys()
    assert victim.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "victim.txt"]
    assert not (tmp_path.parent / "escaped.jpg").exists()


def test_links_are_a_rule_and_said(tmp_path, capsys):
    """A link to a file is read as if the file lay there, a folder behind a link is left alone.

    None of both is written to.
    """
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
    printed = capsys.readouterr().out
    assert "1 symbolic links to files outside it: read as if they lay there (linked.png)" in printed
    assert "1 symbolic links to folders: left alone (album)" in printed
    assert {row["file_name"] for row in read_rows(out)} == {"a.png", "inside.png", "linked.png"}
    assert not (out / "linked.png").is_symlink() and tree(other) == before


@pytest.mark.parametrize("again", [False, True])
def test_a_link_in_the_output_is_not_followed_out_of_it(again, tmp_path, capsys):
    folder, other, out = tmp_path / "in", tmp_path / "other", tmp_path / "out"
    (folder / "trip").mkdir(parents=True), other.mkdir()
    photo(80, 60, 1).save(folder / "trip" / "a.png")
    arguments = ("-d", folder, "-o", out, "--image_resizing", "target_resolution=64")
    (folder / "b.png").write_bytes((folder / "trip" / "a.png").read_bytes())
    if again:
        assert prepare(*arguments) == 0
        shutil.rmtree(out / "trip")
        (folder / "trip" / "a.png").unlink()  # the copy of it would be taken away
    else:
        (out / ".prepare").mkdir(parents=True)
    (out / "trip").symlink_to(other)
    (other / "a.jpg").write_text("precious")
    assert prepare(*arguments) == 2
    assert "is a link that leads out of it" in capsys.readouterr().err
    assert (other / "a.jpg").read_text() == "precious" and len(list(other.iterdir())) == 1


def test_names_that_are_not_utf8_and_that_others_cannot_have(tmp_path, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    photo(80, 60, 1).save(folder / "a.png")
    for name in (b"\xff\xfe.png", b"line\nbreak.png", b"a:b.png", b"\xc3\xa4.png"):
        (Path(os.fsdecode(os.fsencode(folder) + b"/" + name))).write_bytes((folder / "a.png").read_bytes())
    assert prepare("-d", folder, "-o", out, "--image_resizing", "target_resolution=64") == 0
    names = {row["file_name"] for row in read_rows(out)}
    assert names == {"a.jpg", "_udcff_udcfe.jpg", "line_break.jpg", "a_b.jpg", "\u00e4.jpg"}
    first = tree(out)
    assert prepare("-d", folder, "-o", out, "--image_resizing", "target_resolution=64") == 0
    assert {f for f in tree(out) if f.endswith(".jpg")} == {f for f in first if f.endswith(".jpg")}


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
    captions = read_captions(out)
    assert captions["a.jpg"] == "the png"
    assert sorted(captions.values()) == ["the jpg", "the png", "the webp"]
    for name, seed in (("the png", 1), ("the jpg", 2), ("the webp", 3)):
        file = next(f for f, c in captions.items() if c == name)
        written, source = (
            np.asarray(i.resize((8, 8), 4)).astype(int)
            for i in (Image.open(out / file), photo(300, 300, seed))
        )
        assert np.abs(written - source).mean() < 6


@pytest.mark.unit
def test_what_is_prepared_can_be_copied_to_windows():
    assert portable_path("day 1/cat: the movie?") == "day 1/cat_ the movie_"
    assert portable_path("con/aux.x/LPT1/console. ") == "_con/_aux.x/_LPT1/console"
    assert portable_path("plain/猫 3") == "plain/猫 3"


def test_a_library_that_warns_of_a_cut_picture_adds_no_line(tmp_path, recwarn):
    """Pillow's warning of damaged metadata stood beside the doctor's lines."""
    Image.new("RGB", (80, 80), "red").save(tmp_path / "a.png")
    Image.new("RGB", (80, 80), "blue").save(tmp_path / "b.tiff")
    (tmp_path / "b.tiff").write_bytes((tmp_path / "b.tiff").read_bytes()[:100])
    assert prepare("--doctor", "-d", tmp_path, "--resolution", 64) == 1
    assert not [str(warning.message) for warning in recwarn if "PIL" in warning.filename]
