"""Folders of the models that describe pictures: local ones, or downloaded from the hub."""

from __future__ import annotations

import json
from pathlib import Path

from lora_training.errors import UserError

MODEL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.safetensors"]


def model_folder(name: str, setting: str, patterns: list[str] | None = None) -> Path:
    """The folder of a model: a local one, or that of a hub id, downloaded.

    setting: what names the model, for errors. patterns: of the files that are needed. Errors: UserError if it
    can't be had.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{setting}: no such folder: {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen kinds, which all mean the same
        what = f"{name} is neither a local folder nor to be had from the hub"
        raise UserError(f"{setting}: {what} ({' '.join(str(error).split())[:200]})") from None


def weights_folder(name: str, setting: str) -> Path:
    """The folder of a model with its weights, as .safetensors if it has them so. Errors: UserError."""
    folder = model_folder(name, setting, MODEL_FILES)
    if any(folder.glob("*.safetensors")):
        return folder
    return model_folder(name, setting, [*MODEL_FILES, "*.bin"])


def remote_code_classes(folder: Path) -> dict[str, str]:
    """The Python classes that a model brings along for what transformers doesn't know; {} without any."""
    from transformers import CONFIG_MAPPING

    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    parts = [v for v in config.values() if isinstance(v, dict) and "model_type" in v]
    is_known = all(part.get("model_type") in CONFIG_MAPPING for part in (config, *parts))
    return {} if is_known else config.get("auto_map", {})
