"""Times prepare_dataset.py: images per second through filtering, resizing and bucketing, and peak memory by their number.

    python scripts/measuring/benchmark_prepare_dataset.py --images 200 1000

The pictures are noise over colour fields, JPEG files of 1024 pixels that cost as much to decode as photographs. The time is that of the
whole process, imports included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.training_scripts import ROOT

SHAPES = ((1024, 1024), (1024, 768), (768, 1024), (1024, 640))


def draw_pictures(folder: Path, count: int) -> Path:
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Times prepare_dataset.py.")
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000], help="numbers of images (200 1000)")
    parser.add_argument("--family", default="sd15", help="512 pixels for sd15, else 1024 (sd15)")
    args = parser.parse_args()
    program = ROOT / "scripts" / "dataset" / "prepare_dataset.py"
    with tempfile.TemporaryDirectory() as work:
        for count in args.images:
            pictures = draw_pictures(Path(work) / f"in{count}", count)
            command = [sys.executable, str(program), "-d", str(pictures), "-o", f"{work}/out{count}"]
            command += ["--family", args.family, "--image_filtering", "remove_duplicates=true"]
            command += ["--image_resizing", "--aspect_ratio_bucketing", "resize_images=true"]
            for run in ("first", "second"):
                began = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.perf_counter() - began
                if status:
                    raise SystemExit(f"failed: {' '.join(command)}")
                print(
                    f"{count} images, {run} run: {seconds:.1f} s, {count / seconds:.1f} images per second, peak memory"
                    f" {usage.ru_maxrss / 1024:.0f} MiB",
                    flush=True,
                )


if __name__ == "__main__":
    main()
