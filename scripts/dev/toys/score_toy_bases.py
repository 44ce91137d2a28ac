"""Scores toy bases: do they draw what a prompt asks for, and how cleanly?

    python scripts/dev/toys/score_toy_bases.py                        # all four of assets/
    python scripts/dev/toys/score_toy_bases.py build/mine --pictures build/sheets

Prints a Markdown table over 64 prompts. `shape`, `colour`, `background` and `all three` are shares of
pictures that show what the prompt asked for, as the judge sees it. `overlap` (intersection over union) is
that of the drawn shape with the nearest ideal one of the world, 1 at best; `smudged` the share of pixels
beside its outline that have neither colour.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.dev import ROOT


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Scores toy bases: right pictures, clean shapes.")
    parser.add_argument("bases", nargs="*", type=Path, help="folders of toy bases; default: all of assets/")
    parser.add_argument("--count", type=int, default=64, help="pictures of each base")
    parser.add_argument(
        "--pictures", type=Path, help="folder for a sheet of each base's pictures; default: none"
    )
    args = parser.parse_args(argv)
    bases = args.bases or sorted((ROOT / "assets").glob("toy_*"))
    for base in bases:
        if not (base / "model_index.json").exists():
            parser.error(f"{base}: not a base's folder, it has no model_index.json")
    if args.count < 1:
        parser.error("--count must be 1 or more")

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # toys are too small for threads
    from scripts.dev.toys.parts.toy_scores import scores, table

    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
    sheets = {base: args.pictures and args.pictures / f"{base.name}.png" for base in bases}
    print(table({base.name: scores(base, args.count, sheets[base]) for base in bases}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
