"""Moved to scripts/lora/convert_lora.py, which this runs with the same arguments."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "lora" / "convert_lora.py"), run_name="__main__")
