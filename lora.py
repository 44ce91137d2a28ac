#!/usr/bin/env python
"""LoRA for any torch.nn.Module, for people who write their own training loop.

    from lora import apply_lora_to_model, get_lora_parameters, save_lora

    apply_lora_to_model(unet, rank=8, alpha=8)                    # the base is frozen, attention gets a LoRA
    optimizer = torch.optim.AdamW(get_lora_parameters(unet), lr=1e-4)
    ...                                                           # your loop
    save_lora(unet, "mine.safetensors")                           # diffusers' pipelines load it, too

lora_example.py is a whole training with it. `python lora.py` prints how many parameters a LoRA has, and how
large its file is, by rank; `python lora.py BASE_FOLDER` the same for another base.

It needs torch, peft and safetensors; load_models, which reads bases, needs diffusers as well, and for a
checkpoint file the library lora_training, beside it or installed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

if TYPE_CHECKING:
    from collections.abc import Mapping

ADAPTER = "default"  # peft's name of a model's first adapter
METADATA_KEY = "lora_adapter_metadata"  # where diffusers keeps a LoRA's rank and alpha
# the layers of attention, as diffusers and as the original code and CLIP call them
ATTENTION = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}
OTHER_NAME = ATTENTION | {original: name for name, original in ATTENTION.items()}
LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
ONLY_SAFETENSORS = "only .safetensors files are read and written; others can run code when they are opened"


class LoRALinear(Linear):
    """One Linear layer with a LoRA: y = W x + (alpha / rank) B A x, B zero at the start.

    apply_lora_to_model puts peft's layer of the same kind into a whole model; this one is for a model that
    you build yourself. https://arxiv.org/abs/2106.09685
    """

    def __init__(
        self, linear: torch.nn.Linear, rank: int = 4, alpha: float | None = None, dropout: float = 0.0
    ) -> None:
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
    modules = dict(model.named_modules())
    closed = [name for name, m in modules.items() if isinstance(m, torch.nn.MultiheadAttention)]
    prefixes = tuple(f"{name}." if name else "" for name in closed)
    layers = {n: m for n, m in modules.items() if isinstance(m, LAYERS) and not n.startswith(prefixes)}
    # peft merges no grouped convolution
    layers = {n: m for n, m in layers.items() if n and getattr(m, "groups", 1) == 1}
    if not layers:
        advice = "; LoRALinear is one layer by itself" if isinstance(model, torch.nn.Linear) else ""
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
) -> torch.nn.Module:
    """Freezes the model and adds a LoRA, in place; returns the model.

    alpha: the rank, if None. target_modules: as lora_targets takes them. Errors: ValueError.
    """
    if lora_layers(model):
        advice = "merge_lora_weights or load_lora comes before another"
        raise ValueError(f"this {type(model).__name__} has a LoRA: {advice}")
    # a list would match ends of names, too
    pattern = "|".join(map(re.escape, lora_targets(model, target_modules)))
    config = lora_config(rank, alpha, dropout, pattern)
    model.requires_grad_(False)
    inject_adapter_in_model(config, model, ADAPTER)
    cast_to_float32(model)
    if any(isinstance(module, torch.nn.TransformerEncoderLayer) for module in model.modules()):
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the layers, and past the LoRA
    return model


def lora_layers(model: torch.nn.Module) -> dict[str, BaseTunerLayer]:
    """The model's layers that have a LoRA, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def get_lora_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The LoRA's parameters, for the optimizer. Empty if there is none."""
    return [parameter for name, parameter in model.named_parameters() if ".lora_" in f".{name}"]


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """{"lora": …, "base": …}: how many numbers each has."""
    lora = sum(parameter.numel() for parameter in get_lora_parameters(model))
    return {"lora": lora, "base": sum(parameter.numel() for parameter in model.parameters()) - lora}


def set_lora_enabled(model: torch.nn.Module, enabled: bool) -> None:
    """Switches the LoRA off, so that the base alone answers, or on again."""
    for layer in lora_layers(model).values():
        layer.enable_adapters(enabled)


def merge_lora_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Adds the LoRA's update to the base's weights and takes the LoRA away; returns the plain model.

    Sums are made in float32. Errors: ValueError for a model without LoRA, or with weights that are not finite
    (the base is then as it was).
    """
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no LoRA")
    for parameter in get_lora_parameters(model):
        if not torch.isfinite(parameter).all():
            raise ValueError("the LoRA has weights that are not finite")
    for name, layer in layers.items():
        base, down, up = layer.get_base_layer(), layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        update = layer.scaling[ADAPTER] * up.detach().flatten(1) @ down.detach().flatten(1)
        base.weight.data = (base.weight.float() + update.view_as(base.weight)).to(base.weight.dtype)
        if not name:
            return base
        model.set_submodule(name, base)
    for attribute in ("peft_config", "active_adapter"):
        model.__dict__.pop(attribute, None)
    return model


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
    """The file's path. Errors: ValueError for anything but .safetensors."""
    if Path(file).suffix != ".safetensors":
        raise ValueError(f"{file}: {ONLY_SAFETENSORS}")
    return Path(file)


def save_lora(models: torch.nn.Module | Mapping, file: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Writes the LoRA of a model, or of several ({"unet": …, "text_encoder": …}), with rank and alpha.

    The file is there whole or not at all. dtype: float32, if None. Errors: ValueError if there is no LoRA, or
    if it has weights that are not finite.
    """
    file, tensors, metadata = checked_file(file), {}, {}
    for name, model in parts_of(models).items():
        if not lora_layers(model):
            continue
        start, config = f"{name}." if name else "", model.peft_config[ADAPTER]
        # files have a level that transformers 5 no longer has
        level = "text_model." if "CLIPText" in type(model).__name__ else ""
        for key, value in get_peft_model_state_dict(model).items():
            if not torch.isfinite(value).all():
                raise ValueError(f"{start}{key} is not finite: nothing is saved")
            tensors[start + level + key] = value.detach().to("cpu", dtype or torch.float32).contiguous()
        values = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        values["target_modules"] = sorted(lora_layers(model))
        metadata |= {start + key: value for key, value in values.items()}
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
        raise ValueError(f"{file}: not to be read, or damaged: {error}") from None
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{file}: {key} is not finite")
    # as diffusers writes those of UNets, and peft
    for diffusers_spelling, peft_spelling in ((".lora.down.", ".lora_A."), (".lora.up.", ".lora_B.")):
        tensors = {key.replace(diffusers_spelling, peft_spelling): t for key, t in tensors.items()}
    return tensors, about


def load_lora(models: torch.nn.Module | Mapping, file: str | Path):
    """Loads a file of save_lora, or a training script's pytorch_lora_weights.safetensors; returns the models.

    A model without LoRA gets the one of the file; a LoRA that is there takes the file's weights.
    Errors: ValueError for a file that is none, is damaged, or does not fit.
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
        if not lora_layers(model):
            settings = {key.removeprefix(prefix): v for key, v in about.items() if key.startswith(prefix)}
            apply_lora_of_file(model, state, settings, file)
        shapes = {key: tuple(t.shape) for key, t in state.items()}
        model_shapes = {key: tuple(t.shape) for key, t in get_peft_model_state_dict(model).items()}
        for key in sorted({*model_shapes, *shapes}):
            in_file, in_model = shapes.get(key, "missing"), model_shapes.get(key, "missing")
            if in_file != in_model:
                raise ValueError(f"{file}: {key} is {in_file} in the file and {in_model} in the model")
        set_peft_model_state_dict(model, state)
    return models


def apply_lora_of_file(model: torch.nn.Module, state: dict, settings: dict, file: str | Path) -> None:
    """Adds a LoRA of the layers, rank and alpha that a file has.

    state: its weights with peft's keys; settings: its metadata. Errors: ValueError.
    """
    layers = sorted({key.split(".lora_")[0] for key in state})
    model_layers = {name for name, module in model.named_modules() if isinstance(module, LAYERS)}
    for layer in layers:
        if layer not in model_layers:
            raise ValueError(f"{file}: {type(model).__name__} has no layer {layer}")
    first = next((t for key, t in state.items() if ".lora_A." in f".{key}"), ())
    rank, alpha, dropout = (settings.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    apply_lora_to_model(model, int(rank or len(first)), alpha, dropout or 0.0, layers)


# ---- bases -------------------------------------------------------------------------------------------------


def load_models(
    ckpt_path: str | Path,
    device: str | torch.device = "cpu",
    lora_rank: int = 4,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    apply_to_diffusion: bool = True,
    apply_to_clip: bool = False,
) -> dict[str, object]:
    """A base's models with a LoRA in the denoiser, the CLIP text encoders, both or none.

    ckpt_path: a diffusers folder, or a .safetensors or .ckpt checkpoint of SD 1.x/2.x, SDXL, SD3 or FLUX.1
    (code in a .ckpt is not run). The result has the names of diffusers' pipelines ("unet", "vae",
    "text_encoder", "tokenizer", …), and "diffusion", "clip", "encoder", "decoder" and "pipeline" for the same
    models. Errors: ValueError for what is no base.
    """
    import diffusers

    folder = Path(ckpt_path)
    if folder.is_file():
        folder = unpack_checkpoint(folder)
    elif not (folder / "model_index.json").is_file():
        raise ValueError(f"{ckpt_path}: neither a checkpoint nor a diffusers folder")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True).to(device)
    models = dict(pipeline.components)
    models["diffusion"] = models.get("unet") or models["transformer"]
    models["clip"], vae = models["text_encoder"], models["vae"]
    models |= {"encoder": vae.encoder, "decoder": vae.decoder, "pipeline": pipeline}
    text_encoders = [model for name, model in models.items() if name.startswith("text_encoder")]
    clips = [model for model in text_encoders if type(model).__name__.startswith("CLIP")]
    for module in models.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    for model in [models["diffusion"]] * apply_to_diffusion + clips * apply_to_clip:
        apply_lora_to_model(model, lora_rank, lora_alpha, lora_dropout)
    return models


def unpack_checkpoint(checkpoint: Path) -> Path:
    """The diffusers folder that is made of a checkpoint, once. Errors: ValueError."""
    from lora_training.base_model.family_detection import require_family
    from lora_training.base_model.sources import unpack_single_file
    from lora_training.errors import UserError
    from lora_training.families import FAMILIES

    try:
        return unpack_single_file(checkpoint, FAMILIES[require_family(str(checkpoint))])
    except UserError as error:
        raise ValueError(str(error)) from None


# ---- how large a LoRA is -----------------------------------------------------------------------------------


def denoiser_without_weights(folder: str | None) -> torch.nn.Module:
    """The denoiser of a diffusers folder, or of Stable Diffusion 1.5, on the meta device.

    Errors: ValueError for another folder.
    """
    import diffusers

    config = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}  # SD 1.5
    if folder is not None:
        files = [Path(folder) / name / "config.json" for name in ("unet", "transformer")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise ValueError(f"{folder}: not a diffusers folder with a unet or transformer")
        config = json.loads(file.read_text(encoding="utf-8"))
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def size_table(folder: str | None = None, ranks: tuple[int, ...] = (4, 8, 16, 32, 64)) -> str:
    """Parameters and file size of a LoRA of the denoiser's attention, by rank, as the rows of a table."""
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
