"""Moved to scripts/dataset/prepare_dataset.py, which this runs with the same arguments."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "dataset" / "prepare_dataset.py"), run_name="__main__")
