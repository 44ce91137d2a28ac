"""Moved to scripts/bases/detect_family.py, which this runs with the same arguments."""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parent / "bases" / "detect_family.py"), run_name="__main__")
else:  # infer_lora.py still imports it
    from scripts.parts.base_family import detect  # noqa: F401
