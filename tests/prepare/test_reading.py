"""Pictures decoded and measured: phones' formats, damaged files, odd values, colour profiles."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from photo_folders import photo, prepare, read_captions, read_rows
from PIL import Image, ImageCms

from lora_training.data.images import decode_image
from lora_training.prepare.parallel import in_parallel
from lora_training.prepare.pictures import measure_picture, sharpness

pytestmark = [pytest.mark.run, pytest.mark.xdist_group("prepare")]


@pytest.mark.unit
def test_sharpness_is_the_variance_of_the_laplacian():
    values = np.random.default_rng(0).integers(0, 255, (20, 30), dtype=np.uint8)
    padded = values.astype(float)
    laplacian = [
        padded[y - 1, x] + padded[y + 1, x] + padded[y, x - 1] + padded[y, x + 1] - 4 * padded[y, x]
        for y in range(1, 19)
        for x in range(1, 29)
    ]
    assert sharpness(Image.fromarray(values)) == pytest.approx(np.var(laplacian), rel=1e-5)


def test_pictures_of_phones(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    pillow_heif.from_pillow(photo(320, 240, 1)).save(folder / "IMG_0001.HEIC")
    (folder / "IMG_0001.txt").write_text("from a phone")
    assert prepare("-d", folder, "-o", out, "--image_filtering", "min_size=100") == 0
    assert read_captions(out) == {"IMG_0001.jpg": "from a phone"}
    assert Image.open(out / "IMG_0001.jpg").format == "JPEG"
    (folder / "IMG_0001.HEIC").rename(folder / "IMG_0001.jpg")  # as some apps do
    assert prepare("-d", folder, "-o", tmp_path / "again", "--image_filtering", "min_size=100") == 0
    assert Image.open(tmp_path / "again" / "IMG_0001.jpg").format == "JPEG"
    assert Image.open(out / "IMG_0001.jpg").size == (320, 240)


def test_pictures_are_taken_a_few_at_a_time():
    """However many there are, no more than a window of them is in memory."""
    started, most = [], 0
    for done, (item, result) in enumerate(in_parallel(started.append, list(range(200)), 2, "")):
        most = max(most, len(started) - done)
        assert item == done and result is None
    assert done == 199 and 1 < most <= 6


@pytest.mark.unit
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
def test_damaged_files_are_named_and_never_stop_a_run(tmp_path, form):
    """Bytes changed and ends cut off: a picture, or a ValueError in plain words."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    photo(96, 80).save(buffer, form)
    for _ in range(150):
        raw = bytearray(buffer.getvalue())
        for place in rng.integers(0, min(len(raw), 900), rng.choice([1, 3, 10])):
            raw[place] = rng.integers(256)
        cut = bytes(raw[: rng.integers(len(raw) // 2, len(raw) + 1)])
        measurement = measure_picture(cut, tmp_path / "t.jpg")
        assert measurement.get("problem", "") or measurement["size"]


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
    swapped[red : red + length], swapped[blue : blue + length] = (
        plain[blue : blue + length],
        plain[red : red + length],
    )
    swapped = bytes(swapped).replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))

    def decoded(profile: bytes):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (200, 30, 20)).save(buffer, "PNG", icc_profile=profile)
        return decode_image(buffer.getvalue()).getpixel((3, 3))

    assert np.abs(np.array(decoded(swapped)) - (20, 30, 200)).max() <= 2
    assert decoded(plain) == decoded(b"no profile at all") == (200, 30, 20)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pictures_of_no_numbers_are_left_out(value, tmp_path, recwarn):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    photo(80, 60, 1).save(folder / "a.png")
    Image.fromarray(np.full((40, 50), value, dtype=np.float32)).save(folder / "n.tif")
    assert prepare("-d", folder, "-o", out, "--image_filtering", "min_size=10") == 0
    assert [row["reason"] for row in read_rows(out, "left_out.jsonl")] == [
        "damaged (values that are no numbers)"
    ]
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
