"""LoRA weights with the keys of diffusers' and of kohya's files."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from lora_training.adapter_names import ADAPTER
from lora_training.lora.kohya_layouts import kohya_layout

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from lora_training.families import Family

KOHYA_KINDS = {  # peft's name of a tensor: kohya's
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}


def to_diffusers_keys(state: dict, spelling: tuple[tuple[str, str], ...]) -> dict:
    """The denoiser's LoRA with the keys of diffusers' files, the same spelling for every layer.

    diffusers looks at the first key only to tell how a file is spelled: its own conversion renames the
    attention's layers alone, so a UNet's file that also has other layers would be read without them, or
    without the attention.
    """
    for peft, diffusers in spelling:
        state = {key.replace(peft, diffusers): value for key, value in state.items()}
    return state


def text_encoder_keys(state: dict) -> dict:
    """A text encoder's LoRA, by key or by module, with the level `text_model` of released files.

    transformers 5 has no such level.
    """
    return {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in state.items()}


def reference_free(states: dict, initials: dict, args: argparse.Namespace) -> tuple[dict, float, int]:
    """LoRA weights for the unchanged base. Returns (states, alpha, rank).

    pissa and olora change the base's weights by the LoRA's start; what they learned, B A - B0 A0, is a LoRA
    of twice the rank: https://arxiv.org/abs/2404.02948
    """
    if not args.init_lora_weights.startswith(("pissa", "olora")):
        return states, args.lora_alpha, args.rank
    out = {}
    for part, state in states.items():
        out[part] = {}
        for key, value in state.items():
            start = initials[part][key]
            out[part][key] = (
                torch.cat([value, start]) if ".lora_A." in key else torch.cat([value, -start], dim=1)
            )
    return out, args.lora_alpha * (math.sqrt(2) if args.use_rslora else 2), args.rank * 2


def kohya_state(
    family: Family,
    states: dict[str, dict],
    alpha: float,
    config: dict,
    norms: dict | None = None,
    scale: float = 1.0,
    differing: dict[str, dict[str, tuple[float, float]]] | None = None,
) -> dict:
    """LoRA, LoHa or LoKr weights with the keys of kohya's scripts, LyCORIS, AUTOMATIC1111 and ComfyUI.

    states: pipeline name -> weights with peft's keys; config: the denoiser's; norms: of `neighbours_norms`;
    scale: alpha/rank, which LyCORIS leaves out where a LoKr's factors are both whole. differing: {pipeline
    name: {layer: (alpha, scale)}} of layers that have others. Each module gets its own alpha.
    """
    out = {}
    for part, state in states.items():
        is_denoiser = part == family.denoiser
        modules = split_by_module(state, alpha, scale, (differing or {}).get(part, {}))
        modules = modules if is_denoiser else text_encoder_keys(modules)
        prefix = family.kohya_prefixes[part]
        if is_denoiser and family.fused_projections and not any(".lora_" in key for key in state):
            # before diffusers' names: factors of q, k and v can't be put together; ComfyUI knows it
            prefix = "lycoris"
        elif is_denoiser:
            unchanged = {name: {"dora_scale": norm[:, None]} for name, norm in (norms or {}).items()}
            modules = kohya_layout(family, modules | unchanged, config)
        for name, tensors in modules.items():
            out |= {f"{prefix}_{name.replace('.', '_')}.{kind}": t for kind, t in tensors.items()}
    return out


def split_by_module(
    state: dict, alpha: float, scale: float, differing: dict[str, tuple[float, float]]
) -> dict[str, dict]:
    """Weights with peft's keys -> {module: {kohya's name: tensor}}, each with its alpha.

    scale, differing: as in `kohya_state`, of this part.
    """
    modules: dict[str, dict] = {}
    for key, value in state.items():
        name, kind = ADAPTER.split(key)
        if (
            kind == "lora_magnitude_vector"
        ):  # a column, as ComfyUI multiplies it; of convolutions (out, 1, 1, 1)
            value = value.reshape(-1, *[1] * max(1, value.dim() - 1))
        own_alpha = float(differing.get(name, (alpha, scale))[0])
        tensors = modules.setdefault(name, {"alpha": torch.tensor(own_alpha, device="cpu")})
        tensors[KOHYA_KINDS.get(kind, kind)] = value
    for name, tensors in modules.items():
        if {"lokr_w1", "lokr_w2"} <= tensors.keys():
            tensors["lokr_w1"] = tensors["lokr_w1"] * differing.get(name, (alpha, scale))[1]
    return modules


def neighbours_norms(family: Family, folder: Path, state: dict, config: dict) -> dict:
    """{layer: norms of its rows} of layers without LoRA that are one layer in the original with one that has.

    With these as their magnitudes (DoRA) they stay as they are. folder, config: the denoiser's.
    """
    if not family.fused_projections:
        return {}
    trained, norms = {key.split(".lora_")[0] for key in state}, {}
    shared = {original_name(family, name, config) for name in trained}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            names = shard.keys()
            matrices = (key for key in names if len(shard.get_slice(key).get_shape()) == 2)
            layers = {key.removesuffix(".weight") for key in matrices if key.endswith(".weight")}
            for name in layers - trained:
                if original_name(family, name, config) in shared:
                    norms[name] = shard.get_tensor(f"{name}.weight").float().norm(dim=1)
    return norms


def original_name(family: Family, layer: str, config: dict) -> str:
    """The original checkpoint's name of a denoiser's layer, or of the one that holds it."""
    kinds = ("lora_down.weight", "lora_up.weight")
    probe = {kind: torch.zeros(1, 1) for kind in kinds} | {"alpha": torch.tensor(1.0)}
    return next(iter(kohya_layout(family, {layer: probe}, config)))
