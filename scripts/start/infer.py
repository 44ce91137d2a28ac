"""Starts infer_lora.py with the settings of .env: what run_lora_infer.sh and run_lora_infer.bat do.

python scripts/start/infer.py [flags of infer_lora.py]
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, for imports

from scripts.start.parts.env_file import export, settings_of
from scripts.start.parts.process import ROOT, program


def main(argv: list[str] | None = None) -> None:
    export(settings_of(ROOT / ".env", os.environ))
    sys.argv = [program(), *(sys.argv[1:] if argv is None else argv)]
    runpy.run_path(str(ROOT / "infer_lora.py"), run_name="__main__")


if __name__ == "__main__":
    main()
