"""Reads and writes LoRA files of every spelling that people meet; the commands of this room work on what it returns.

In memory a LoRA is a `Lora`: for each layer, by pipeline part and diffusers name, its two matrices and its alpha. Files
* of diffusers and peft: `unet.….lora.down.weight`, `transformer.….lora_A.weight`, adapter_model.safetensors;
* of kohya's scripts, AUTOMATIC1111 and ComfyUI: `lora_unet_….lora_down.weight` with `.alpha`, names of the original
  checkpoint for SDXL, SD3 and FLUX.1, projections fused as there.
The names come from the training scripts' own layouts, tried layer by layer, so that there is one list of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from scripts.parts.released_models import denoiser_config, meta_denoiser
from scripts.parts.training_scripts import load_script

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
ENDINGS = {  # of keys: what they hold
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "magnitude",
    ".alpha": "alpha",
}


class FileError(Exception):
    """A file that can't be used; the message says which and why, in one line."""


@dataclass
class Layer:
    """One layer's LoRA. down (r, in[, k, k]), up (out, r[, 1, 1]); its update is alpha / r * up @ down."""

    down: torch.Tensor
    up: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None  # DoRA's, (out,)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def update(self) -> torch.Tensor:
        """The change of the layer's weight, float32, of the weight's own shape; without DoRA's magnitude."""
        flat = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (flat * (self.alpha / self.rank)).reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass
class Lora:
    """A LoRA by pipeline part ("unet", "transformer", "text_encoder", …) and layer name, and what its file said of it."""

    family: str
    layers: dict[str, dict[str, Layer]]
    metadata: dict[str, str] = field(default_factory=dict)
    kohya: bool = False  # whether its file had the keys of kohya's scripts

    def __iter__(self):
        return ((part, name, layer) for part, layers in self.layers.items() for name, layer in layers.items())


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file, or of a peft adapter's folder. Nothing that could run code is opened."""
    if path.is_dir():
        names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
        found = next((path / n for n in names if (path / n).is_file()), None)
        if found is None:
            raise FileError(f"{path}: no {' or '.join(names)} in this folder")
        path = found
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    if path.suffix != ".safetensors":
        raise FileError(f"{path}: only .safetensors files are read; others can run code when they are opened")
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise FileError(f"{path}: not a safetensors file, or damaged ({error})") from None
    config = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and config.is_file():
        metadata["adapter_config"] = config.read_text(encoding="utf-8")
    return tensors, metadata


def split_key(key: str, source: Path) -> tuple[str, str]:
    """A key -> (layer, what it holds)."""
    for ending, kind in ENDINGS.items():
        if key.endswith(ending):
            return key[: -len(ending)], kind
    other = {
        "hada_": "LoHa",
        "lokr_": "LoKr",
        "lora_mid": "LoCon with a middle matrix",
        "oft_": "OFT",
        "diff": "full weights",
    }
    what = next((name for part, name in other.items() if part in key.rsplit(".", 2)[-2] + key.rsplit(".", 1)[-1]), None)
    raise FileError(f"{source}: {key}: {f'{what} is not a LoRA of two matrices' if what else 'not a key of a LoRA'}")


def family_of(layers: dict[str, dict], metadata: dict[str, str]) -> str:
    """The model family: as the metadata says, else by the names and widths of the layers."""
    said = metadata.get("modelspec.architecture", "")
    for word, family in (("flux", "flux"), ("diffusion-v3", "sd3"), ("xl", "sdxl"), ("diffusion-v1", "sd15")):
        if word in said:
            return family
    names = "\n".join(layers)
    if "double_blocks" in names or "single_blocks" in names or "single_transformer_blocks" in names:
        return "flux"
    if "joint_blocks" in names:
        return "sd3"
    if "add_q_proj" in names or "transformer.transformer_blocks" in names:
        widths = {t["down"].shape[1] for n, t in layers.items() if n.endswith("attn.to_q") and "down" in t}
        return "flux" if 3072 in widths else "sd3"
    deep = re.search(r"(attentions|blocks)[._]\d+[._].*transformer_blocks[._]1", names)
    second = "lora_te2" in names or "text_encoder_2." in names
    return "sdxl" if second or deep or "unet_input_blocks" in names else "sd15"


@dataclass
class Place:
    """Where a layer stands in the original checkpoint: in the rows `rows` of layer `name`, in the order `order`."""

    name: str
    rows: torch.Tensor
    order: torch.Tensor
    height: int


def original_places(script, denoiser) -> dict[str, Place]:
    """{diffusers name of a layer: its place} of all linear and convolution layers, by the training script's own layout."""
    places = {}
    for name, module in denoiser.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        numbered = torch.arange(1, module.weight.shape[0] + 1).float()[
            :, None
        ]  # so that the layout shows where rows go
        probe = {"lora_down.weight": torch.zeros(1, 1), "lora_up.weight": numbered, "alpha": torch.tensor(1.0)}
        ((original, found),) = script.kohya_layout({name: probe}, dict(denoiser.config)).items()
        column = found["lora_up.weight"].sum(1)
        rows = column.nonzero()[:, 0]
        places[name] = Place(original, rows, column[rows].long() - 1, len(column))
    return places


def text_layer_names(part: str) -> list[str]:
    """Layers of a text encoder that a LoRA can have, more of them than any released encoder has."""
    if part == "text_encoder_3":
        inner = [f"layer.0.SelfAttention.{k}" for k in "qkvo"]
        inner += [f"layer.1.DenseReluDense.{k}" for k in ("wi_0", "wi_1", "wo")]
        return [f"encoder.block.{i}.{n}" for i in range(24) for n in inner]
    inner = [f"self_attn.{k}_proj" for k in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    return [f"text_model.encoder.layers.{i}.{n}" for i in range(32) for n in inner]


def text_prefixes(family: str, script) -> dict[str, tuple[str, ...]]:
    """{pipeline part: the prefixes that other tools give its LoRA}."""
    own = {part: (prefix,) for part, prefix in script.KOHYA_PREFIXES.items() if part.startswith("text_encoder")}
    more = {"sd3": {"text_encoder_3": ("lora_te3",)}, "flux": {"text_encoder_2": ("lora_te3",)}}.get(family, {})
    first = own["text_encoder"] + (("lora_te1",) if own["text_encoder"] == ("lora_te",) else ("lora_te",))
    return own | more | {"text_encoder": first}


def read_lora(path: str | Path, family: str | None = None, base: str | None = None) -> Lora:
    """A LoRA file of any known spelling. base: a diffusers folder, for a base of another shape than the released one.

    Errors: FileError for what is not a LoRA, is another kind of adapter, or has a layer that the base does not have.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    raw: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        layer, kind = split_key(key, path)
        raw.setdefault(layer, {})[kind] = value
    for layer, found in raw.items():
        if "down" not in found or "up" not in found:
            raise FileError(f"{path}: {layer}: one of its two matrices is missing")
        if found["down"].shape[0] != found["up"].shape[1]:
            raise FileError(f"{path}: {layer}: its matrices' ranks differ")
    family = family or family_of(raw, metadata)
    kohya = any(layer.startswith(("lora_unet_", "lora_te")) for layer in raw)
    if kohya:
        layers = from_kohya(raw, family, base, path)
    else:
        layers = from_diffusers(raw, metadata, family, path)
    return Lora(family, layers, metadata, kohya)


def as_layer(found: dict, alpha: float) -> Layer:
    """Tensors by kind -> Layer."""
    magnitude = found["magnitude"].flatten() if "magnitude" in found else None
    return Layer(found["down"], found["up"], alpha, magnitude)


def from_diffusers(raw: dict, metadata: dict[str, str], family: str, path: Path) -> dict[str, dict[str, Layer]]:
    """Layers with the keys of diffusers or peft; alpha from the metadata, or from `.alpha` tensors, else the rank."""
    denoiser = "transformer" if family in ("sd3", "flux") else "unet"
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if "adapter_config" in metadata:
        config = json.loads(metadata["adapter_config"])
        settings = {f"{denoiser}.{key}": value for key, value in config.items()}
    out: dict[str, dict[str, Layer]] = {}
    for key, found in raw.items():
        name = key.removeprefix("base_model.model.")
        part, _, rest = name.partition(".")
        if part in ("unet", "transformer") and part != denoiser:
            raise FileError(f"{path}: a LoRA with a {part} does not fit {family}, which has a {denoiser}")
        if part not in (denoiser, *TEXT_PARTS):
            part, rest = denoiser, name  # peft's own files don't say
        rest = re.sub(
            r"\.processor\.to_(q|k|v|out)_lora$", lambda m: f".to_{m[1]}" + (".0" if m[1] == "out" else ""), rest
        )
        if part.startswith("text_encoder") and rest.startswith("encoder.layers."):
            rest = f"text_model.{rest}"
        rank = found["down"].shape[0]

        def setting(what: str, rest=rest, part=part):
            pattern = settings.get(f"{part}.{what}_pattern") or {}
            own = next((v for k, v in pattern.items() if rest == k or rest.endswith("." + k)), None)
            return own if own is not None else settings.get(f"{part}.{'lora_alpha' if what == 'alpha' else 'r'}")

        alpha = found["alpha"].item() if "alpha" in found else setting("alpha")
        alpha = float(rank if alpha is None else alpha)
        if settings.get(f"{part}.use_rslora"):
            alpha *= rank**0.5  # so that alpha / rank is the scale, as everywhere
        out.setdefault(part, {})[rest] = as_layer(found, alpha)
    return out


def from_kohya(raw: dict, family: str, base: str | None, path: Path) -> dict[str, dict[str, Layer]]:
    """Layers with the keys of kohya's scripts; fused projections are taken apart. A missing alpha is the rank."""
    script = load_script(family)
    denoiser = meta_denoiser(family, denoiser_config(family, base))
    parts_of: dict[str, list[tuple[str, Place]]] = {}
    for name, place in original_places(script, denoiser).items():
        parts_of.setdefault(f"lora_unet_{place.name.replace('.', '_')}", []).append((name, place))
    also = {
        f"lora_unet_{n.replace('.', '_')}": n for n, _ in denoiser.named_modules()
    }  # some tools keep diffusers' names
    text = {
        f"{prefix}_{name.replace('.', '_')}": (part, name)
        for part, prefixes in text_prefixes(family, script).items()
        for prefix in prefixes
        for name in text_layer_names("text_encoder_3" if prefix == "lora_te3" else part)
    }
    out: dict[str, dict[str, Layer]] = {}
    for key, found in raw.items():
        alpha = float(found["alpha"].item()) if "alpha" in found else float(found["down"].shape[0])
        layer = as_layer(found, alpha)
        if key in parts_of:
            height = parts_of[key][0][1].height
            if layer.up.shape[0] != height:
                raise FileError(
                    f"{path}: {key}: {layer.up.shape[0]} rows, where {base or f'the released {family}'} has {height};"
                    " --base FOLDER says which base it is for"
                )
            for name, piece in taken_apart(layer, parts_of[key]).items():
                out.setdefault(script.DENOISER, {})[name] = piece
        elif key in also:
            out.setdefault(script.DENOISER, {})[also[key]] = layer
        elif key in text:
            part, name = text[key]
            out.setdefault(part, {})[name] = layer
        else:
            advice = f"not a layer of {base or 'the released model'}"
            raise FileError(f"{path}: {key}: {advice}; --family and --base FOLDER say which base it is for")
    return out


def taken_apart(layer: Layer, parts: list[tuple[str, Place]]) -> dict[str, Layer]:
    """The LoRA of a fused layer as LoRAs of its parts: of their own rank where the matrices show it, else all of it for each.

    A part whose rows are all zero has no LoRA, unless all are zero.
    """
    rows = {name: torch.empty_like(layer.up[: len(place.rows)]) for name, place in parts}
    first_row = {name: place.rows[0].item() for name, place in parts}
    for name, place in parts:
        rows[name][place.order] = layer.up[place.rows]
    magnitude = {name: None for name, _ in parts}
    if layer.magnitude is not None:
        for name, place in parts:
            magnitude[name] = torch.empty_like(layer.magnitude[place.rows])
            magnitude[name][place.order] = layer.magnitude[place.rows]
    if len(parts) == 1:
        name = parts[0][0]
        return {name: Layer(layer.down, rows[name], layer.alpha, magnitude[name])}
    used = {name: up.flatten(1).any(0) for name, up in sorted(rows.items(), key=lambda item: first_row[item[0]])}
    present = [name for name, columns in used.items() if columns.any()] or list(used)
    for names in (list(used), present):  # a part that never moved is zero, a part without LoRA is not there
        each, rest = divmod(layer.rank, len(names))
        slices = {name: slice(k * each, (k + 1) * each) for k, name in enumerate(names)}
        if rest == 0 and all(not (used[n][: s.start].any() or used[n][s.stop :].any()) for n, s in slices.items()):
            break
    else:  # another tool's: one pair of matrices for the fused layer
        slices = dict.fromkeys(present, slice(None))
    out = {}
    for name, columns in slices.items():
        down, up = layer.down[columns].clone(), rows[name][:, columns].clone()
        out[name] = Layer(down, up, layer.alpha * len(down) / layer.rank, magnitude[name])
    return out


def to_kohya(lora: Lora, base: str | None = None) -> dict[str, torch.Tensor]:
    """Tensors with the keys of kohya's scripts, AUTOMATIC1111 and ComfyUI, each layer with its alpha."""
    script, out = load_script(lora.family), {}
    config = denoiser_config(lora.family, base)
    prefixes = {part: own[0] for part, own in text_prefixes(lora.family, script).items()}
    prefixes[script.DENOISER] = "lora_unet"
    for part, layers in lora.layers.items():
        modules = {}
        for name, layer in layers.items():
            modules[name] = {
                "lora_down.weight": layer.down,
                "lora_up.weight": layer.up,
                "alpha": torch.tensor(layer.alpha),
            }
            if layer.magnitude is not None:
                modules[name]["dora_scale"] = layer.magnitude.reshape(-1, 1)
        if part == script.DENOISER:
            try:
                modules = script.kohya_layout(evened(modules), config)
            except ValueError as error:
                raise FileError(f"this LoRA can't be held by one file for other tools: {error}") from None
        for name, tensors in modules.items():
            out |= {f"{prefixes[part]}_{name.replace('.', '_')}.{kind}": t.contiguous() for kind, t in tensors.items()}
    return out


def evened(modules: dict[str, dict]) -> dict[str, dict]:
    """Layers that are fused in pairs or more must have one alpha / rank; where they differ, it goes into the matrices."""
    scales = {round(float(t["alpha"]) / len(t["lora_down.weight"]), 9) for t in modules.values()}
    if len(scales) == 1:
        return modules
    out = {}
    for name, t in modules.items():
        rank = len(t["lora_down.weight"])
        out[name] = t | {
            "lora_up.weight": t["lora_up.weight"] * (t["alpha"] / rank),
            "alpha": torch.tensor(float(rank)),
        }
    return out


def write_diffusers(lora: Lora, file: Path) -> None:
    """Writes a file that `load_lora_weights` reads, with rank and alpha of every layer in its metadata."""
    import diffusers
    from peft import LoraConfig

    script = load_script(lora.family)
    arguments = {}
    for part, layers in lora.layers.items():
        state = {}
        for name, layer in layers.items():
            state |= {f"{name}.lora_A.weight": layer.down, f"{name}.lora_B.weight": layer.up}
            if layer.magnitude is not None:
                shape = (1, -1, 1, 1) if layer.down.dim() == 4 else (-1,)  # as peft has it for convolutions
                state[f"{name}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
        state = {key: value.contiguous() for key, value in state.items()}
        plain = {n.removeprefix("text_model."): x for n, x in layers.items()}  # a level that only some classes have
        ranks, alphas = ({n: getattr(x, k) for n, x in plain.items()} for k in ("rank", "alpha"))
        common = {k: max(set(v.values()), key=list(v.values()).count) for k, v in (("r", ranks), ("alpha", alphas))}
        config = LoraConfig(
            r=common["r"],
            lora_alpha=common["alpha"],
            rank_pattern={n: r for n, r in ranks.items() if r != common["r"]},
            alpha_pattern={n: a for n, a in alphas.items() if a != common["alpha"]},
            target_modules=sorted(plain),
            use_dora=any(x.magnitude is not None for x in layers.values()),
        ).to_dict()
        if part.startswith("text_encoder") and part not in {p[1] for p in script.TEXT_ENCODERS.values()}:
            raise FileError(f"diffusers has no place for a LoRA of {part} in {lora.family}")
        if part != script.DENOISER and f"{part}_lora_layers" not in known_parts(lora.family):
            raise FileError(f"diffusers' files for {lora.family} have no place for a LoRA of {part}")
        arguments[f"{part}_lora_layers"] = script.to_diffusers_keys(state) if part == script.DENOISER else state
        arguments[f"{part}_lora_adapter_metadata"] = {
            k: sorted(v) if isinstance(v, set) else v for k, v in config.items()
        }
    pipeline = getattr(diffusers, script.PIPELINE_CLASS)
    pipeline.save_lora_weights(file.parent, weight_name=file.name, safe_serialization=True, **arguments)


def known_parts(family: str) -> set[str]:
    """The arguments of the family's `save_lora_weights`."""
    import inspect

    import diffusers

    kind = getattr(diffusers, load_script(family).PIPELINE_CLASS)
    return set(inspect.signature(kind.save_lora_weights).parameters)
