"""Starts infer_lora.py with the settings of .env: what run_lora_infer.sh and run_lora_infer.bat do.

python scripts/start/infer.py [flags of infer_lora.py]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: library and commands

from lora_training.launch.env_file import load_env_file
from scripts.start.process import ROOT, program


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    load_env_file(ROOT / ".env")
    sys.argv = [program(), *argv]
    runpy.run_path(str(ROOT / "infer_lora.py"), run_name="__main__")


if __name__ == "__main__":
    main()
