"""Moved to scripts/lora/merge_lora.py, which this runs with the same arguments."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "lora" / "merge_lora.py"), run_name="__main__")
