"""Makes a LoRA of another rank, or a plain LoRA of a DoRA, LoHa or LoKr, and says what is lost.

    python scripts/lora/resize_lora.py output/mine smaller.safetensors --rank 8
    python scripts/lora/resize_lora.py big.safetensors smaller.safetensors --keep 0.98
    python scripts/lora/resize_lora.py output/dora/dora.safetensors plain.safetensors --rank 64 --base BASE

--rank gives every layer that rank; --keep each layer the least rank that keeps this share of its update's
energy (the sum of its squares: 0.98 loses 14% of its length), at most --rank if both are given. What is
printed is how far the new update is from that of the file, as it is stored. A DoRA changes every weight of
its layers, so that its plain LoRA needs the base's weights and a higher rank. The new file has the spelling
of the old one, or that of --to; in the spelling of other tools q, k and v of SD3 and FLUX.1 are one layer,
which has the rank.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, which has the library

from lora_training import lora
from lora_training.exits import run_command
from lora_training.families import FAMILIES


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Makes a LoRA of another rank, or a plain LoRA of a DoRA, LoHa or LoKr."
    )
    source_help = "a .safetensors file, or a folder that training or peft has written"
    parser.add_argument("source", type=Path, help=source_help)
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--rank", type=int, help="of every layer, or with --keep the highest")
    parser.add_argument("--keep", type=float, help="share of each layer's energy to keep, such as 0.98")
    parser.add_argument("--to", choices=["diffusers", "kohya"], help="default: the source's spelling")
    parser.add_argument("--base", help="a base, for DoRA, or where its shape is not the released one")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="default: found out from the file")
    return parser.parse_args(argv)


@run_command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    lines = lora.resize_lora_file(
        args.source, args.target, args.rank, args.keep, args.to, args.family, args.base
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
