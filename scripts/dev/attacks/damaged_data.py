"""Cases of damaged files: pictures, captions, and what prepare_dataset.py has left."""

from __future__ import annotations

import json
import random
from collections.abc import Generator
from pathlib import Path

from scripts.dev.attacks.damage import damage
from scripts.dev.attacks.forked_runs import Job, JobResult
from scripts.dev.attacks.runs import DATA, train_argv, training_script

PREPARE = "scripts/dataset/prepare_dataset.py"
PICTURE_KINDS = (  # ending, mode
    ("png", "RGBA"),
    ("png", "P"),
    ("png", "I;16"),
    ("jpg", "CMYK"),
    ("jpg", "L"),
    ("webp", "RGB"),
    ("gif", "P"),
    ("bmp", "RGB"),
    ("tiff", "RGB"),
    ("png", "RGB"),
    ("jpg", "RGB"),
)
ORIENTATION = 0x0112  # EXIF's tag
# yields jobs that have to run first; returns (descriptions of the damages, the job that meets them)
DamagedJob = Generator[Job, JobResult, tuple[list[str], Job]]


def write_pictures(folder: Path, rng: random.Random) -> list[Path]:
    """Makes a folder with five pictures of several formats; returns them."""
    from PIL import Image

    folder.mkdir()
    files = []
    for number, source in enumerate(rng.sample(sorted(DATA.glob("*.png")), 5)):
        ending, mode = rng.choice(PICTURE_KINDS)
        image = Image.open(source).convert("RGB").convert("L" if mode == "I;16" else mode)
        exif = Image.Exif()
        exif[ORIENTATION] = rng.choice((1, 3, 6, 8))
        options = {"exif": exif} if ending in ("jpg", "webp") else {}
        files.append(folder / f"{number}.{ending}")
        (image.convert("I;16") if mode == "I;16" else image).save(files[-1], **options)
    return files


def write_captions(folder: Path, files: list[Path], rng: random.Random) -> list[Path]:
    """Writes captions of pictures, in one of four ways; returns their files."""
    kind, texts = rng.randrange(4), [f"a circle, number {n}, é" for n in range(len(files))]
    captions = dict(zip(files, texts, strict=True))
    if kind == 0:
        for file, text in captions.items():
            file.with_suffix(".txt").write_text(text, encoding="utf-8")
        return [file.with_suffix(".txt") for file in files]
    if kind == 1:
        rows = [
            {"file_name": file.name, "text": [text, "b"] if rng.random() < 0.3 else text}
            for file, text in captions.items()
        ]
        return [write_json_lines(folder / "metadata.jsonl", rows)]
    if kind == 2:
        rows = ["file_name,text", *(f'{file.name},"{text}"' for file, text in captions.items())]
        (folder / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
        return [folder / "metadata.csv"]
    rows = [{"file_name": file.name, "text": text} for file, text in captions.items()]
    table = {"resolution": 64, "aspect_ratio_buckets": "64,64;64,96"}
    (folder / "buckets.json").write_text(json.dumps(table))
    return [folder / "buckets.json", write_json_lines(folder / "metadata.jsonl", rows)]


def write_table(file: Path, pictures: list[Path], rng: random.Random) -> Path:
    """A table of pictures, some of whose cells are empty, broken, or name a file that isn't there."""
    import pyarrow
    import pyarrow.parquet

    cells, captions = [], []
    for picture in pictures:
        raw = picture.read_bytes()
        whole = {"bytes": raw, "path": picture.name}
        odd = (None, {"bytes": None, "path": None}, {"bytes": raw[: len(raw) // 2], "path": None})
        odd += ({"bytes": b"", "path": "a"}, {"bytes": None, "path": "gone.png"})
        cells.append(rng.choice((whole, whole, {"bytes": None, "path": f"../data/{picture.name}"}, *odd)))
        captions.append(rng.choice(("a circle", "a circle", "", None)))
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    file.parent.mkdir()
    table = pyarrow.table({"image": pyarrow.array(cells, kind), "text": captions})
    pyarrow.parquet.write_table(table, file)
    return file


def write_json_lines(file: Path, rows: list[dict]) -> Path:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


def damaged_data(stage: Path, family: str, rng: random.Random, folder: Path) -> DamagedJob:
    """Pictures, captions, what prepare_dataset.py has left."""
    data, prepared, output, script = (
        folder / "data",
        folder / "prepared",
        folder / "x",
        training_script(family),
    )
    files = write_pictures(data, rng)
    captions = write_captions(data, files, rng)
    preparing = prepare_job(data, prepared, rng)
    options = rng.choice(((), ("--cache_latents",), ("--masked_loss", "alpha")))
    one_step = ("--max_train_steps", "1")
    readers = [
        Job(script, train_argv(family, output, "-d", data, *one_step, "--default_caption", "a", *options)),
        Job(script, train_argv(family, output, "--dataset_name", data, *one_step)),
        preparing,
        Job(PREPARE, ["--doctor", "-d", str(data), "--resolution", "64"]),
    ]
    if rng.random() < 0.2:
        table = write_table(folder / "table" / "train.parquet", files, rng)
        argv = train_argv(family, output, "--dataset_name", rng.choice((table, table.parent)), *one_step)
        job = Job(script, [*argv, *options])
        if rng.random() < 0.5:
            return ["train.parquet: odd cells"], job
        victims = [table]
    elif rng.random() < 0.2:  # its journal and results
        yield preparing
        victims, job = [file for file in sorted(prepared.rglob("*")) if file.is_file()], preparing
        if rng.random() < 0.3:
            job = Job(script, train_argv(family, output, "-d", prepared, *one_step))
    else:
        victims, job = rng.choice((files, captions)), rng.choice(readers)
    victims = rng.sample(victims, min(len(victims), rng.choice((1, 1, 2))))
    return [f"{victim.name}: {damage(victim, rng)}" for victim in victims], job


def prepare_job(data: Path, output: Path, rng: random.Random) -> Job:
    """prepare_dataset.py on a folder."""
    argv = ["-d", str(data), "-o", str(output), "--image_filtering", "min_size=8"]
    argv += ["--image_resizing", "target_resolution=64"]
    argv += ["--aspect_ratio_bucketing"] * rng.randrange(2)
    return Job(PREPARE, [*argv, "--num_workers", "1", "--trigger_word", "sks"])
