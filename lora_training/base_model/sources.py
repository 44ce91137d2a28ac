"""Where a base comes from: a folder, the hub, or a single checkpoint file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from lora_training.base_model.reading import fingerprint, import_class, read_json
from lora_training.console import progress
from lora_training.errors import UserError, one_line
from lora_training.files import replace_file
from lora_training.libraries import import_model_libraries

if TYPE_CHECKING:
    import argparse

    from lora_training.families import Family


def resolve_base(args: argparse.Namespace) -> Path:
    """The local diffusers folder of the base: as named, downloaded from the hub, or unpacked from a single
    file.

    Errors: UserError for what is no base, or one of another family.
    """
    flag, name, family = "--pretrained_model_name_or_path", args.pretrained_model_name_or_path, args.family
    path = Path(name)
    parts = [family.denoiser, *(part for pair in family.text_encoders.values() for part in pair)]
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{flag} {name}: no model_index.json in this folder")
        index = read_json(path / "model_index.json")
        if not index.keys() >= set(parts):
            raise UserError(f"{flag} {name} is a {index.get('_class_name')}, not {family.title}")
        return path
    if path.is_file():
        return unpack_single_file(path, family, args.cache_dir)
    if path.suffix in (".safetensors", ".ckpt") or name.startswith((".", "/", "~")):
        raise UserError(f"{flag} {name}: no such file or folder")
    variant = f".{args.variant}" if args.variant else ""
    endings = (".json", ".txt", ".model", f"{variant}.safetensors", f"{variant}*-of-*.safetensors")
    patterns = [f"{part}/*{ending}" for part in (*parts, "vae", "scheduler") for ending in endings]
    return download(name, flag, ["model_index.json", *patterns], args)


def download(name: str, flag: str, patterns: list[str], args: argparse.Namespace) -> Path:
    """The local folder of a repository of the hub with the files of `patterns`.

    Errors: UserError that names the flag.
    """
    from huggingface_hub import snapshot_download

    revision = args.revision if flag == "--pretrained_model_name_or_path" else None
    options = {"revision": revision, "cache_dir": args.cache_dir, "allow_patterns": patterns}
    try:
        with progress(f"downloading {name}"):
            return Path(snapshot_download(name, **options))
    except Exception as error:  # the hub's client raises a dozen kinds; all mean that it can't be had
        reason = f"neither a local path nor to be had from the hub ({one_line(error)})"
        raise UserError(f"{flag} {name}: {reason}") from None


def unpack_single_file(path: Path, family: Family, cache_dir: str | None = None) -> Path:
    """Converts a .safetensors or .ckpt checkpoint to a diffusers folder, once; pickled code is never run.

    What the checkpoint lacks (configurations, tokenizers, and whole parts, such as FLUX.1's text encoders)
    comes from a diffusers folder in which the file lies, else from the hub. Errors: UserError.
    """
    cache = Path(cache_dir or Path.home() / ".cache" / "lora_training")
    folder = cache / f"{path.stem}-{fingerprint([path])[:20]}"
    if (folder / "model_index.json").is_file():
        return folder
    pipeline = read_single_file(path, family)
    if settings := prediction_settings(path):
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **settings)
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    replace_file(unfinished, folder)
    return folder


def read_single_file(path: Path, family: Family):
    """A pipeline of a checkpoint file. Errors: UserError."""
    lies_in_base = (path.parent / "model_index.json").is_file()
    options = {"config": str(path.parent), "local_files_only": True} if lies_in_base else {}
    if (
        path.stat().st_size > 8 << 30
    ):  # float32, which the reader makes of everything, would be twice the file
        options["dtype"] = torch.bfloat16
    import_model_libraries()
    try:
        parts = parts_with_weights(path.parent, family.denoiser) if lies_in_base else {}
        with progress(f"unpacking {path.name}, once"):
            pipeline_class = import_class("diffusers", family.pipeline_class)
            return pipeline_class.from_single_file(str(path), **options, **parts)
    except Exception as error:  # conversion fails in many ways, all of them the file's or the layout's
        problem = f"can't be read as {family.title} ({one_line(error)})"
        if not lies_in_base:
            problem += "; without network, scripts/bases/unpack_checkpoint.py makes a diffusers folder of it"
        raise UserError(f"--pretrained_model_name_or_path {path}: {problem}") from None


def prediction_settings(path: Path) -> dict:
    """Settings for the scheduler of a single file that predicts velocity.

    Such files (NoobAI's and those trained from it) say so by an empty tensor `v_pred`, and `ztsnr` for a
    schedule that ends without signal, or in SAI's metadata.
    """
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata() or {}
    stated = {metadata.get(f"modelspec.{key}", "").lower() for key in ("prediction_type", "predict_key")}
    settings = {}
    if "v_pred" in names or stated & {"v", "v_prediction"}:
        settings["prediction_type"] = "v_prediction"
    if "ztsnr" in names:
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return settings


def parts_with_weights(folder: Path, denoiser: str) -> dict[str, object]:
    """The parts but the denoiser whose weights a diffusers folder has, on the CPU in their own precision."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    names = [name for name in index if name != denoiser and any((folder / name).glob("*.safetensors"))]
    return {name: import_class(*index[name]).from_pretrained(folder / name) for name in names}
