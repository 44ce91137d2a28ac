"""The base that is drawn with: where its folder is, which family it is of, whether its files are whole."""

from __future__ import annotations

import json
from pathlib import Path

from lora_training.base_model.family_detection import FAMILY_OF_PIPELINE, require_family
from lora_training.errors import UserError, one_line
from lora_training.families import FAMILIES


def find_base_folder(base: str, own_vae: bool) -> str:
    """The base as a diffusers folder or a hub id; a single checkpoint file is unpacked to one, once.

    own_vae: whether its VAE is needed. Errors: UserError for what is no base, or damaged.
    """
    folder = str(unpack_base(base)) if Path(base).is_file() else base
    if Path(folder).is_dir():
        check_folder(Path(folder), own_vae)
    return folder


def unpack_base(base: str) -> Path:
    """The diffusers folder of a .safetensors or .ckpt checkpoint. Errors: UserError."""
    from lora_training.base_model.sources import unpack_single_file

    try:
        family = require_family(base)
    except UserError as error:
        raise UserError(f"paths.base_model_path: {error}") from None
    try:
        return unpack_single_file(Path(base), FAMILIES[family])
    except UserError as error:
        message = str(error).replace("--pretrained_model_name_or_path", "paths.base_model_path")
        raise UserError(message) from None


def check_folder(folder: Path, own_vae: bool) -> None:
    """Checks a base's parts and configurations, as the libraries' errors seldom name the file.

    Errors: UserError.
    """
    for name, spec in read_base_json(folder / "model_index.json").items():
        is_part = isinstance(spec, list) and spec[:1] != [None]
        if is_part and (own_vae or name != "vae") and not (folder / name).is_dir():
            raise UserError(f"paths.base_model_path: {folder}: its part {name} is missing")
    for file in folder.glob("*/*.json"):
        read_base_json(file)


def read_base_json(file: Path) -> dict:
    """A base's JSON file of keys and values. Errors: UserError that names the file."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error, 100)
        raise UserError(f"paths.base_model_path: {file}: missing or damaged ({reason})") from None
    if not isinstance(values, dict):
        raise UserError(f"paths.base_model_path: {file}: damaged: no keys and values")
    return values


def family_of_base(base: str) -> str | None:
    """The family of a diffusers folder or a hub repository; None for another one. Errors: UserError."""
    try:
        if Path(base).is_dir():
            index = Path(base) / "model_index.json"
        else:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.utils import logging

            logging.set_verbosity_error()  # it logs each retry
            index = Path(hf_hub_download(base, "model_index.json"))
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"paths.base_model_path: {base}: {one_line(error)}") from None
    return FAMILY_OF_PIPELINE.get(read_base_json(index).get("_class_name"))
