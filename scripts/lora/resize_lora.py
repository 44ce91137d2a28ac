"""Makes a LoRA of another rank, and a plain LoRA of a DoRA, LoHa or LoKr, by singular value decomposition; says what is lost.

    python scripts/lora/resize_lora.py output/mine smaller.safetensors --rank 8
    python scripts/lora/resize_lora.py big.safetensors smaller.safetensors --keep 0.98
    python scripts/lora/resize_lora.py output/my_dora/my_dora.safetensors plain.safetensors --rank 64 --base BASE

--rank gives every layer that rank; --keep each layer the least rank that keeps this share of its update's energy (the sum of
its squares: 0.98 loses 14% of its length), at most --rank if both are given. What is printed is how far the new update is from
that of the file, as it is stored. A DoRA changes every weight of its layers, so that its plain LoRA needs the base's weights
and a higher rank. The new file has the spelling of the old one, or that of --to; in the spelling of other tools q, k and v of SD3 and
FLUX.1 are one layer, which has the rank.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.lora.convert_lora import TOOLS, shape_of, weights_of, write_lora
from scripts.lora.parts.lora_files import plain_lora, read_lora
from scripts.lora.parts.low_rank import FileError
from scripts.parts.netted import netted
from scripts.parts.training_scripts import SCRIPTS


def resize(args: argparse.Namespace) -> list[str]:
    """Does as the command line says; returns what was written."""
    lora = read_lora(args.source, args.family, shape_of(args.base))
    said, kinds = list(lora.notes), " and ".join(lora.kinds)
    before = Counter(layer.rank for _, _, layer in lora)
    weights = weights_of(lora, args.base)
    to = args.to or ("kohya" if lora.foreign else "diffusers")
    lora, error = plain_lora(lora, args.rank, args.keep, weights, fused=to == "kohya")
    after = Counter(layer.rank for _, _, layer in lora)
    write_lora(lora, args.target, to, weights)
    size = args.target.stat().st_size / 1e6
    said.append(
        f"{kinds} of rank {ranks(before)} became LoRA of rank {ranks(after)}: {error:.2%} of the update is lost"
    )
    said.append(f"{args.target}: {lora.family} LoRA, {size:.1f} MB, for {TOOLS[to]}")
    return said


def ranks(counted: Counter) -> str:
    """The ranks of a file, in a few words."""
    return str(min(counted)) if len(counted) == 1 else f"{min(counted)} to {max(counted)}"


@netted
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Makes a LoRA of another rank, or a plain LoRA of a DoRA, LoHa or LoKr."
    )
    parser.add_argument("source", type=Path, help="a .safetensors file, or a folder that training or peft has written")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--rank", type=int, help="of every layer, or with --keep the highest")
    parser.add_argument("--keep", type=float, help="share of each layer's energy to keep, such as 0.98")
    parser.add_argument("--to", choices=sorted(TOOLS), help="default: the source's spelling")
    parser.add_argument("--base", help="a base, for DoRA, or where its shape is not the released one")
    parser.add_argument("--family", choices=sorted(SCRIPTS), help="default: found out from the file")
    args = parser.parse_args(argv)
    try:
        if args.rank is None and args.keep is None:
            raise FileError("--rank or --keep says how large the new LoRA is")
        if args.rank is not None and args.rank < 1:
            raise FileError(f"--rank {args.rank}: must be 1 or more")
        if args.keep is not None and not 0 < args.keep <= 1:
            raise FileError(f"--keep {args.keep:g}: must be between 0 and 1")
        if args.target.suffix != ".safetensors":
            raise FileError(f"{args.target}: must end with .safetensors")
        if args.target.exists() and args.target.samefile(args.source):
            raise FileError(f"{args.target}: is the file to read; name another target")
        args.target.parent.mkdir(parents=True, exist_ok=True)
        print("\n".join(resize(args)))
    except (FileError, ValueError, OSError, json.JSONDecodeError) as error:
        print(f"resize_lora.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
