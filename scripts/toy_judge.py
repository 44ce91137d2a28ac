"""Moved to scripts/toys/train_judge.py, which this runs with the same arguments."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent / "toys" / "train_judge.py"), run_name="__main__")
