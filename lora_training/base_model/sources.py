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

if TYPE_CHECKING:
    import argparse

    from lora_training.families import Family


def resolve_base(args: argparse.Namespace) -> Path:
    """The local diffusers folder of the base: as given, downloaded from the hub, or unpacked from a single
    file.
    """
    name = args.pretrained_model_name_or_path
    path, folders = (
        Path(name),
        [args.family.denoiser, *(folder for pair in args.family.text_encoders.values() for folder in pair)],
    )
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"--pretrained_model_name_or_path {name}: no model_index.json in this folder")
        index = read_json(path / "model_index.json")
        if not index.keys() >= set(folders):
            kind = index.get("_class_name")
            raise UserError(f"--pretrained_model_name_or_path {name} is a {kind}, not {args.family.title}")
        return path
    if path.is_file():
        return unpack_single_file(path, args.family, args.cache_dir)
    if path.suffix in (".safetensors", ".ckpt") or name.startswith((".", "/", "~")):
        raise UserError(f"--pretrained_model_name_or_path {name}: no such file or folder")
    variant = f".{args.variant}" if args.variant else ""
    endings = (".json", ".txt", ".model", f"{variant}.safetensors", f"{variant}*-of-*.safetensors")
    wanted = [f"{folder}/*{end}" for folder in (*folders, "vae", "scheduler") for end in endings]
    return download(name, "--pretrained_model_name_or_path", ["model_index.json", *wanted], args)


def download(name: str, flag: str, wanted: list[str], args: argparse.Namespace) -> Path:
    """The local folder of a repository of the hub with the wanted files. Errors: UserError that names the
    flag.
    """
    from huggingface_hub import snapshot_download

    revision = args.revision if flag == "--pretrained_model_name_or_path" else None
    try:
        with progress(f"downloading {name}"):
            return Path(
                snapshot_download(name, revision=revision, cache_dir=args.cache_dir, allow_patterns=wanted)
            )
    except Exception as error:  # the hub's client raises a dozen kinds; all mean that it is not to be had
        raise UserError(
            f"{flag} {name}: neither a local path nor to be had from the hub ({one_line(error)})"
        ) from None


def unpack_single_file(path: Path, family: Family, cache_dir: str | None = None) -> Path:
    """Converts a .safetensors or .ckpt checkpoint to a diffusers folder, once; pickled code is never run.

    What the checkpoint lacks (configurations, tokenizers, and whole parts, such as FLUX.1's text encoders)
    comes from a diffusers folder in which the file lies, else from the hub.
    """
    cache = (
        Path(cache_dir or Path.home() / ".cache" / "lora_training")
        / f"{path.stem}-{fingerprint([path])[:20]}"
    )
    if (cache / "model_index.json").is_file():
        return cache
    surrounded = (path.parent / "model_index.json").is_file()
    options = {"config": str(path.parent), "local_files_only": True} if surrounded else {}
    if (
        path.stat().st_size > 8 << 30
    ):  # float32, which the reader makes of everything, would be twice the file
        options["dtype"] = torch.bfloat16
    try:
        given = parts_with_weights(path.parent, family.denoiser) if surrounded else {}
        with progress(f"unpacking {path.name}, once"):
            pipeline = import_class("diffusers", family.pipeline_class).from_single_file(
                str(path), **options, **given
            )
    except Exception as error:  # conversion fails in many ways, all of them the file's or the layout's
        advice = "; without network, scripts/bases/unpack_checkpoint.py makes a diffusers folder of it"
        problem = f"can't be read as {family.title} ({one_line(error)}){'' if surrounded else advice}"
        raise UserError(f"--pretrained_model_name_or_path {path}: {problem}") from None
    if marks := prediction_marks(path):
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **marks)
    part = cache.with_name(cache.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part)
    replace_file(part, cache)
    return cache


def prediction_marks(path: Path) -> dict:
    """What the scheduler of a single file that predicts velocity needs. Such files (NoobAI's and those
    trained from it) say so by an empty tensor `v_pred`, and `ztsnr` for a schedule that ends without signal,
    or in SAI's metadata.
    """
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata() or {}
    said = {metadata.get(f"modelspec.{key}", "").lower() for key in ("prediction_type", "predict_key")}
    marks = {"prediction_type": "v_prediction"} if "v_pred" in names or said & {"v", "v_prediction"} else {}
    return marks | (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in names else {}
    )


def parts_with_weights(folder: Path, denoiser: str) -> dict[str, object]:
    """The parts but the denoiser whose weights a diffusers folder has, on the CPU in their own precision."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    names = [name for name in index if name != denoiser and any((folder / name).glob("*.safetensors"))]
    return {name: import_class(*index[name]).from_pretrained(folder / name) for name in names}
