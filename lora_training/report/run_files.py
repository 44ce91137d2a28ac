"""config.yaml, data.json and thumbnails of a run."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, PngImagePlugin

from lora_training.data.buckets import share_cropped
from lora_training.data.captions import prepend_trigger
from lora_training.files import atomic_write
from lora_training.training.output_folder import kept_settings
from lora_training.validation.probes import probed_images

if TYPE_CHECKING:
    from lora_training.training.run import Run


def write_run_files(run: Run) -> None:
    """What the report reads, and a run that is to be repeated: config.yaml, data.json, thumbnails of training
    images.
    """
    import yaml

    args, output = run.args, Path(run.args.output_dir)
    examples, buckets = run.data.examples, run.data.buckets
    settings = kept_settings(args) | {"seed": args.seed}
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")}
    command = "" if args.hub_token else shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace("\n", " ")
    head = [
        f"# command: {command}",
        f"# versions: {json.dumps(versions)}",
        f"# defaults: {json.dumps(args.defaults)}",
    ]
    body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    with atomic_write(output / "config.yaml") as part:
        part.write_text("\n".join([*head, body]), encoding="utf-8")
    sizes = ["{} x {}".format(*bucket) for bucket in buckets]
    rows = [[e.name, e.captions[0], "{} x {}".format(*e.size), sizes[e.bucket]] for e in examples[:500]]
    lost = {
        b: [share_cropped(e.size, buckets[b]) for e in examples if e.bucket == b] for b in range(len(buckets))
    }
    used = [[sizes[b], len(shares), sum(shares) / len(shares)] for b, shares in lost.items() if shares]
    summary = {"images": len(examples), "held_out": sum(e.held_out for e in examples), "captions": rows}
    summary |= {"buckets": used, "findings": run.findings}
    with atomic_write(output / "data.json") as part:
        part.write_text(json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8")
    folder = output / "training_pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for k, index in enumerate(probed_images(run)):
        text = PngImagePlugin.PngInfo()
        text.add_itxt(
            "prompt", prepend_trigger(examples[index].captions[0], examples[index].set_args.trigger_word)
        )
        image = run.data.stores[0].decode(index)
        if run.data.masks:  # what hardly counts, in red
            red = Image.blend(image, Image.new("RGB", image.size, "red"), 0.6)
            image = Image.composite(image, red, run.data.masks.decode(index))
        image.thumbnail((384, 384))
        with atomic_write(folder / f"{k:02d}.png") as part:
            image.save(part, pnginfo=text)
