"""Moved to scripts/measuring/benchmark.py, which this runs with the same arguments."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "measuring" / "benchmark.py"), run_name="__main__")
