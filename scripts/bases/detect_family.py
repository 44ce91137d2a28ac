"""Prints the model family of a base: sd15, sdxl, sd3 or flux.

    python scripts/bases/detect_family.py BASE

BASE is a diffusers folder (its model_index.json tells), a .safetensors or .ckpt checkpoint (its keys tell;
nothing of it is run), or a hub id. Imports nothing heavy unless the checkpoint is a .ckpt.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, which has the library

from lora_training.base_model.family_detection import require_family
from lora_training.exits import run_command


@run_command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Prints the model family of a base: sd15, sdxl, sd3 or flux."
    )
    parser.add_argument("base", help="a diffusers folder, a .safetensors or .ckpt checkpoint, or a hub id")
    print(require_family(parser.parse_args(argv).base))
    return 0


if __name__ == "__main__":
    sys.exit(main())
