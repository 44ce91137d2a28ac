"""Reads and writes LoRA files of every spelling that people meet; the commands of this room work on what it returns.

In memory a LoRA is a `Lora`: for each layer, by pipeline part and diffusers name, its two matrices and its alpha. Files
* of diffusers and peft: `unet.….lora.down.weight`, `transformer.….lora_A.weight`, adapter_model.safetensors;
* of kohya's scripts, AUTOMATIC1111 and ComfyUI: `lora_unet_….lora_down.weight` with `.alpha`, names of the original
  checkpoint for SDXL, SD3 and FLUX.1, projections fused as there;
* of other trainers, with the one's names in the other's dress: layer_names.py knows them.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from scripts.lora.parts.layer_names import Base, bases, families_in_order, split_key
from scripts.lora.parts.low_rank import FileError, Layer, Product, shrunk
from scripts.parts.base_family import detect
from scripts.parts.training_scripts import ROOT

PLAIN = "scripts/lora/resize_lora.py makes a plain LoRA of it"
PASSED_ON = ("modelspec.", "ss_", "sshs_")  # metadata that every file of a LoRA keeps


@dataclass
class Lora:
    """A LoRA by pipeline part ("unet", "transformer", "text_encoder", …) and layer name, and what its file said of it."""

    family: str
    layers: dict[str, dict[str, Layer | Product]]
    metadata: dict[str, str] = field(default_factory=dict)
    foreign: bool = False  # whether its file had other keys than those of diffusers or peft
    base: Base | None = None  # whose layers these are
    notes: list[str] = field(default_factory=list)  # what else was in the file

    def __iter__(self):
        return ((part, name, layer) for part, layers in self.layers.items() for name, layer in layers.items())

    @property
    def kinds(self) -> list[str]:
        """What it is made of: LoRA, DoRA, LoHa, …"""
        return sorted(
            {("DoRA" if x.magnitude is not None else "LoRA") if x.kind == "LoRA" else x.kind for _, _, x in self}
        )

    def check_finite(self) -> None:
        """Errors: FileError if a weight is NaN or infinite."""
        for part, name, layer in self:
            if not all(torch.isfinite(t.float()).all() for t in layer.tensors):
                raise FileError(f"{part}.{name} has weights that are not finite")


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


def base_of_training(path: Path, metadata: dict[str, str]) -> str | None:
    """The local folder of the base that a LoRA was trained on, as the config.yaml beside it or its metadata say; else None."""
    config = (path if path.is_dir() else path.parent) / "config.yaml"
    named = [f"assets/{metadata.get('ss_base_model', '')}"]  # the toys
    if config.is_file():
        import yaml

        try:
            settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError, RecursionError):  # damaged; the metadata may say it too
            settings = None
        named.insert(0, str(settings.get("pretrained_model_name_or_path")) if isinstance(settings, dict) else "")
    places = [folder for name in named for folder in (Path(name), ROOT / name)]
    return next((str(folder) for folder in places if (folder / "model_index.json").is_file()), None)


def read_lora(path: str | Path, family: str | None = None, base: str | None = None) -> Lora:
    """A LoRA file of any known spelling. base: a diffusers folder; without one, that of its training, or the released models.

    Every key is looked up among the base's real layers, and its shape compared. Errors: FileError for what is not a LoRA, is
    another kind of adapter, or has a layer that the base does not have.
    """
    path = Path(path)
    tensors, metadata = read_tensors(path)
    base = base or base_of_training(path, metadata)
    bundled = sorted({key.split(".")[1] for key in tensors if key.startswith("bundle_emb.")})
    raw: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith("bundle_emb."):
            layer, kind = split_key(key, path)
            if not value.is_floating_point():
                raise FileError(f"{path}: {key}: whole numbers ({value.dtype}), where weights were expected")
            value = value.float() if value.element_size() == 1 else value  # fp8, which nothing can be counted in
            raw.setdefault(layer, {})[kind] = value
    if not raw:
        raise FileError(f"{path}: no LoRA in this file")
    first_error, families = None, [family] if family else families_in_order(list(raw), metadata)
    if base and not family and (Path(base) / "model_index.json").is_file():
        families = [detect(base)]
    for candidate in families:
        for known in bases(candidate, base):
            try:
                layers = layers_of(raw, known, metadata, path)
            except FileError as error:
                first_error = first_error or error
                continue
            own = {f"{part}.{name}" for part, named in layers.items() for name in named} | set(
                layers.get(known.script.DENOISER, {})
            )
            foreign = not any(key.removeprefix("base_model.model.") in own for key in raw)
            lora = Lora(candidate, layers, metadata, foreign, known)
            if bundled:
                lora.notes.append(f"the embeddings of {', '.join(bundled)} that the file carries were left out")
            return lora
    raise first_error


def layers_of(raw: dict, base: Base, metadata: dict[str, str], path: Path) -> dict[str, dict[str, Layer | Product]]:
    """{part: {layer: its LoRA}}; fused projections are taken apart."""
    settings = adapter_settings(metadata, base.script.DENOISER, path)
    out: dict[str, dict[str, Layer | Product]] = {}
    for key, found in raw.items():
        part, meant = base.meaning(key, path)
        place, shape = meant[0][1], base.shapes[part, meant[0][0]]
        whole = (place.height if place else shape[0], *shape[1:])
        try:
            layer = as_layer(found, whole, f"{path}: {key}", base.title)
            alpha = found["alpha"].item() if "alpha" in found else None
        except (RuntimeError, IndexError, TypeError, KeyError, ValueError) as error:  # torch's own, of all kinds
            raise FileError(f"{path}: {key}: tensors that don't belong together ({error})") from None
        if layer.kind == "LoRA" and alpha is None:
            alpha = set_alpha(settings, part, meant[0][0], layer.rank)
        elif alpha is None and f"{part}.alpha" in settings:  # a LoHa or LoKr of peft
            alpha, rank = settings[f"{part}.alpha"], settings[f"{part}.r"]
            if {"lokr_w1", "lokr_w2"} <= found.keys():  # which peft scales, LyCORIS doesn't
                layer.factors["lokr_w1"] = layer.factors["lokr_w1"] * (alpha / rank)
        layer.alpha = alpha
        for name, piece in taken_apart(layer, meant, f"{path}: {key}").items():
            if name in out.get(part, {}):
                raise FileError(f"{path}: {key}: {part}.{name} is twice in this file")
            out.setdefault(part, {})[name] = piece
    return out


def adapter_settings(metadata: dict[str, str], denoiser: str, path: Path) -> dict:
    """What diffusers (`unet.r`, …) or peft's adapter_config.json say of rank and alpha."""
    try:
        settings = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        if "adapter_config" in metadata:
            settings = {f"{denoiser}.{key}": value for key, value in json.loads(metadata["adapter_config"]).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: its metadata is damaged ({error})") from None
    return settings


def set_alpha(settings: dict, part: str, name: str, rank: int) -> float:
    """Alpha of a layer as diffusers' or peft's settings say it; else its rank. With rsLoRA so that alpha / rank is the scale."""
    pattern = settings.get(f"{part}.alpha_pattern") or {}
    own = next((v for k, v in pattern.items() if name == k or name.endswith("." + k)), None)
    alpha = own if own is not None else settings.get(f"{part}.lora_alpha")
    alpha = float(rank if alpha is None else alpha)
    return alpha * rank**0.5 if settings.get(f"{part}.use_rslora") else alpha


def as_layer(found: dict, shape: tuple[int, ...], what: str, title: str) -> Layer | Product:
    """Tensors by kind -> the LoRA of a weight of this shape. Errors: FileError where it is another's."""
    factors = {k: v for k, v in found.items() if k.startswith(("hada_", "lokr_")) or k == "diff"}
    magnitude, per_input = found.get("magnitude"), False
    if "dora_scale" in found:  # (out, 1, …), or (1, in, …) as the first LyCORIS and OneTrainer's default have it
        magnitude = found["dora_scale"]
        per_input = magnitude.shape[0] != shape[0] or (
            shape[0] == 1 and magnitude.dim() > 1 and magnitude.shape[1] != 1
        )
    if magnitude is not None:
        magnitude = magnitude.flatten()
        if len(magnitude) != shape[1 if per_input else 0]:
            raise FileError(f"{what}: {len(magnitude)} magnitudes (DoRA) for a layer of {shape}")
    if factors:
        layer = Product(factors, None, shape, magnitude=magnitude, per_input=per_input)
        try:  # without numbers, which would take minutes for a large base
            nothing = {name: factor.to("meta") for name, factor in factors.items()}
            rows = Product(nothing, None, shape).update().shape[0]
        except (RuntimeError, KeyError, TypeError, IndexError) as error:
            raise FileError(f"{what}: {layer.kind} factors that don't fit a layer of {shape} ({error})") from None
    else:
        if "down" not in found or "up" not in found:
            raise FileError(f"{what}: one of its two matrices is missing")
        down, up = found["down"], found["up"]
        if "mid" in found:  # LoCon's core, (r, r, k, k): a LoRA of the same rank
            down = torch.einsum("mnkl,ni->mikl", found["mid"].float(), down.float().flatten(1)).to(down.dtype)
        if down.shape[0] != up.shape[1]:
            raise FileError(f"{what}: its matrices' ranks differ")
        rows = up.shape[0]
        if rows == shape[0] and down[0].numel() == torch.Size(shape[1:]).numel():
            down = down.reshape(-1, *shape[1:])
            up = up.reshape(*up.shape[:2], *[1] * (len(shape) - 2))
        elif rows == shape[0]:
            raise FileError(f"{what}: {down[0].numel()} columns, where {title} has {torch.Size(shape[1:]).numel()}")
        layer = Layer(down, up, 0.0, magnitude, per_input)
    if rows != shape[0]:
        raise FileError(f"{what}: {rows} rows, where {title} has {shape[0]}; --base FOLDER says which base it is for")
    return layer


def taken_apart(layer: Layer | Product, parts: list, what: str) -> dict[str, Layer | Product]:
    """The LoRA of a fused layer as LoRAs of its parts: of their own rank where the matrices show it, else all of it for each.

    A part whose rows are all zero has no LoRA, unless all are zero.
    """
    if parts[0][1] is None:
        return {parts[0][0]: layer}
    own_rows = {}
    for name, place in parts:
        own_rows[name] = torch.empty_like(place.rows)
        own_rows[name][place.order] = place.rows
    if layer.per_input and len(parts) > 1:
        raise FileError(f"{what}: a DoRA by columns on fused layers can't be taken apart")
    magnitude = dict.fromkeys(own_rows, layer.magnitude)
    if layer.magnitude is not None and not layer.per_input:
        magnitude = {name: layer.magnitude[rows] for name, rows in own_rows.items()}
    if layer.kind != "LoRA":
        return {
            name: Product(
                layer.factors, layer.alpha, (len(rows), *layer.shape[1:]), rows, magnitude[name], layer.per_input
            )
            for name, rows in own_rows.items()
        }
    ups = {name: layer.up[rows] for name, rows in own_rows.items()}
    if len(parts) == 1:
        name = parts[0][0]
        return {name: Layer(layer.down, ups[name], layer.alpha, magnitude[name], layer.per_input)}
    used = {name: up.flatten(1).any(0) for name, up in ups.items()}
    present = [name for name, columns in used.items() if columns.any()] or list(used)
    for names in (list(used), present):  # a part that never moved is zero, a part without LoRA is not there
        each, rest = divmod(layer.rank, len(names))
        slices = {name: slice(k * each, (k + 1) * each) for k, name in enumerate(names)}
        if rest == 0 and all(not (used[n][: s.start].any() or used[n][s.stop :].any()) for n, s in slices.items()):
            break
    else:  # one pair of matrices for the fused layer, or parts of other ranks
        slices = block_slices(used, present) or dict.fromkeys(present, slice(None))
    if layer.magnitude is not None:  # what has no update has a magnitude nevertheless
        slices = {name: slices.get(name, slice(0, 1)) for name in used}
    out = {}
    for name, columns in slices.items():
        down, up = layer.down[columns].clone(), ups[name][:, columns].clone()
        out[name] = Layer(down, up, layer.alpha * len(down) / layer.rank, magnitude[name])
    return out


def block_slices(used: dict[str, torch.Tensor], present: list[str]) -> dict[str, slice] | None:
    """The columns of each part of a block diagonal whose blocks differ in width; None if it isn't one."""
    out, start = {}, 0
    for name in present:
        columns = used[name].nonzero()[:, 0]
        stop = int(columns[-1]) + 1 if len(columns) else start
        if len(columns) and int(columns[0]) < start:
            return None
        out[name] = slice(start, stop)
        start = stop
    return out | {present[-1]: slice(out[present[-1]].start, len(used[present[-1]]))}


def kohya_modules(lora: Lora, norms=None) -> dict[str, Layer]:
    """{module of a file for kohya's scripts, AUTOMATIC1111 and ComfyUI: its LoRA}; fused where the original is.

    norms(part, layer): the row norms of the base's weight, for DoRA on some parts of a fused layer; None if there is no base.
    """
    base, script = lora.base, lora.base.script
    prefixes = {part: prefix for part, prefix in script.KOHYA_PREFIXES.items() if part.startswith("text_encoder")}
    prefixes |= {"sd3": {"text_encoder_3": "lora_te3"}, "flux": {"text_encoder_2": "lora_te3"}}.get(lora.family, {})
    out = {}
    for part, layers in lora.layers.items():
        other = sorted({x.kind for x in layers.values()} - {"LoRA"})
        if other:
            raise FileError(f"{other[0]} is not two matrices; {PLAIN}")
        if part != script.DENOISER:
            out |= {f"{prefixes[part]}_{name.replace('.', '_')}": layer for name, layer in layers.items()}
            continue
        for original in dict.fromkeys(base.places[name].name for name in layers):
            names = base.parts[original]
            own_norms = functools.partial(norms, part) if norms else None
            fused = put_together({n: base.places[n] for n in names}, {n: layers.get(n) for n in names}, own_norms)
            out[f"lora_unet_{original.replace('.', '_')}"] = fused
    return out


def put_together(places: dict, layers: dict[str, Layer | None], norms) -> Layer:
    """The LoRAs of layers that the original holds as one (None: a layer without LoRA) as one LoRA.

    Where the parts share their down matrix, as those that came from one fused layer do, it is there once; else the down matrices
    stand under each other, the up matrices on a block diagonal.
    """
    there = {name: layer for name, layer in layers.items() if layer is not None}
    first = next(iter(there.values()))
    if len(places) > 1 and any(layer.per_input for layer in there.values()):
        raise FileError(f"a DoRA by columns has no place in fused layers; {PLAIN}")
    scales = [layer.alpha / layer.rank for layer in there.values()]
    same = max(scales) - min(scales) <= 1e-9 * abs(scales[0])
    shared = same and all(x.down.shape == first.down.shape and torch.equal(x.down, first.down) for x in there.values())
    rank = first.rank if shared else sum(layer.rank for layer in there.values())
    dtype = first.up.dtype if same else torch.float32  # another scale goes into the matrix, which must not be rounded
    up = torch.zeros(next(iter(places.values())).height, rank, *first.up.shape[2:], dtype=dtype)
    column = 0
    for (name, layer), scale in zip(there.items(), scales, strict=True):
        place, columns = places[name], slice(None) if shared else slice(column, column + layer.rank)
        own = (layer.up if same else layer.up.float() * (scale / scales[0]))[place.order]
        up[place.rows, columns] = own.to(dtype)
        column += layer.rank
    down = first.down if shared else torch.cat([layer.down for layer in there.values()])
    magnitude = first.magnitude if first.per_input else magnitudes(places, layers, norms)
    return Layer(down, up, scales[0] * rank, magnitude, first.per_input)


def magnitudes(places: dict, layers: dict[str, Layer | None], norms) -> torch.Tensor | None:
    """DoRA's magnitudes of a layer of the original; a part without LoRA keeps the base's own row norms."""
    doras = [layer.magnitude is not None for layer in layers.values() if layer is not None]
    if not any(doras):
        return None
    if not all(doras):
        raise FileError("DoRA on some of the layers that the original holds as one, LoRA on others")
    if norms is None and None in layers.values():
        raise FileError(
            "DoRA on some of the layers that the original holds as one needs the others' norms: --base FOLDER"
        )
    dtype = next(layer.magnitude.dtype for layer in layers.values() if layer is not None)
    out = torch.empty(next(iter(places.values())).height, dtype=dtype)
    for name, layer in layers.items():
        own = norms(name) if layer is None else layer.magnitude
        out[places[name].rows] = own[places[name].order].to(dtype)
    return out


def plain_lora(
    lora: Lora, rank: int | None = None, keep: float | None = None, weights=None, only=None, fused: bool = False
) -> tuple[Lora, float]:
    """A LoRA of plain layers of another rank; for rank and keep see `shrunk`. Returns (LoRA, share of the update that is lost).

    weights(part, layer): the base's, for DoRA; only: which layers are changed (all); fused: the ranks are those of a file for
    other tools, where some layers are one.
    """
    base, out, sums = lora.base, {part: dict(layers) for part, layers in lora.layers.items()}, [0.0, 0.0]

    def small(layer: Layer | Product, part: str, name: str) -> Layer:
        weight = None
        if not all(torch.isfinite(t).all() for t in layer.tensors):
            raise FileError(f"{part}.{name} has weights that are not finite")
        if layer.magnitude is not None:
            if weights is None:
                raise FileError("DoRA changes every weight of its layers: --base BASE says which weights these are")
            weight = weights(part, name)
        made, lost, energy = shrunk(layer, rank, keep, weight)
        sums[0] += lost
        sums[1] += energy
        return made

    for part, layers in lora.layers.items():
        for name, layer in tqdm(layers.items(), part, disable=None, leave=False):
            if only is None or only(layer):
                place = base.places.get(name) if fused and part == base.script.DENOISER else None
                siblings = [n for n in base.parts[place.name] if n in layers] if place else [name]
                plain = all(layers[n].kind == "LoRA" and layers[n].magnitude is None for n in siblings)
                if len(siblings) == 1 or not plain:
                    out[part][name] = small(layer, part, name)
    for original, names in tqdm(base.parts.items() if fused else (), "fused layers", disable=None, leave=False):
        own = out.get(base.script.DENOISER, {})
        there = {name: own[name] for name in names if name in own}
        if len(there) > 1:
            places = {name: base.places[name] for name in names}
            whole = small(put_together(places, there, None), "", original)
            for name in there:
                up = torch.empty_like(whole.up[: len(places[name].rows)])
                up[places[name].order] = whole.up[places[name].rows]
                own[name] = Layer(whole.down, up, whole.alpha)
    return Lora(lora.family, out, lora.metadata, lora.foreign, base), (sums[0] / sums[1]) ** 0.5 if sums[1] else 0.0


def to_kohya(lora: Lora, norms=None) -> dict[str, torch.Tensor]:
    """Tensors with the keys of kohya's scripts, AUTOMATIC1111 and ComfyUI, each layer with its alpha."""
    out = {}
    for module, layer in kohya_modules(lora, norms).items():
        tensors = {
            "lora_down.weight": layer.down,
            "lora_up.weight": layer.up,
            "alpha": torch.tensor(float(layer.alpha)),
        }
        if layer.magnitude is not None:  # a column that ComfyUI multiplies each row by, or a row
            ones = [1] * (len(layer.shape) - 2)
            tensors["dora_scale"] = layer.magnitude.reshape(*((1, -1) if layer.per_input else (-1, 1)), *ones)
        out |= {f"{module}.{kind}": t.contiguous() for kind, t in tensors.items()}
    return out


def write_diffusers(lora: Lora, file: Path) -> None:
    """Writes a file that `load_lora_weights` reads, with rank and alpha of every layer in its metadata."""
    import diffusers
    from peft import LoraConfig

    script, arguments = lora.base.script, {}
    for part, layers in lora.layers.items():
        unfit = next((x.kind if x.kind != "LoRA" else "DoRA by columns" for x in layers.values() if is_unfit(x)), None)
        if unfit:
            raise FileError(f"diffusers has no place for {unfit}; {PLAIN}")
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
        if part != script.DENOISER and f"{part}_lora_layers" not in known_parts(script):
            raise FileError(f"diffusers' files for {lora.family} have no place for a LoRA of {part}")
        arguments[f"{part}_lora_layers"] = script.to_diffusers_keys(state) if part == script.DENOISER else state
        arguments[f"{part}_lora_adapter_metadata"] = {
            k: sorted(v) if isinstance(v, set) else v for k, v in config.items()
        }
    pipeline = getattr(diffusers, script.PIPELINE_CLASS)
    pipeline.save_lora_weights(file.parent, weight_name=file.name, safe_serialization=True, **arguments)
    tensors, metadata = read_tensors(file)  # save_lora_weights takes no other metadata than its own
    save_file(tensors, file, metadata=metadata | {k: v for k, v in lora.metadata.items() if k.startswith(PASSED_ON)})


def is_unfit(layer: Layer | Product) -> bool:
    """Whether peft has no such thing."""
    return layer.kind != "LoRA" or layer.per_input


def known_parts(script) -> set[str]:
    """The arguments of the family's `save_lora_weights`."""
    import inspect

    import diffusers

    return set(inspect.signature(getattr(diffusers, script.PIPELINE_CLASS).save_lora_weights).parameters)
