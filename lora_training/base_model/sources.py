"""Where a base comes from: a folder, the hub, or a single checkpoint file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.reading import fingerprint, import_class, read_json
from lora_training.console import progress
from lora_training.errors import UserError, one_line
from lora_training.files import atomic_write, read_safetensors_header
from lora_training.libraries import import_model_libraries

if TYPE_CHECKING:
    import argparse

    from lora_training.families import Family

BASE_FLAG = "--pretrained_model_name_or_path"
UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")  # of pipelines, by training
# of a VAE's repository: some hold the same weights in other layouts too
VAE_FILES = ["config.json", "diffusion_pytorch_model.safetensors"]


def resolve_base(args: argparse.Namespace) -> Path:
    """The local diffusers folder of the base: as named, downloaded from the hub, or unpacked from a single
    file.

    Errors: UserError for what is no base, or one of another family.
    """
    name, family = args.pretrained_model_name_or_path, args.family
    path = Path(name)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"{BASE_FLAG} {name}: no model_index.json in this folder")
        check_index(path / "model_index.json", name, family)
        return path
    if path.is_file():
        return unpack_single_file(path, family, args.cache_dir)
    if path.suffix in (".safetensors", ".ckpt") or name.startswith((".", "/", "~")):
        raise UserError(f"{BASE_FLAG} {name}: no such file or folder")
    return download_base(name, family, args)


def check_index(file: Path, name: str, family: Family) -> None:
    """Errors: UserError if a model_index.json is another family's."""
    index = read_json(file)
    parts = {family.denoiser, *(part for pair in family.text_encoders.values() for part in pair)}
    if not index.keys() >= parts:
        raise UserError(f"{BASE_FLAG} {name} is a {index.get('_class_name')}, not {family.title}")


def download_base(name: str, family: Family, args: argparse.Namespace) -> Path:
    """The local folder of a base of the hub: its parts that are used, each in one variant.

    Errors: UserError for one that can't be had, or of another family, of which only its index is downloaded.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub import hf_hub_download

    options = {"revision": args.revision, "cache_dir": args.cache_dir}
    dropped = [part for flag, parts in family.dropped_parts.items() if vars(args)[flag] for part in parts]
    unused = dict.fromkeys([*UNUSED_PARTS, *dropped])
    with reading_hub(BASE_FLAG, name):
        index = Path(hf_hub_download(name, "model_index.json", **options))
    check_index(index, name, family)
    with reading_hub(BASE_FLAG, name):
        options |= {"variant": args.variant, "use_safetensors": True}
        return Path(DiffusionPipeline.download(name, **options, **unused))


def download_vae(name: str, flag: str, cache_dir: str | None) -> Path:
    """The local folder of a VAE's repository on the hub. Errors: UserError that names the flag."""
    from huggingface_hub import snapshot_download

    with reading_hub(flag, name):
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=VAE_FILES))


@contextlib.contextmanager
def reading_hub(flag: str, name: str) -> Iterator[None]:
    """Says what is downloaded inside, and names the flag if it can't be had. Errors: UserError."""
    try:
        with progress(f"downloading {name}"):
            yield
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
    set_prediction(pipeline, path)
    cache.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder) as unfinished:
        pipeline.save_pretrained(unfinished)
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


def set_prediction(pipeline, path: Path) -> None:
    """Gives a pipeline the scheduler settings that its single file asks for."""
    if settings := prediction_settings(path):
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **settings)


def prediction_settings(path: Path) -> dict:
    """Settings for the scheduler of a single file that predicts velocity.

    Such files (NoobAI's and those trained from it) say so by an empty tensor `v_pred`, and `ztsnr` for a
    schedule that ends without signal, or in SAI's metadata.
    """
    if path.suffix != ".safetensors":
        return {}
    metadata, names = read_safetensors_header(path)
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
