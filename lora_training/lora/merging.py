"""Merges LoRAs into a base, a folder or a single file, which then needs neither peft nor the LoRAs' files."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from lora_training.base_model.family_detection import detect_family, read_pickled_tensors
from lora_training.base_model.original_layout import DENOISER_PREFIX, TEXT_PREFIXES, text_layer_key
from lora_training.base_model.released_models import denoiser_config
from lora_training.errors import UserError, one_line
from lora_training.families import FAMILIES
from lora_training.files import atomic_write, read_safetensors_header
from lora_training.lora.block_weights import layer_weights
from lora_training.lora.low_rank import LoraLayer, LycorisLayer, apply_delta
from lora_training.lora.reading import Lora, read_lora
from lora_training.lora.single_file import denoiser_places, single_file

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.lora.block_weights import Layer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def merge_loras(
    base: Path,
    target: Path,
    loras: list[tuple[str, float]],
    dtype: str | None = None,
    family: str | None = None,
    shape: str | None = None,
    block_weights: list[tuple[str, float]] | None = None,
) -> Merger:
    """Writes a base with LoRAs merged in; it appears only when it is whole. Returns what was done.

    target: a folder, or a .safetensors file with the original checkpoint's names. loras: files or folders,
    with their scales. dtype: a key of DTYPES; None for the base's. family: None to find it out. shape: for a
    single file of another shape than the released model, a diffusers folder of it. block_weights: as
    `parse_block_weights` gives them. Errors: UserError.
    """
    to_file = target.suffix == ".safetensors"
    if target.exists():
        raise UserError(f"{target} is there already: name another target")
    if base.is_file() and not to_file:
        advice = "end the target with .safetensors"
        raise UserError(f"{target}: a single-file base is merged into a single file: {advice}")
    family = family_of_base(base, family)
    shape = str(base) if base.is_dir() else shape
    scaled_loras = read_scaled_loras(loras, family, shape)
    weights = layer_weights(block_weights or [], scaled_loras[0][0].base)
    merger = Merger(scaled_loras, DTYPES.get(dtype), weights)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as part:
        if base.is_dir():
            merge_folder(base, part, merger)
            merger.check_all_used()
            if to_file:
                tensors = single_file(family, part)
                shutil.rmtree(part)
                save_file(tensors, part, metadata=file_metadata(tensors, {}))
        else:
            tensors = merge_single_file(base, family, shape, merger)
            merger.check_all_used()
            stated = read_safetensors_header(base)[0] if base.suffix == ".safetensors" else {}
            save_file(merger.cast(tensors), part, metadata=file_metadata(tensors, stated))
    return merger


def file_metadata(tensors: dict[str, torch.Tensor], stated: dict[str, str]) -> dict[str, str]:
    """The metadata of a merged file: what the base's file has stated, but for hashes of its weights."""
    kept = {name: value for name, value in stated.items() if "hash" not in name}
    prediction = {"modelspec.prediction_type": "v"} if "v_pred" in tensors else {}
    return {"format": "pt"} | prediction | kept


def family_of_base(base: Path, named_family: str | None) -> str:
    """The family of a base folder or file; `named_family` wins. Errors: UserError for what is no base."""
    if not base.exists():
        raise UserError(f"{base}: no such file or folder")
    if base.is_dir() and not (base / "model_index.json").is_file():
        raise UserError(f"{base}: no model_index.json in this folder")
    if base.is_file() and base.suffix not in (".safetensors", ".ckpt"):
        advice = "others can run code when they are opened"
        raise UserError(f"{base}: only .safetensors and .ckpt files are read; {advice}")
    try:
        family = detect_family(str(base))
    except (
        Exception
    ) as error:  # damaged, or a .ckpt that holds more than tensors, which is not opened: many kinds
        raise UserError(f"{base}: no base, or damaged ({one_line(error)})") from None
    family = named_family or family
    if family is None:
        raise UserError(f"{base}: not a base of Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX.1")
    return family


def read_scaled_loras(
    loras: list[tuple[str, float]], family: str, shape: str | None
) -> list[tuple[Lora, float]]:
    """LoRAs with their scales, read for this family. Errors: UserError for weights that are not finite."""
    out = []
    for path, scale in loras:
        lora = read_lora(path, family, shape)
        lora.check_finite()
        out.append((lora, scale))
    return out


class Merger:
    """LoRAs with their scales, put into weights as these come by; remembers which have been used."""

    def __init__(
        self, loras: list[tuple[Lora, float]], dtype: torch.dtype | None, weights: dict[Layer, float]
    ) -> None:
        """dtype: of the result; None for the base's. weights: further factors; 0 leaves a layer out."""
        self.loras, self.dtype, self.weights = loras, dtype, weights
        self.parts = {part for lora, _ in loras for part in lora.layers}
        self.unused = {(k, part, name) for k, (lora, _) in enumerate(loras) for part, name, _ in lora}
        # (norm of what rounding took, norm of the update), by layer
        self.rounding: dict[str, tuple[float, float]] = {}

    def layers(self, part: str, name: str) -> list[tuple[LoraLayer | LycorisLayer, float]]:
        """The adapters of one layer, with their scales."""
        layers, weight = [], self.weights.get((part, name), 1.0)
        for k, (lora, scale) in enumerate(self.loras):
            layer = lora.layers.get(part, {}).get(name)
            if layer is not None:
                if weight:
                    layers.append((layer, scale * weight))
                self.unused.discard((k, part, name))
        return layers

    def merge(self, part: str, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of one layer with every LoRA in it, summed in float32, in the weight's own precision.

        What that precision takes of the update is noted.
        """
        merged, layers = weight, self.layers(part, name)
        if not weight.is_floating_point():
            raise UserError(
                f"{part}.{name}: the base's weights are {weight.dtype}, to which nothing can be added"
            )
        for layer, scale in layers:
            if layer.shape[0] != weight.shape[0] or math.prod(layer.shape) != weight.numel():
                size = tuple(weight.shape)
                raise UserError(f"{part}.{name} is {size} in the base, and another size in the LoRA")
            merged = apply_delta(merged, scale * layer.delta(), layer)
        if not torch.isfinite(merged).all():
            raise UserError(f"{part}.{name}: the base's weight is not finite")
        stored = merged.to(weight.dtype)
        if layers:
            update = merged.float() - weight.float()
            lost = stored.float() - merged.float()
            self.rounding[f"{part}.{name}"] = (float(lost.norm()), float(update.norm()))
        return stored

    def lost_shares(self) -> tuple[float, float, str]:
        """(the share of the update that rounding took, the largest of a layer, that layer's name)."""
        lost, updates = (math.hypot(*norms) for norms in zip(*self.rounding.values(), strict=True))
        shares = {name: lost / (update or math.inf) for name, (lost, update) in self.rounding.items()}
        worst = max(shares, key=shares.get)
        return lost / (updates or math.inf), shares[worst], worst

    def cast(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors in the result's precision, ready for a file."""
        return {
            key: value.to(self.dtype or value.dtype).contiguous() if value.is_floating_point() else value
            for key, value in tensors.items()
        }

    def check_all_used(self) -> None:
        """Errors: UserError if a layer of a LoRA has no place in the base, or none has a weight."""
        if self.unused:
            _, part, name = sorted(self.unused)[0]
            count = len(self.unused)
            raise UserError(f"{count} layers of the LoRAs are not in the base, such as {part}.{name}")
        if not self.rounding:
            raise UserError("--block_weights leaves nothing of the LoRAs")


def read_base_file(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a base's file. Errors: UserError that names it."""
    try:
        return load_file(file) if file.suffix == ".safetensors" else read_pickled_tensors(file)
    except (
        Exception
    ) as error:  # torch has many kinds for a damaged .ckpt, or one that holds more than tensors
        raise UserError(f"{file}: damaged ({one_line(error)})") from None


def merge_folder(base: Path, target: Path, merger: Merger) -> None:
    """Writes a diffusers folder with the LoRAs in it; what no LoRA touches is copied. Errors: UserError."""
    try:
        shutil.copytree(base, target)
    except shutil.Error as error:  # a list of all files that can't be read
        file, _, why = error.args[0][0]
        raise UserError(f"{file}: {why}") from None
    for part in sorted(entry.name for entry in base.iterdir() if entry.is_dir()):
        files = sorted((target / part).glob("*.safetensors"))
        if part not in merger.parts and not merger.dtype:
            continue
        if part in merger.parts and not files:
            raise UserError(f"{base / part}: no .safetensors weights")
        for file in files:
            tensors = merge_part_file(part, base / part / file.name, merger)
            save_file(tensors, file, metadata=read_safetensors_header(file)[0] or None)


def merge_part_file(part: str, file: Path, merger: Merger) -> dict[str, torch.Tensor]:
    """The tensors of one weight file of a diffusers part, merged."""
    tensors = read_base_file(file)
    if merger.dtype:  # sums in the target's precision, not rounded to the base's in between
        tensors = merger.cast(tensors)
    for key, value in tensors.items():
        if not key.endswith(".weight") or value.dim() < 2:
            continue
        name = key.removesuffix(".weight")
        if part.startswith("text_encoder") and name.startswith("encoder.layers."):
            name = f"text_model.{name}"
        tensors[key] = merger.merge(part, name, value)
    return merger.cast(tensors)


def merge_single_file(base: Path, family: str, shape: str | None, merger: Merger) -> dict[str, torch.Tensor]:
    """The tensors of a single-file checkpoint with the LoRAs in it.

    shape: a diffusers folder of the same shape; None for the released model's.
    """
    tensors = read_base_file(base)
    if base.suffix == ".ckpt":  # a .safetensors file holds no two tensors in one piece of memory
        tensors = {name: value.clone() for name, value in tensors.items()}
    if merger.dtype:
        tensors = merger.cast(tensors)
    merge_denoiser(tensors, family, shape, merger)
    for part, prefix in TEXT_PREFIXES[family].items():
        names = {name for lora, _ in merger.loras for name in lora.layers.get(part, {})}
        for name in sorted(names):
            key, third = text_layer_key(prefix, name)
            if key in tensors:
                weight = tensors[key] if third is None else tensors[key].chunk(3)[third]  # a view
                weight[:] = merger.merge(part, name, weight)
    return tensors


def merge_denoiser(tensors: dict[str, torch.Tensor], family: str, shape: str | None, merger: Merger) -> None:
    """Merges the LoRAs of the denoiser into a single file's tensors, in place."""
    prefix = DENOISER_PREFIX if any(key.startswith(DENOISER_PREFIX) for key in tensors) else ""
    part = FAMILIES[family].denoiser
    for name, place in denoiser_places(family, denoiser_config(family, shape)).items():
        key = f"{prefix}{place.name}.weight"
        if key in tensors and merger.layers(part, name):
            place.write(tensors[key], merger.merge(part, name, place.read(tensors[key])))
