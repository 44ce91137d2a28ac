"""Moved to scripts/toys/write_sample_data.py, which this runs with the same arguments."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "toys" / "write_sample_data.py"), run_name="__main__")
