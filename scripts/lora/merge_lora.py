"""Merges LoRAs into a base, which then draws what base and LoRAs draw together; or into one LoRA.

    python scripts/lora/merge_lora.py BASE_FOLDER merged --lora output/mine 0.8 --lora other.safetensors
    python scripts/lora/merge_lora.py BASE_FOLDER merged.safetensors --lora output/mine    one file
    python scripts/lora/merge_lora.py base.ckpt merged.safetensors --lora output/mine      a file to a file
    python scripts/lora/merge_lora.py a.safetensors b.safetensors --into both.safetensors  without a base
    python scripts/lora/merge_lora.py --lora a.safetensors 0.8 --lora output/b 0.5 --into ab.safetensors

The weight after a LoRA is its scale (1). LoRAs may be of any spelling, with text encoders; DoRA, LoHa and
LoKr too. A folder is diffusers' own layout, file by file as it was; a .safetensors file has the original
checkpoint's names. Sums are made in float32 and stored in the base's precision, or in --dtype; how much of
the update that rounds away is printed. A LoRA or base with NaN is refused.

--into writes the sum of LoRAs as one: exact, with all their ranks, or of --rank, with what that loses.
--block_weights "double_blocks.0-9=0.5 single_blocks=0" is a further factor by the base's blocks (the last
entry that means a layer counts; 0 leaves it out); with --into also for a single LoRA.
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
    """Errors: UserError for arguments of the one use in the other."""
    parser = argparse.ArgumentParser(
        description="Merges LoRAs into a base, or with --into into one LoRA.",
        usage="%(prog)s BASE TARGET --lora FILE [SCALE] [--lora ...]\n"
        "       %(prog)s [FILE ...] [--lora FILE SCALE ...] --into TARGET [--rank RANK]",
    )
    paths_help = "a base (folder, .safetensors or .ckpt) and the folder or .safetensors file to write;"
    parser.add_argument("paths", nargs="*", help=f"{paths_help} with --into: LoRAs of scale 1")
    parser.add_argument(
        "--lora",
        nargs="+",
        action="append",
        default=[],
        metavar=("FILE", "SCALE"),
        help="again for each",
    )
    parser.add_argument("--into", type=Path, metavar="TARGET", help="one LoRA to write, a .safetensors file")
    parser.add_argument("--rank", type=int, help="with --into: of the nearest LoRA (exact, all ranks)")
    to_help = "with --into: the spelling (the first LoRA's)"
    parser.add_argument("--to", choices=["diffusers", "kohya"], help=to_help)
    blocks_help = 'as "double_blocks.0-9=0.5 single_blocks=0": a further factor of their layers'
    parser.add_argument("--block_weights", metavar="BLOCK=WEIGHT ...", help=blocks_help)
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, help="precision of the result (default: as it is)")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="default: found out")
    shape_help = "a diffusers folder, for a base of another shape than the released model"
    parser.add_argument("--shape", "--base", metavar="FOLDER", help=shape_help)
    args = parser.parse_intermixed_args(argv)
    if args.into is None and (len(args.paths) != 2 or not args.lora):
        raise UserError("expected BASE TARGET --lora FILE, or LoRAs and --into TARGET")
    if args.into is None and (args.rank is not None or args.to):
        raise UserError("--rank and --to are for --into: a merged base has neither")
    if args.into is not None and not (args.paths or args.lora):
        raise UserError("--into: name the LoRAs to merge")
    return args


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
    blocks = None if args.block_weights is None else lora.parse_block_weights(args.block_weights)
    if args.into is not None:
        loras = [(file, 1.0) for file in args.paths] + loras
        shape = args.dtype, args.family, args.shape, blocks
        print("\n".join(lora.join_lora_files(loras, args.into, args.rank, args.to, *shape)))
        return 0
    base, target = map(Path, args.paths)
    merger = lora.merge_loras(base, target, loras, args.dtype, args.family, args.shape, blocks)
    print(f"{target}: {base} with {', '.join(' x '.join(arguments) for arguments in args.lora)}")
    share, worst, layer = merger.lost_shares()
    print(f"rounding took {share:.1%} of the update (at most {worst:.1%}, of {layer})")
    if share > LARGEST_SHARE:
        advice = "--dtype float16 or float32 keeps more of it, or leave the LoRA in a file of its own"
        print(f"warning: the result won't draw what base and LoRA do: {advice}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
