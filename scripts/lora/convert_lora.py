"""Converts a LoRA between diffusers and the other tools (kohya's scripts, AUTOMATIC1111, ComfyUI), both ways.

    python scripts/lora/convert_lora.py output/mine/pytorch_lora_weights.safetensors mine_comfy.safetensors
    python scripts/lora/convert_lora.py downloaded.safetensors for_diffusers/pytorch_lora_weights.safetensors
    python scripts/lora/convert_lora.py output/mine/mine_emb.safetensors mine_comfy_emb.safetensors   tokens

Reads what kohya's scripts, OneTrainer, ai-toolkit, SimpleTuner, x-flux, peft and diffusers (of 2023, too)
write, and the layout of Black Forest Labs. Writes the spelling that the input does not have, or what --to
says. Weights, ranks and alpha of every layer survive, text encoders and DoRA too; LoHa, LoKr and full
differences become plain LoRAs of the rank --rank, and how far they are off is printed. What has no place in
the other spelling is an error. --base BASE is for a base of another shape than the released models (the toys
in assets/, say), and for DoRA on a part of FLUX.1's or SD3's fused layers. Only .safetensors files are read:
others can run code when they are opened.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, which has the library

from lora_training import lora
from lora_training.errors import UserError
from lora_training.exits import run_command
from lora_training.families import FAMILIES

DEFAULT_RANK = 64


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Converts a LoRA or token embeddings between diffusers and other tools."
    )
    source_help = "a .safetensors file, or a folder that training or peft has written"
    parser.add_argument("source", type=Path, help=source_help)
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    to_help = "default: the spelling that the source has not"
    parser.add_argument("--to", choices=["kohya", "diffusers"], help=to_help)
    parser.add_argument("--family", choices=sorted(FAMILIES), help="default: found out from the file")
    base_help = "folder of a base of another shape than the released one, or for DoRA's norms"
    parser.add_argument("--base", help=base_help)
    rank_help = f"of what was LoHa, LoKr or a full difference ({DEFAULT_RANK})"
    parser.add_argument("--rank", type=int, default=DEFAULT_RANK, help=rank_help)
    return parser.parse_args(argv)


@run_command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.rank < 1:
        raise UserError(f"--rank {args.rank}: must be 1 or more")
    lines = lora.convert_lora_file(args.source, args.target, args.to, args.family, args.base, args.rank)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
