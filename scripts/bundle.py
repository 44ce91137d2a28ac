"""Writes a training script and the library as one file, for clusters and notebooks.

    python scripts/bundle.py train_lora_sdxl.py                 writes train_lora_sdxl.pyz
    python train_lora_sdxl.pyz --help                           and so do accelerate launch and torchrun

Python packages (requirements.txt) have to be installed where it runs; nothing else of this project is needed.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import zipapp
from pathlib import Path

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lora_training.errors import UserError
from lora_training.exits import run_command

ROOT = Path(__file__).resolve().parents[1]
# the script is a module of its own, so that processes that prepare images find its functions
MAIN = """import sys

from {module} import main

if __name__ == "__main__":
    sys.exit(main())
"""


def bundle(script: Path, target: Path) -> None:
    """Writes a zip file that Python runs: the script, the library, and a __main__ that starts the script."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(script, folder)
        library = ROOT / "lora_training"
        shutil.copytree(library, Path(folder, library.name), ignore=shutil.ignore_patterns("__pycache__"))
        Path(folder, "__main__.py").write_text(MAIN.format(module=script.stem), encoding="utf-8")
        zipapp.create_archive(folder, target, interpreter="/usr/bin/env python3", compressed=True)


@run_command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes a training script and the library as one file.")
    parser.add_argument("script", type=Path, help="the training script, such as train_lora_sdxl.py")
    parser.add_argument(
        "-o", "--output", type=Path, help="the file to write (default: the script's name, .pyz)"
    )
    args = parser.parse_args(argv)
    script = args.script if args.script.is_file() else ROOT / args.script
    if not script.is_file() or script.suffix != ".py":
        raise UserError(f"{args.script}: no such Python file")
    target = args.output or Path(f"{script.stem}.pyz")
    bundle(script, target)
    print(f"{target}: {target.stat().st_size / 1024:.0f} KiB; python {target} --help")
    return 0


if __name__ == "__main__":
    sys.exit(main())
