"""Says what is in a LoRA file, and answers "my LoRA has no effect".

    python scripts/lora/inspect_lora.py output/mine
    python scripts/lora/inspect_lora.py mine.safetensors --plot mine.png --base BASE_FOLDER

Prints family, rank, alpha, layers, trained text encoders and what the file's metadata says of words, data
and training, whichever trainer wrote it; the size of the update by block, as numbers and with --plot as a
picture; and whether the update is zero, not finite, or out of scale. With --base FOLDER sizes are relative
to the base's weights. Exit status: 0 sound, 1 something is wrong with the weights, 2 not a LoRA.
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
        description="Says what is in a LoRA file, and whether its update is sound."
    )
    source_help = "a .safetensors file, or a folder that training or peft has written"
    parser.add_argument("lora", type=Path, help=source_help)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the sizes by block as a picture")
    base_help = "diffusers folder of the base: sizes relative to its weights"
    parser.add_argument("--base", type=Path, help=base_help)
    parser.add_argument("--family", choices=sorted(FAMILIES), help="default: found out from the file")
    return parser.parse_args(argv)


@run_command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    inspected = lora.read_lora(args.lora, args.family, str(args.base) if args.base else None)
    sizes = lora.measure_update(inspected, args.base)
    print("\n".join(lora.describe_lora(inspected)))
    if sizes.by_block:
        print(f"update by block ({sizes.unit}):")
        largest = max(sizes.by_block.values()) or 1.0
        for block, size in sizes.by_block.items():
            print(f"  {block:<32} {size:.2e} {'#' * round(40 * size / largest)}")
    if args.plot and sizes.by_block:
        lora.plot_sizes(sizes, args.lora.name).save(args.plot)
        print(f"{args.plot}")
    findings, wrong = lora.judge_update(sizes)
    print("\n".join(findings))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
