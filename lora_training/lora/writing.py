"""Writes a `Lora` as diffusers spells it, or as kohya's scripts, AUTOMATIC1111 and ComfyUI do."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from lora_training.base_model.reading import import_class
from lora_training.errors import UserError
from lora_training.files import atomic_write
from lora_training.lora.formats import to_diffusers_keys
from lora_training.lora.fused_layers import PLAIN_LORA_ADVICE, fuse_lora_layers
from lora_training.lora.metadata import base_versions, tensor_hashes
from lora_training.tensors import read_safetensors

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.lora.low_rank import LoraLayer, LycorisLayer
    from lora_training.lora.reading import Lora
    from lora_training.lora.single_file import BaseWeights

METADATA_PREFIXES = ("modelspec.", "ss_", "sshs_")  # of entries that every file of a LoRA keeps
KOHYA_T5_PREFIXES = {"sd3": {"text_encoder_3": "lora_te3"}, "flux": {"text_encoder_2": "lora_te3"}}
RowNorms = Callable[[str, str], torch.Tensor]  # (part, layer) -> norms of the rows of the base's weight


def write_lora(lora: Lora, target: Path, spelling: str, weights: BaseWeights | None) -> None:
    """Writes a LoRA as "kohya" or "diffusers"; the target appears only when it is whole.

    weights: the base's, for DoRA on a part of what the original holds as one layer. Errors: UserError for
    NaN in the LoRA, or a kind that the spelling has no place for.
    """
    lora.check_finite()
    with atomic_write(target) as part:
        if spelling == "kohya":
            state = kohya_tensors(lora, weights and weights.row_norms)
            save_file(state, part, metadata=kohya_metadata(lora, state, target.stem))
        else:
            write_diffusers_lora(lora, part)


def kohya_tensors(lora: Lora, row_norms: RowNorms | None = None) -> dict[str, torch.Tensor]:
    """Tensors with the keys of kohya's scripts, AUTOMATIC1111 and ComfyUI, each layer with its alpha."""
    out = {}
    for module, layer in kohya_layers(lora, row_norms).items():
        tensors = {
            "lora_down.weight": layer.down,
            "lora_up.weight": layer.up,
            "alpha": torch.tensor(float(layer.alpha)),
        }
        if layer.magnitude is not None:  # a column that ComfyUI multiplies each row by, or a row
            ones = [1] * (len(layer.shape) - 2)
            column = (1, -1) if layer.magnitude_per_input else (-1, 1)
            tensors["dora_scale"] = layer.magnitude.reshape(*column, *ones)
        out |= {f"{module}.{kind}": t.contiguous() for kind, t in tensors.items()}
    return out


def kohya_layers(lora: Lora, row_norms: RowNorms | None) -> dict[str, LoraLayer]:
    """{module as kohya's scripts and ComfyUI name it: its LoRA}; fused where the original is."""
    base, family = lora.base, lora.base.family
    prefixes = family.kohya_prefixes | KOHYA_T5_PREFIXES.get(lora.family, {})
    out = {}
    for part, layers in lora.layers.items():
        other_kinds = sorted({layer.kind for layer in layers.values()} - {"LoRA"})
        if other_kinds:
            raise UserError(f"{other_kinds[0]} is not two matrices; {PLAIN_LORA_ADVICE}")
        if part != family.denoiser:
            out |= {f"{prefixes[part]}_{name.replace('.', '_')}": layer for name, layer in layers.items()}
            continue
        part_norms = functools.partial(row_norms, part) if row_norms else None
        for original in dict.fromkeys(base.places[name].name for name in layers):
            names = base.fused[original]
            places, loras = {n: base.places[n] for n in names}, {n: layers.get(n) for n in names}
            module = f"{prefixes[part]}_{original.replace('.', '_')}"
            out[module] = fuse_lora_layers(places, loras, part_norms)
    return out


def kohya_metadata(lora: Lora, tensors: dict[str, torch.Tensor], title: str) -> dict[str, str]:
    """The metadata of a file for other tools: what the input had, and what modelspec 1.0.0 asks for."""
    source = {k: v for k, v in lora.metadata.items() if k.startswith(METADATA_PREFIXES)}
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": source.get("modelspec.title", title),
        "modelspec.date": source.get("modelspec.date", time.strftime("%Y-%m-%dT%H:%M:%S")),
        "ss_network_module": "networks.lora",
        "ss_network_dim": common_value(len(t) for k, t in tensors.items() if k.endswith(".lora_down.weight")),
        "ss_network_alpha": common_value(float(t) for k, t in tensors.items() if k.endswith(".alpha")),
    }
    return architecture_of(lora) | source | metadata | tensor_hashes(tensors)


def common_value(values) -> str:
    """The one value that all have, or "Dynamic", as kohya's scripts name several."""
    distinct = set(values)
    return f"{distinct.pop():g}" if len(distinct) == 1 else "Dynamic"


def architecture_of(lora: Lora) -> dict[str, str]:
    """What the metadata says of a LoRA's base."""
    base = lora.base
    is_released_medium = lora.family == "sd3" and base.folder is None and base.config["num_layers"] == 24
    if is_released_medium and not any(".attn2." in name for _, name, _ in lora):
        return {
            "modelspec.architecture": "stable-diffusion-3/lora"
        }  # 3 medium and 3.5 medium have these layers
    return base_versions(base.family, base.config, {})


def write_diffusers_lora(lora: Lora, file: Path) -> None:
    """Writes a file that `load_lora_weights` reads, with rank and alpha of every layer in its metadata.

    Errors: UserError for a kind of adapter or a part that diffusers has no place for.
    """
    family = lora.base.family
    pipeline_class = import_class("diffusers", family.pipeline_class)
    arguments = {}
    for part, layers in lora.layers.items():
        check_diffusers_part(part, layers, lora)
        state = peft_state(layers)
        if part == family.denoiser:
            state = to_diffusers_keys(state, family.diffusers_spelling)
        arguments[f"{part}_lora_layers"] = state
        arguments[f"{part}_lora_adapter_metadata"] = peft_settings(layers)
    pipeline_class.save_lora_weights(file.parent, weight_name=file.name, safe_serialization=True, **arguments)
    tensors, metadata = read_safetensors(file)  # save_lora_weights takes no other metadata than its own
    source = {k: v for k, v in lora.metadata.items() if k.startswith(METADATA_PREFIXES)}
    save_file(tensors, file, metadata=metadata | source)


def check_diffusers_part(part: str, layers: dict[str, LoraLayer | LycorisLayer], lora: Lora) -> None:
    """Errors: UserError for layers, or a part, that diffusers' files for the family have no place for."""
    family = lora.base.family
    for layer in layers.values():
        if layer.kind != "LoRA" or layer.magnitude_per_input:
            kind = layer.kind if layer.kind != "LoRA" else "DoRA by columns"
            raise UserError(f"diffusers has no place for {kind}; {PLAIN_LORA_ADVICE}")
    if part == family.denoiser:
        return
    encoders = {encoder for _, encoder in family.text_encoders.values()}
    if part.startswith("text_encoder") and part not in encoders:
        raise UserError(f"diffusers has no place for a LoRA of {part} in {lora.family}")
    save = import_class("diffusers", family.pipeline_class).save_lora_weights
    if f"{part}_lora_layers" not in inspect.signature(save).parameters:
        raise UserError(f"diffusers' files for {lora.family} have no place for a LoRA of {part}")


def peft_state(layers: dict[str, LoraLayer]) -> dict[str, torch.Tensor]:
    """A part's LoRA with peft's keys."""
    state = {}
    for name, layer in layers.items():
        state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
        if layer.magnitude is not None:
            shape = (1, -1, 1, 1) if layer.down.dim() == 4 else (-1,)  # as peft has it for convolutions
            state[f"{name}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
    return {key: value.contiguous() for key, value in state.items()}


def peft_settings(layers: dict[str, LoraLayer]) -> dict:
    """peft's settings of a part's LoRA: the commonest rank and alpha, and what differs from them by layer."""
    from peft import LoraConfig

    # without a level that only some classes have
    plain_names = {name.removeprefix("text_model."): layer for name, layer in layers.items()}
    ranks = {name: layer.rank for name, layer in plain_names.items()}
    alphas = {name: layer.alpha for name, layer in plain_names.items()}
    rank, alpha = (max(set(v.values()), key=list(v.values()).count) for v in (ranks, alphas))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        target_modules=sorted(plain_names),
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
    ).to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
