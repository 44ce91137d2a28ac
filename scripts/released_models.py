"""Moved to scripts/parts/; goes when infer_lora.py names that."""

from scripts.parts.training_scripts import load_script  # noqa: F401
