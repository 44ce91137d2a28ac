"""Turns a single-file checkpoint into a diffusers folder, once, without network.

    python scripts/bases/unpack_checkpoint.py downloaded.safetensors bases/downloaded
    python scripts/bases/unpack_checkpoint.py flux1-dev.safetensors bases/flux --layout FLUX_FOLDER

The training scripts take the folder with -m, infer_lora.py as base_model_path. A checkpoint has neither
configurations nor tokenizers: for SD 1.5 and SDXL the former are known here, and CLIP's vocabulary is a data
file of the package open_clip_torch (pip install --no-deps open_clip_torch). SD3 and FLUX.1 need --layout: a
diffusers folder of that model, whose weights (text encoders, VAE) stand in for what the checkpoint lacks.
Pickled code in a .ckpt is never run. Weights keep their precision.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, which has the library

from lora_training import base_model
from lora_training.exits import run_command
from lora_training.families import FAMILIES


@run_command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Turns a single-file checkpoint into a diffusers folder.")
    parser.add_argument("checkpoint", type=Path, help="a .safetensors or .ckpt file")
    parser.add_argument("folder", type=Path, help="the folder to write; must not be there, or be empty")
    parser.add_argument(
        "--family", choices=["auto", *FAMILIES], default="auto", help="auto: by the file's keys (auto)"
    )
    parser.add_argument("--layout", type=Path, metavar="FOLDER", help="a diffusers folder of the same model")
    args = parser.parse_args(argv)
    named_family = None if args.family == "auto" else args.family
    family = base_model.unpack_checkpoint(args.checkpoint, args.folder, named_family, args.layout)
    print(f"{args.folder}: {family}, from {args.checkpoint}; take it with -m {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
