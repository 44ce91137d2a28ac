#!/usr/bin/env python
"""LoRA for any torch.nn.Module, for people who write their own training loop.

    from lora import apply_lora_to_model, get_lora_parameters, save_lora

    apply_lora_to_model(unet, rank=8, alpha=8)                    # the base is frozen, attention gets a LoRA
    optimizer = torch.optim.AdamW(get_lora_parameters(unet), lr=1e-4)
    ...                                                           # your loop
    save_lora(unet, "mine.safetensors")                           # diffusers' pipelines load it, too

    load_lora(unet, "style.safetensors", adapter="style")         # a second LoRA on the same model
    blend_adapters(unet, {"default": 1.0, "style": 0.7})          # both, with weights
    merge_lora_weights(unet, adapter="style")                     # one of them into the base

lora_example.py is a whole training with it. `python lora.py` prints how many parameters a LoRA has, and how
large its file is, by rank; `python lora.py BASE_FOLDER` the same for another base.

It needs torch, peft and safetensors. preload_models_with_lora and generate, which are for bases of Stable
Diffusion and FLUX.1, are imported from here, too, and stand in lora_bases.py. load_models, load_lora and
save_lora are the short names of preload_models_with_lora, load_lora_into_models and save_models_lora.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear, LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

if TYPE_CHECKING:
    from collections.abc import Mapping

ADAPTER = "default"  # the adapter that is meant where none is named, as peft calls it
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps a LoRA's rank and alpha
# the layers of attention, as diffusers and as the original code and CLIP call them
ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
OTHER_NAME = ATTENTION | {original: name for name, original in ATTENTION.items()}
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
ONLY_SAFETENSORS = (
    "only safetensors are read and written, in files named .safetensors or .pt;"
    " others can run code when they are opened"
)
# what lora_bases.py has
OF_BASES = ("preload_models_with_lora", "load_models", "generate", "denoiser_without_weights")
LoRALayer = LoraLayer  # what every layer with a LoRA is, for isinstance()


def __getattr__(name: str):
    """What stands in lora_bases.py, so that this file works without it."""
    if name not in OF_BASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import lora_bases

    return getattr(lora_bases, name)


class LoRALinear(Linear):
    """A Linear layer with a LoRA: y = W x + (alpha / rank) B A x, B zero at the start; W and bias are frozen.

    apply_lora_to_model puts peft's layer of the same kind into a whole model; this one is for a model that
    you build yourself. LoRALinear.of takes a layer that exists. https://arxiv.org/abs/2106.09685
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 4,
        alpha: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        self._add_to(torch.nn.Linear(in_features, out_features, bias), rank, alpha, dropout)

    @classmethod
    def of(
        cls, linear: torch.nn.Linear, rank: int = 4, alpha: float | None = None, dropout: float = 0.0
    ) -> LoRALinear:
        """A Linear layer with a LoRA added to it."""
        layer = cls.__new__(cls)
        layer._add_to(linear, rank, alpha, dropout)
        return layer

    def _add_to(self, linear: torch.nn.Linear, rank: int, alpha: float | None, dropout: float) -> None:
        config = lora_config(rank, alpha, dropout)
        linear.requires_grad_(False)
        super().__init__(linear, ADAPTER, config, r=config.r, lora_alpha=config.lora_alpha)
        cast_to_float32(self)


def lora_config(rank: int, alpha: float | None, dropout: float, targets: str | None = None) -> LoraConfig:
    """peft's configuration; targets: a pattern of full names. Errors: ValueError for impossible numbers."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank is a whole number from 1 on, not {rank!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a share below 1, not {dropout!r}")
    alpha = rank if alpha is None else alpha
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)


def cast_to_float32(model: torch.nn.Module) -> None:
    """Float32 for the LoRA whatever the base is: small updates are lost in half precision."""
    for parameter in get_lora_parameters(model):
        parameter.data = parameter.data.float()


def lora_targets(model: torch.nn.Module, names: list[str] | None = None) -> list[str]:
    """Full names of the layers that `names` means: full names or their last parts, in diffusers' spelling of
    attention or that of the original code.

    None: the attention's layers; every Linear layer in a model that has none. torch.nn.MultiheadAttention
    reads its weights past its layers, so that it takes no LoRA. Errors: ValueError for a name that fits none.
    """
    # below a layer with a LoRA are its base layer and the adapters' matrices
    inside = tuple(f"{name}." for name in lora_layers(model) if name)
    modules = {name: m for name, m in model.named_modules() if not name.startswith(inside)}
    modules = {name: m.get_base_layer() if isinstance(m, LoRALayer) else m for name, m in modules.items()}
    closed = [name for name, m in modules.items() if isinstance(m, torch.nn.MultiheadAttention)]
    prefixes = tuple(f"{name}." if name else "" for name in closed)
    layers = {n: m for n, m in modules.items() if isinstance(m, LAYERS) and not n.startswith(prefixes)}
    # peft merges no grouped convolution
    layers = {n: m for n, m in layers.items() if n and getattr(m, "groups", 1) == 1}
    if not layers:
        advice = "; LoRALinear.of takes one layer" if isinstance(model, torch.nn.Linear) else ""
        raise ValueError(
            f"{type(model).__name__} has no layer that takes a LoRA (Linear or convolution){advice}"
        )

    def layers_named(name: str) -> list[str]:
        return [layer for layer in layers if f".{layer}".endswith(f".{name}")]

    if names is None:
        attention = [layer for name in OTHER_NAME for layer in layers_named(name)]
        linear = [name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)]
        return sorted(set(attention or linear or layers))
    targets = set()
    for name in [names] if isinstance(names, str) else names:
        matches = layers_named(name) or layers_named(OTHER_NAME.get(name, name))
        if not matches:
            endings = ", ".join(sorted({short_name(layer) for layer in layers}))
            raise ValueError(
                f"target_modules: {name} is no layer of {type(model).__name__}; its are {endings}"
            )
        targets.update(matches)
    if not targets:
        raise ValueError("target_modules names no layer")
    return sorted(targets)


def short_name(layer: str) -> str:
    """The last part of a layer's full name; the last two where that is a number: "to_out.0"."""
    parts = layer.split(".")
    return ".".join(parts[-2:]) if layer[-1].isdigit() else parts[-1]


def apply_lora_to_model(
    model: torch.nn.Module,
    rank: int = 4,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: list[str] | None = None,
    adapter: str = ADAPTER,
) -> torch.nn.Module:
    """Freezes the model and adds a LoRA, in place; returns the model.

    alpha: the rank, if None. target_modules: as lora_targets takes them. adapter: its name, where a model
    gets several; those that were on stay on, and are trained. Errors: ValueError.
    """
    present = adapters_of(model)
    if adapter in present:
        advice = "merge_lora_weights comes before another, or adapter= names a second"
        raise ValueError(f"this {type(model).__name__} has a LoRA, {adapter!r}: {advice}")
    if not re.fullmatch(r"\w[\w-]*", adapter):
        raise ValueError(f"adapter is a name of letters, digits, _ and -, not {adapter!r}")
    switched_on = [name for name in present if is_on(model, name)]
    # a list would match ends of names, too
    pattern = "|".join(map(re.escape, lora_targets(model, target_modules)))
    config = lora_config(rank, alpha, dropout, pattern)
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are several, which is meant
        inject_adapter_in_model(config, model, adapter)
    switch_on(model, [*switched_on, adapter])
    cast_to_float32(model)
    if any(isinstance(module, torch.nn.TransformerEncoderLayer) for module in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the layers, and past the LoRA
    return model


def lora_layers(model: torch.nn.Module, adapter: str | None = None) -> dict[str, LoRALayer]:
    """The model's layers that have a LoRA, or this adapter, by name."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    return {name: layer for name, layer in layers.items() if adapter is None or adapter in layer.lora_A}


def adapters_of(model: torch.nn.Module) -> list[str]:
    """The names of the model's LoRAs, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.lora_A))


def one_adapter(model: torch.nn.Module, adapter: str | None) -> str:
    """The adapter that is named, or the only one. Errors: ValueError if there is none such, or several."""
    present, kind = adapters_of(model), type(model).__name__
    if not present:
        raise ValueError(f"this {kind} has no LoRA")
    if adapter is None and len(present) > 1:
        raise ValueError(f"this {kind} has several LoRAs: adapter= names one of {', '.join(present)}")
    if adapter not in (None, *present):
        raise ValueError(f"adapter {adapter!r} is none of this {kind}'s LoRAs: {', '.join(present)}")
    return adapter or present[0]


def get_lora_parameters(model: torch.nn.Module, adapter: str | None = None) -> list[torch.nn.Parameter]:
    """The LoRA's parameters, for the optimizer; of all adapters, if None. Empty if there is none."""
    sign = re.compile(r"\.lora_\w+\." + (rf"{re.escape(adapter)}(\.|$)" if adapter else ""))
    return [parameter for name, parameter in model.named_parameters() if sign.search(f".{name}")]


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """{"lora": …, "base": …}: how many numbers each has."""
    lora = sum(parameter.numel() for parameter in get_lora_parameters(model))
    return {"lora": lora, "base": sum(parameter.numel() for parameter in model.parameters()) - lora}


def is_on(model: torch.nn.Module, adapter: str) -> bool:
    """Whether an adapter's update is added to what the base answers."""
    layers = lora_layers(model, adapter).values()
    return any(adapter in layer.active_adapters and not layer.disable_adapters for layer in layers)


def switch_on(model: torch.nn.Module, adapters: list[str]) -> None:
    """Switches these adapters on, and the others off; those that are on are trained."""
    for layer in lora_layers(model).values():
        layer.set_adapter(adapters)
        layer.enable_adapters(True)


def set_lora_enabled(model: torch.nn.Module, enabled: bool, adapter: str | None = None) -> None:
    """Switches the LoRA off, so that the base alone answers, or on again.

    adapter: the one to switch, where the model has several; None: all, and those on again that were on.
    Errors: ValueError for an adapter that isn't there.
    """
    if adapter is not None:
        one_adapter(model, adapter)
        wanted = {name: is_on(model, name) for name in adapters_of(model)} | {adapter: enabled}
        switch_on(model, [name for name, on in wanted.items() if on])
        return
    for layer in lora_layers(model).values():
        if enabled and not layer.active_adapters:  # each was switched off by itself
            layer.set_adapter(list(layer.lora_A))
        layer.enable_adapters(enabled)


def blend_adapters(model: torch.nn.Module, weights: Mapping[str, float]) -> None:
    """Switches on the adapters that are named, each update times its weight, and the others off.

    weights: {"style": 0.7, "face": 1.0}; 1 is an adapter as it was trained. Errors: ValueError.
    """
    for adapter, weight in weights.items():
        one_adapter(model, adapter)
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {adapter!r} is a finite number, not {weight!r}")
    switch_on(model, list(weights))
    for adapter, weight in weights.items():
        for layer in lora_layers(model, adapter).values():
            layer.set_scale(adapter, weight)


def merge_lora_weights(model: torch.nn.Module, adapter: str | None = None) -> torch.nn.Module:
    """Adds the LoRA's update to the base's weights and takes the LoRA away; returns the plain model.

    adapter: the one to merge, after which the others are as they were; None: all that are switched on, each
    with its weight, after which none is left. Sums are made in float32. Errors: ValueError for a model
    without LoRA, or with weights that are not finite (the base is then as it was).
    """
    one_adapter(model, adapter or next(iter(adapters_of(model)), None))
    for parameter in get_lora_parameters(model, adapter):
        if not torch.isfinite(parameter).all():
            raise ValueError("the LoRA has weights that are not finite")
    for name, layer in lora_layers(model).items():
        base = layer.get_base_layer()
        weight = base.weight.detach().float()
        for merged in [adapter] if adapter else layer.active_adapters:
            if merged in layer.lora_A:
                down, up = layer.lora_A[merged].weight.detach(), layer.lora_B[merged].weight.detach()
                update = layer.scaling[merged] * up.flatten(1) @ down.flatten(1)
                weight = weight + update.view_as(weight)
        base.weight.data = weight.to(base.weight.dtype)
        if remove_adapter(layer, adapter):
            continue
        if not name:
            return base
        model.set_submodule(name, base)
    if adapter:
        model.__dict__.get("peft_config", {}).pop(adapter, None)
    if not lora_layers(model):
        for attribute in ("peft_config", "active_adapter"):
            model.__dict__.pop(attribute, None)
    return model


def remove_adapter(layer: LoRALayer, adapter: str | None) -> bool:
    """Takes an adapter, or all of them, out of a layer; whether one is left."""
    if adapter in layer.lora_A:
        layer.set_adapter([name for name in layer.active_adapters if name != adapter])
        layer.delete_adapter(adapter)
    return adapter is not None and len(layer.lora_A) > 0


# ---- files -------------------------------------------------------------------------------------------------


def parts_of(models: torch.nn.Module | Mapping) -> dict[str, torch.nn.Module]:
    """{name in a file: model}; one by itself has its name in diffusers' pipelines, if any, else ""."""
    if not isinstance(models, torch.nn.Module):
        unique = {id(m): name for name, m in reversed(models.items()) if isinstance(m, torch.nn.Module)}
        return {name: models[name] for name in reversed(unique.values())}
    kind = type(models).__name__
    signs = {"UNet": "unet", "Transformer2D": "transformer", "CLIPText": "text_encoder"}
    return {next((name for sign, name in signs.items() if sign in kind), ""): models}


def checked_file(file: str | Path) -> Path:
    """The file's path. Errors: ValueError for anything but .safetensors and .pt."""
    if Path(file).suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{file}: {ONLY_SAFETENSORS}")
    return Path(file)


def lora_state(model: torch.nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    """An adapter's weights with peft's keys; they are the model's own, not a copy."""
    state = {}
    for name, layer in lora_layers(model, adapter).items():
        start = f"{name}." if name else ""
        state[f"{start}lora_A.weight"] = layer.lora_A[adapter].weight.data
        state[f"{start}lora_B.weight"] = layer.lora_B[adapter].weight.data
    return state


def lora_settings(model: torch.nn.Module, adapter: str) -> dict[str, object]:
    """An adapter's rank, alpha, dropout and layers, as files say them. Errors: ValueError if they differ."""
    layers = lora_layers(model, adapter)
    ranks = {(layer.r[adapter], layer.lora_alpha[adapter]) for layer in layers.values()}
    if len(ranks) > 1:
        raise ValueError("layers of different rank or alpha, and a file has one of each: keep the state_dict")
    rank, alpha = ranks.pop()
    dropout = getattr(next(iter(layers.values())).lora_dropout[adapter], "p", 0.0)
    return {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "target_modules": sorted(layers)}


def save_models_lora(
    models: torch.nn.Module | Mapping,
    file: str | Path,
    dtype: torch.dtype | None = None,
    adapter: str | None = None,
) -> Path:
    """Writes the LoRA of a model, or of several ({"unet": …, "text_encoder": …}), with rank and alpha.

    file: its name ends with .safetensors or .pt, and safetensors are written either way. The file is there
    whole or not at all. dtype: float32, if None. adapter: which, where a model has several. Errors:
    ValueError if there is no LoRA, or if it has weights that are not finite.
    """
    file, tensors, metadata = checked_file(file), {}, {}
    for name, model in parts_of(models).items():
        if not lora_layers(model):
            continue
        start, chosen = f"{name}." if name else "", one_adapter(model, adapter)
        # files have a level that transformers 5 no longer has
        level = "text_model." if "CLIPText" in type(model).__name__ else ""
        for key, value in lora_state(model, chosen).items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{start}{key} is not finite: nothing is saved")
            tensors[start + level + key] = value.to("cpu", dtype or torch.float32).contiguous()
        metadata |= {start + key: value for key, value in lora_settings(model, chosen).items()}
    if not tensors:
        raise ValueError("there is no LoRA to save: apply_lora_to_model comes first")
    part = file.with_name(f".{file.name}.part")
    file.parent.mkdir(parents=True, exist_ok=True)
    # not save_file, which writes for the owner alone
    part.write_bytes(save(tensors, metadata={"format": "pt", METADATA_KEY: json.dumps(metadata)}))
    part.replace(file)
    return file


def read_lora(file: str | Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors with peft's keys, what the file says of rank and alpha). Errors: ValueError."""
    try:
        with safe_open(checked_file(file), "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            about = json.loads((opened.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        problem = f"not to be read, or damaged: {error}"
        if Path(file).suffix == ".pt" and Path(file).is_file():
            problem = f"no safetensors, or damaged: {ONLY_SAFETENSORS}"
        raise ValueError(f"{file}: {problem}") from None
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{file}: {key} is not finite")
    # as diffusers writes those of UNets, and peft
    for diffusers_spelling, peft_spelling in ((".lora.down.", ".lora_A."), (".lora.up.", ".lora_B.")):
        tensors = {key.replace(diffusers_spelling, peft_spelling): t for key, t in tensors.items()}
    return tensors, about


def load_lora_into_models(models: torch.nn.Module | Mapping, file: str | Path, adapter: str = ADAPTER):
    """Loads a file of save_models_lora, or a training script's pytorch_lora_weights.safetensors.

    Returns the models. A model without this adapter gets it, with the file's layers, rank and alpha; one that
    has it takes the file's weights and alpha. Errors: ValueError for a file that is none, is damaged, or does
    not fit.
    """
    tensors, about = read_lora(file)
    parts = parts_of(models)
    if "" not in parts and not any(key.startswith(f"{name}.") for key in tensors for name in parts):
        raise ValueError(f"{file}: no layer of it is in {', '.join(parts)}")
    for name, model in parts.items():
        prefix = f"{name}." if name else ""
        state = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        state = {key.removeprefix("text_model."): t.float() for key, t in state.items()}
        if not state:
            continue
        settings = {key.removeprefix(prefix): v for key, v in about.items() if key.startswith(prefix)}
        if adapter not in adapters_of(model):
            apply_lora_of_file(model, state, settings, file, adapter)
        own = lora_state(model, adapter)
        for key in sorted({*own, *state}):
            in_file, in_model = (tuple(s[key].shape) if key in s else "missing" for s in (state, own))
            if in_file != in_model:
                raise ValueError(f"{file}: {key} is {in_file} in the file and {in_model} in the model")
        for key, tensor in state.items():
            own[key].copy_(tensor)
        for layer in lora_layers(model, adapter).values():
            layer.lora_alpha[adapter] = settings.get("lora_alpha") or layer.lora_alpha[adapter]
            layer.set_scale(adapter, 1.0)
    return models


def apply_lora_of_file(
    model: torch.nn.Module, state: dict, settings: dict, file: str | Path, adapter: str
) -> None:
    """Adds a LoRA of the layers, rank and alpha that a file has.

    state: its weights with peft's keys; settings: its metadata. Errors: ValueError.
    """
    layers = sorted({key.split(".lora_")[0] for key in state})
    model_layers = {n for n, module in model.named_modules() if isinstance(module, (*LAYERS, LoRALayer))}
    for layer in layers:
        if layer not in model_layers:
            raise ValueError(f"{file}: {type(model).__name__} has no layer {layer}")
    first = next((t for key, t in state.items() if ".lora_A." in f".{key}"), ())
    rank, alpha, dropout = (settings.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    apply_lora_to_model(model, int(rank or len(first)), alpha, dropout or 0.0, layers, adapter)


save_lora, load_lora = save_models_lora, load_lora_into_models

# ---- how large a LoRA is -----------------------------------------------------------------------------------


def size_table(folder: str | None = None, ranks: tuple[int, ...] = (4, 8, 16, 32, 64)) -> str:
    """Parameters and file size of a LoRA of the denoiser's attention, by rank, as the rows of a table."""
    from lora_bases import denoiser_without_weights

    lines = ["| rank | parameters | file in float32 | in bfloat16 |", "| --- | --- | --- | --- |"]
    for rank in ranks:
        millions = count_parameters(apply_lora_to_model(denoiser_without_weights(folder), rank))["lora"] / 1e6
        lines.append(f"| {rank} | {millions:.2f} million | {4 * millions:.1f} MB | {2 * millions:.1f} MB |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table of sizes."""
    parser = argparse.ArgumentParser(description="Prints how large a LoRA is, by rank.")
    parser.add_argument("base", nargs="?", help="a diffusers folder (default: Stable Diffusion 1.5)")
    parser.add_argument("--rank", type=int, nargs="+", default=[4, 8, 16, 32, 64], help="(4 8 16 32 64)")
    args = parser.parse_args(argv)
    try:
        print(size_table(args.base, tuple(args.rank)))
    except ValueError as error:
        print(f"lora.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
