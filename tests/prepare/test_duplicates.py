"""Pictures that look the same, and which of them stays."""

from __future__ import annotations

import io

import pytest
from photo_folders import photo, prepare, read_rows
from PIL import Image

from lora_training.prepare.duplicates import fingerprint, near_duplicates
from lora_training.prepare.filters import apply_filters
from lora_training.prepare.pictures import Picture
from lora_training.prepare.settings import ImageFiltering

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


def test_of_copies_the_largest_stays():
    looks = {seed: fingerprint(photo(400, 300, seed)) for seed in range(12)}
    assert near_duplicates(list(looks.values())) == []
    step = ImageFiltering(remove_duplicates=True, min_size=1)
    sources = {"large": photo(400, 300, 1), "small": photo(200, 150, 1), "other": photo(400, 300, 2)}
    sources["captioned"] = sources["large"]
    pictures = [
        Picture(name, None, ["a"] if name == "captioned" else [], size=i.size, fingerprint=fingerprint(i))
        for name, i in sources.items()
    ]
    apply_filters(pictures, step)
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
        assert not near_duplicates([fingerprint(image), fingerprint(Image.new("RGB", (300, 300), "blue"))])
    elif change == "scaled":
        copy = image.resize((133, 100))
    elif change == "brighter":
        copy = image.point(lambda v: min(255, int(v * 1.1)))
    else:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=35)
        copy = Image.open(buffer)
    assert near_duplicates([fingerprint(image), fingerprint(copy)]) == [(0, 1)]


def test_many_copies_of_one_picture(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(30):
        photo(300, 300).save(folder / f"{i}.png")
    assert prepare("-d", folder, "-o", out, "--image_resizing", "--num_workers", 8) == 0
    assert len(read_rows(out)) == 30
    assert not list(out.rglob("*.partial"))
    assert (
        prepare("-d", folder, "-o", out, "--image_resizing", "--image_filtering", "remove_duplicates=true")
        == 0
    )
    assert len(read_rows(out)) == 1 and len(list(out.glob("*.jpg"))) == len(list(out.glob("*.txt"))) + 1 == 1
