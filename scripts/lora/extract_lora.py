"""Writes what a fine-tuned checkpoint has learned over its base as a LoRA, and says what is lost.

    python scripts/lora/extract_lora.py BASE TUNED learned.safetensors --rank 32
    python scripts/lora/extract_lora.py sdxl.safetensors tuned.safetensors learned.safetensors --keep 0.95

BASE and TUNED are diffusers folders or .safetensors files of one family. All linear and convolution layers of
the denoiser and the text encoders that differ get a LoRA: the best of --rank, or of the least rank that keeps
the share --keep of the change's energy (0.98 loses 14% of its length). Printed is how far base and LoRA are
from TUNED, by part and in all: a LoRA can't hold normalisations, biases and embeddings. Layers are read one
at a time. --to kohya (ComfyUI, AUTOMATIC1111, kohya's scripts) gives q, k and v of SD3 and FLUX.1 one rank
together, --to diffusers one each.
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
    parser = argparse.ArgumentParser(description="Writes the difference of two checkpoints as a LoRA.")
    parser.add_argument("base", type=Path, help="diffusers folder or .safetensors file")
    parser.add_argument("tuned", type=Path, help="what was trained on it, of either kind")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--rank", type=int, help="of every layer, or with --keep the highest")
    parser.add_argument("--keep", type=float, help="share of each layer's energy to keep, such as 0.95")
    parser.add_argument("--to", choices=["kohya", "diffusers"], default="kohya", help="spelling (kohya)")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, default="float16", help="precision of the file (float16)")
    parser.add_argument("--family", choices=sorted(FAMILIES), help="default: found out from the base")
    shape_help = "a diffusers folder, for single files of another shape than the released model"
    parser.add_argument("--shape", metavar="FOLDER", help=shape_help)
    return parser.parse_args(argv)


@run_command
def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sizes, written = (args.rank, args.keep), (args.to, args.dtype)
    lines = lora.extract_lora_file(
        args.base, args.tuned, args.target, *sizes, *written, args.family, args.shape
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
