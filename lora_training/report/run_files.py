"""What a run writes before its first step: config.yaml, data.json, and thumbnails of training pictures.

The report reads them, and so does a run that is to be repeated.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from PIL import Image, PngImagePlugin

from lora_training.data.buckets import share_cropped
from lora_training.data.captions import prepend_trigger
from lora_training.files import atomic_write
from lora_training.training.output_folder import recorded_settings
from lora_training.validation.probes import choose_probed_images

if TYPE_CHECKING:
    import argparse

    from lora_training.training.run import Run

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
MOST_CAPTIONS = 500
THUMBNAIL = (384, 384)  # pixels


def write_run_files(run: Run) -> None:
    """Writes config.yaml, data.json and training_pictures/ into the output folder."""
    output = Path(run.args.output_dir)
    with atomic_write(output / "config.yaml") as part:
        part.write_text(config_text(run.args), encoding="utf-8")
    with atomic_write(output / "data.json") as part:
        summary = json.dumps(data_summary(run), ensure_ascii=False, indent=1)
        part.write_text(summary, encoding="utf-8")
    write_training_pictures(run, output / "training_pictures")


def config_text(args: argparse.Namespace) -> str:
    """Every setting as YAML that --config takes; command, versions and defaults are comments at its head."""
    settings = recorded_settings(args) | {"seed": args.seed}
    versions = {name: version(name) for name in LIBRARIES}
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace("\n", " ")
    head = [
        f"# command: {'' if args.hub_token else command}",
        f"# versions: {json.dumps(versions)}",
        f"# defaults: {json.dumps(args.defaults)}",
    ]
    return "\n".join([*head, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)])


def data_summary(run: Run) -> dict:
    """The pictures, their captions and buckets, and what will hurt in them.

    captions: rows of name, caption, size, bucket. buckets: rows of size, number of images, and the mean share
    that is cropped.
    """
    examples, buckets = run.data.examples, run.data.buckets
    sizes = ["{} x {}".format(*bucket) for bucket in buckets]
    rows = [
        [example.name, example.captions[0], "{} x {}".format(*example.size), sizes[example.bucket]]
        for example in examples[:MOST_CAPTIONS]
    ]
    used = []
    for number, bucket in enumerate(buckets):
        shares = [share_cropped(example.size, bucket) for example in examples if example.bucket == number]
        if shares:
            used.append([sizes[number], len(shares), sum(shares) / len(shares)])
    return {
        "steps": run.max_steps,
        "images": len(examples),
        "held_out": sum(example.held_out for example in examples),
        "captions": rows,
        "buckets": used,
        "findings": run.findings,
    }


def write_training_pictures(run: Run, folder: Path) -> None:
    """Writes thumbnails of the pictures that the probes look at, with their captions in the PNG text."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, index in enumerate(choose_probed_images(run)):
        example = run.data.examples[index]
        text = PngImagePlugin.PngInfo()
        text.add_itxt("prompt", prepend_trigger(example.captions[0], example.set_args.trigger_word))
        image = run.data.stores[0].decode(index)
        if run.data.masks:  # what hardly counts, in red
            red = Image.blend(image, Image.new("RGB", image.size, "red"), 0.6)
            image = Image.composite(image, red, run.data.masks.decode(index))
        image.thumbnail(THUMBNAIL)
        with atomic_write(folder / f"{number:02d}.png") as part:
            image.save(part, pnginfo=text)
