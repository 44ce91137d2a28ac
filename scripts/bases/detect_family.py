"""Prints the model family of a base: sd15, sdxl, sd3 or flux.

    python scripts/bases/detect_family.py BASE

BASE is a diffusers folder (its model_index.json tells), a .safetensors or .ckpt checkpoint (its keys tell; nothing of it is
run), or a hub id. Imports nothing heavy unless the checkpoint is a .ckpt.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.base_family import detect


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Prints the model family of a base: sd15, sdxl, sd3 or flux.")
    parser.add_argument("base", help="a diffusers folder, a .safetensors or .ckpt checkpoint, or a hub id")
    base = parser.parse_args(argv).base
    try:
        family = detect(base)
    except Exception as error:  # the hub's client and torch's reader of pickles raise many kinds
        reason = " ".join(str(error).split())[:200]
        there = (
            "damaged, or no base" if os.path.exists(base) else "neither a folder nor a file, nor to be had from the hub"
        )
        print(f"{base}: {there} ({reason})", file=sys.stderr)
        return 2
    if family is None:
        print(f"{base}: not a base of Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX.1", file=sys.stderr)
        return 2
    print(family)
    return 0


if __name__ == "__main__":
    sys.exit(main())
