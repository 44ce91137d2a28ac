"""Times prepare_dataset.py: images per second through filtering, resizing, bucketing, and peak memory.

    python scripts/dev/benchmark_prepare_dataset.py --images 200 1000

The pictures are noise over colour fields, JPEG files of 1024 pixels that cost as much to decode as
photographs. The time is that of the whole process, imports included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.dev import ROOT
from scripts.dev.benchmarks.processes import measure_command

SHAPES = ((1024, 1024), (1024, 768), (768, 1024), (1024, 640))


def draw_photographs(folder: Path, count: int) -> Path:
    """A folder of so many JPEG files, 1024 pixels on the longer side."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        width, height = SHAPES[i % len(SHAPES)]
        fields = Image.fromarray(rng.integers(0, 255, (height // 32, width // 32, 3), dtype=np.uint8))
        smooth = np.asarray(fields.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        noisy = smooth + rng.integers(-12, 12, smooth.shape, dtype=np.int16)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i:05d}.jpg", quality=92)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Times prepare_dataset.py.")
    images_help = "numbers of images (200 1000)"
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000], help=images_help)
    parser.add_argument("--family", default="sd15", help="512 pixels for sd15, else 1024 (sd15)")
    args = parser.parse_args(argv)
    program = ROOT / "scripts" / "dataset" / "prepare_dataset.py"
    steps = ["--image_filtering", "remove_duplicates=true", "--image_resizing"]
    steps += ["--aspect_ratio_bucketing", "resize_images=true"]
    with tempfile.TemporaryDirectory() as work:
        for count in args.images:
            pictures = draw_photographs(Path(work) / f"in{count}", count)
            command = [sys.executable, str(program), "-d", str(pictures), "-o", f"{work}/out{count}"]
            for run in ("first", "second"):
                usage = measure_command([*command, "--family", args.family, *steps], Path(work) / "log")
                speed = f"{usage.seconds:.1f} s, {count / usage.seconds:.1f} images per second"
                memory = f"peak memory {usage.peak_mib:.0f} MiB"
                print(f"{count} images, {run} run: {speed}, {memory}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
