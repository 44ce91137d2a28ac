"""Moved to scripts/bases/detect_family.py, which this runs with the same arguments."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "bases" / "detect_family.py"), run_name="__main__")
