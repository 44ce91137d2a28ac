"""Folders of photos as people have them, prepared; and what the tests of preparation share."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from scripts.dataset import prepare_dataset


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Small models that can tell colours apart, by kind."""
    import tiny_models

    folder = tmp_path_factory.mktemp("models")
    made = {
        "blip2": tiny_models.make_blip2,
        "florence2": tiny_models.make_florence2,
        "git": tiny_models.make_git,
    }
    made |= {"vit": tiny_models.make_vit, "tagger": tiny_models.make_tagger}
    return {name: make(folder / name) for name, make in made.items()}


def prepare(*arguments: object) -> int:
    """Runs prepare_dataset.py in this process; returns its exit code."""
    return prepare_dataset.main([str(argument) for argument in arguments])


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture that looks like no other, with fine detail."""
    rng = np.random.default_rng(seed)
    smooth = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    noisy = np.asarray(smooth).astype(int) + rng.integers(-25, 25, (height, width, 1))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash."""
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.rglob("*")
        if f.is_file()
    }


def read_rows(folder: Path, name: str = "metadata.jsonl") -> list[dict]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def read_captions(folder: Path) -> dict[str, object]:
    """{file name: caption, or captions} of a prepared folder."""
    return {
        r["file_name"]: r["text"][0] if len(r["text"]) == 1 else r["text"] or "" for r in read_rows(folder)
    }


@pytest.fixture
def phone(tmp_path) -> Path:
    """What a phone's folder holds: colours to tell apart, two folders, captions in three encodings.

    And files that are broken, or that filters leave out.
    """
    from tiny_models import COLOURS

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


# fmt: off
EVERY_STEP = [  # that needs no model
    "--image_filtering", "remove_duplicates=true", "blur_threshold=30",
    "--image_resizing", "quality=95",
    "--aspect_ratio_bucketing", "base_resolution=128", "resize_images=true",
]


def model_steps(models) -> list[str]:
    """The two steps that need models."""
    return [
        "--auto_caption", f"model_name={models['blip2']}", "max_new_tokens=8", "batch_size=3",
        "--auto_tagging", f"model_name={models['tagger']}", "exclude_tags=o_o, Hatsune Miku", "batch_size=2",
    ]
# fmt: on


@pytest.fixture
def healthy(tmp_path) -> Path:
    """Eight pictures with nothing wrong."""
    folder = tmp_path / "healthy"
    folder.mkdir()
    for i in range(8):
        photo(512, 512, i).save(folder / f"{i}.jpg", quality=95)
        (folder / f"{i}.txt").write_text(f"sks, a thing number {i}")
    return folder
