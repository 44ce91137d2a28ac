"""Writes the sample data set: captioned pictures of a concept that no toy base has seen.

python scripts/dev/toys/write_sample_data.py --write_sample_data assets/sample_data/smiley
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from scripts.dev.toys.parts.toy_world import CONCEPTS, write_concept


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Writes the sample data set of a concept no toy base has seen."
    )
    parser.add_argument("--write_sample_data", type=Path, required=True, help="folder to write")
    parser.add_argument("--concept", choices=[*CONCEPTS, "star"], default="smiley")
    parser.add_argument("--captions", default="a sks circle on a {background} background")
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_concept(args.write_sample_data, args.concept, args.captions, args.count, args.seed)
    print(f"{args.count} pictures of a {args.concept} in {args.write_sample_data}")


if __name__ == "__main__":
    main()
