"""Starts prepare_dataset.py with the settings of .env: what run_prepare_dataset.sh and .bat do.

    python scripts/start/prepare.py [flags of prepare_dataset.py]

--config may be a workflow of Olive, whose image_lora_preprocess section is then run.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: library and commands

from lora_training import exits
from lora_training.launch.env_file import load_env_file
from lora_training.launch.olive import preparation_arguments
from scripts.start.process import ROOT, program


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    load_env_file(ROOT / ".env")
    with exits.exit_code(program()) as outcome:
        argv, notes = preparation_arguments(argv)
    if outcome.code:
        return outcome.code
    print("".join(f"{note}\n" for note in notes), end="", flush=True)
    sys.argv = [program(), *argv]
    runpy.run_path(str(ROOT / "scripts/dataset/prepare_dataset.py"), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
