"""Reads LoRA files of every spelling that people meet into one form: layers by part and diffusers name.

Files
* of diffusers and peft: `unet.….lora.down.weight`, `transformer.….lora_A.weight`, adapter_model.safetensors;
* of kohya's scripts, AUTOMATIC1111 and ComfyUI: `lora_unet_….lora_down.weight` with `.alpha`, names of the
  original checkpoint for SDXL, SD3 and FLUX.1, projections fused as there;
* of other trainers, with the names of the one and the endings of the other: layer_names.py knows them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from lora_training.base_model.family_detection import require_family
from lora_training.errors import UserError
from lora_training.lora.base_layers import BaseLayers, candidate_bases
from lora_training.lora.fused_layers import split_lora_layer
from lora_training.lora.layer_names import likely_families, split_key
from lora_training.lora.layer_tensors import read_layer
from lora_training.tensors import read_safetensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lora_training.lora.low_rank import LoraLayer, LycorisLayer

CLONE = Path(__file__).resolve().parents[2]  # whose assets/ has the toy bases
WEIGHT_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")


@dataclass
class Lora:
    """A LoRA by pipeline part ("unet", "transformer", "text_encoder", …) and layer name."""

    family: str
    layers: dict[str, dict[str, LoraLayer | LycorisLayer]]
    metadata: dict[str, str] = field(default_factory=dict)
    is_foreign: bool = False  # whether its file had other keys than those of diffusers or peft
    base: BaseLayers | None = None  # whose layers these are
    notes: list[str] = field(default_factory=list)  # what else was in the file

    def __iter__(self) -> Iterator[tuple[str, str, LoraLayer | LycorisLayer]]:
        """(part, layer name, layer)"""
        return ((part, name, layer) for part, layers in self.layers.items() for name, layer in layers.items())

    @property
    def kinds(self) -> list[str]:
        """What it is made of: LoRA, DoRA, LoHa, …"""
        kinds = {"DoRA" if x.kind == "LoRA" and x.magnitude is not None else x.kind for _, _, x in self}
        return sorted(kinds)

    def check_finite(self) -> None:
        """Errors: UserError if a weight is NaN or infinite."""
        for part, name, layer in self:
            if not all(torch.isfinite(t.float()).all() for t in layer.tensors):
                raise UserError(f"{part}.{name} has weights that are not finite")


def read_lora(path: str | Path, family: str | None = None, base: str | None = None) -> Lora:
    """A LoRA file of any known spelling, or a folder that training or peft has written.

    family: None to find it out. base: a diffusers folder; None for that of its training, or the released
    models. Every key is looked up among the base's real layers, and its shape compared. Errors: UserError
    for what is not a LoRA, is another kind of adapter, or has a layer that the base does not have.
    """
    path = Path(path)
    tensors, metadata = read_lora_tensors(path)
    base = base or base_of_training(path, metadata)
    embeddings = sorted({key.split(".")[1] for key in tensors if key.startswith("bundle_emb.")})
    by_layer = tensors_by_layer(tensors, path)
    first_error = None
    for candidate in candidate_families(list(by_layer), metadata, family, base):
        for base_layers in candidate_bases(candidate, base):
            try:
                layers = read_layers(by_layer, base_layers, metadata, path)
            except UserError as error:
                first_error = first_error or error
                continue
            is_foreign = not has_own_keys(by_layer, layers, base_layers.family.denoiser)
            lora = Lora(candidate, layers, metadata, is_foreign, base_layers)
            if embeddings:
                lora.notes.append(
                    f"the embeddings of {', '.join(embeddings)} that the file carries were left out"
                )
            return lora
    raise first_error


def read_lora_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or of a folder that training or peft has written.

    peft's adapter_config.json is in the metadata as "adapter_config". Nothing that could run code is opened.
    Errors: UserError for another kind of file, or a damaged one.
    """
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise UserError(f"{path}: no {' or '.join(WEIGHT_FILES)} in this folder")
        path = files[0]
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: only .safetensors files are read; others can run code when they are opened")
    try:
        tensors, metadata = read_safetensors(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({error})") from None
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        metadata = metadata | {"adapter_config": config.read_text(encoding="utf-8")}
    return tensors, metadata


def base_of_training(path: Path, metadata: dict[str, str]) -> str | None:
    """The local folder of the base that a LoRA was trained on; None if nothing says it.

    config.yaml beside the file may say it, or its metadata.
    """
    config = (path if path.is_dir() else path.parent) / "config.yaml"
    names = [f"assets/{metadata.get('ss_base_model', '')}"]  # the toys
    if config.is_file():
        import yaml

        try:
            settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError):  # damaged; the metadata may say it too
            settings = None
        if isinstance(settings, dict):
            names.insert(0, str(settings.get("pretrained_model_name_or_path")))
    folders = [folder for name in names for folder in (Path(name), CLONE / name)]
    return next((str(folder) for folder in folders if (folder / "model_index.json").is_file()), None)


def tensors_by_layer(tensors: dict[str, torch.Tensor], path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """{layer as the file names it: {what it is ("down", "up", "alpha", …): tensor}}. Errors: UserError."""
    by_layer: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("bundle_emb."):  # embeddings that some files carry
            continue
        layer, kind = split_key(key, path)
        if not value.is_floating_point():
            raise UserError(f"{path}: {key}: whole numbers ({value.dtype}), where weights were expected")
        is_fp8 = value.element_size() == 1  # which nothing can be counted in
        by_layer.setdefault(layer, {})[kind] = value.float() if is_fp8 else value
    if not by_layer:
        raise UserError(f"{path}: no LoRA in this file")
    return by_layer


def candidate_families(
    layers: list[str], metadata: dict[str, str], family: str | None, base: str | None
) -> list[str]:
    """The families that a file may be for, the likeliest first: the named one, the base's, or all."""
    if family:
        return [family]
    if base and (Path(base) / "model_index.json").is_file():
        return [require_family(base)]
    return likely_families(layers, metadata)


def has_own_keys(by_layer: dict[str, dict], layers: dict[str, dict], denoiser: str) -> bool:
    """Whether a file's keys are those of diffusers or peft."""
    names = {f"{part}.{name}" for part, named in layers.items() for name in named}
    names |= set(layers.get(denoiser, {}))
    return any(key.removeprefix("base_model.model.") in names for key in by_layer)


def read_layers(
    by_layer: dict[str, dict[str, torch.Tensor]], base: BaseLayers, metadata: dict[str, str], path: Path
) -> dict[str, dict[str, LoraLayer | LycorisLayer]]:
    """{part: {layer: its LoRA}}; fused projections are taken apart.

    Errors: UserError if a layer isn't the base's.
    """
    settings = adapter_settings(metadata, base.family.denoiser, path)
    out: dict[str, dict[str, LoraLayer | LycorisLayer]] = {}
    for key, tensors in by_layer.items():
        source = f"{path}: {key}"
        part, meaning = base.meaning(key, path)
        first_name, place = meaning[0]
        shape = base.shapes[part, first_name]
        file_shape = (place.height if place else shape[0], *shape[1:])
        layer = read_layer(tensors, file_shape, settings, part, first_name, source, base.title)
        for name, piece in split_lora_layer(layer, meaning, source).items():
            if name in out.get(part, {}):
                raise UserError(f"{source}: {part}.{name} is twice in this file")
            out.setdefault(part, {})[name] = piece
    return out


def adapter_settings(metadata: dict[str, str], denoiser: str, path: Path) -> dict:
    """What diffusers (`unet.r`, …) or peft's adapter_config.json say of rank and alpha.

    Errors: UserError if they are damaged.
    """
    try:
        settings = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        if "adapter_config" in metadata:
            config = json.loads(metadata["adapter_config"])
            settings = {f"{denoiser}.{key}": value for key, value in config.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its metadata is damaged ({error})") from None
    return settings
