"""Merges LoRAs into a base, which then draws what base and LoRAs draw together, and needs no peft.

    python scripts/lora/merge_lora.py BASE_FOLDER merged --lora output/mine 0.8 --lora other.safetensors
    python scripts/lora/merge_lora.py BASE_FOLDER merged.safetensors --lora output/mine    one file
    python scripts/lora/merge_lora.py base.ckpt merged.safetensors --lora output/mine      a file to a file

The weight after a LoRA is its scale (1). LoRAs may be of any spelling, with text encoders; DoRA, LoHa and
LoKr too. A folder is diffusers' own layout, file by file as it was; a .safetensors file has the original
checkpoint's names. Sums are made in float32 and stored in the base's precision, or in --dtype; how much of
the update that rounds away is printed. A LoRA or base with NaN is refused.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, which has the library

from lora_training import lora
from lora_training.errors import UserError
from lora_training.exits import run_command
from lora_training.families import FAMILIES

LARGEST_SHARE = 0.1  # of an update that may be lost without a warning


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Merges LoRAs into a base.")
    parser.add_argument("base", type=Path, help="diffusers folder, or a .safetensors or .ckpt checkpoint")
    parser.add_argument("target", type=Path, help="folder to write, or a .safetensors file")
    parser.add_argument(
        "--lora",
        nargs="+",
        action="append",
        required=True,
        metavar=("FILE", "SCALE"),
        help="again for each",
    )
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, help="precision of the result (default: the base's)")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="default: found out from the base")
    parser.add_argument(
        "--shape", help="for a single file of another shape than the released model: a diffusers folder of it"
    )
    return parser.parse_args(argv)


def file_and_scale(arguments: list[str]) -> tuple[str, float]:
    """The arguments of one --lora. Errors: UserError for a scale that isn't a finite number."""
    if len(arguments) > 2:
        raise UserError(f"--lora takes a file and a scale, not {' '.join(arguments)}")
    if len(arguments) == 1:
        return arguments[0], 1.0
    file, text = arguments
    try:
        scale = float(text)
    except ValueError:
        raise UserError(f"--lora {file} {text}: the scale is not a number") from None
    if not math.isfinite(scale):
        raise UserError(f"--lora {file} {text}: the scale is not finite")
    return file, scale


@run_command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    loras = [file_and_scale(arguments) for arguments in args.lora]
    merger = lora.merge_loras(args.base, args.target, loras, args.dtype, args.family, args.shape)
    print(f"{args.target}: {args.base} with {', '.join(' x '.join(arguments) for arguments in args.lora)}")
    share, worst, layer = merger.lost_shares()
    print(f"rounding took {share:.1%} of the update (at most {worst:.1%}, of {layer})")
    if share > LARGEST_SHARE:
        advice = "--dtype float16 or float32 keeps more of it, or leave the LoRA in a file of its own"
        print(f"warning: the result won't draw what base and LoRA do: {advice}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
