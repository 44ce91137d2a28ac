"""Moved to scripts/lora/parts/lora_files.py; goes when infer_lora.py names that."""

from scripts.lora.parts.lora_files import FileError, read_lora, write_diffusers  # noqa: F401
