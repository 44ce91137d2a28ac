"""Which layer of a base a key of a LoRA file means, in every spelling that people meet.

A key is a prefix, the name of a layer and what it holds of it: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`.
Names are those of diffusers or of the original checkpoint, with dots or with underscores; both are looked up with underscores.
The names and shapes are those of a real base, from its configuration, so that nothing is taken for a layer that isn't one.
Sources: the files of the tools, and the code with which they write them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from scripts.lora.parts.low_rank import FileError
from scripts.parts.files import read_json
from scripts.parts.released_models import CLIP_G, CLIP_H, CLIP_L, T5_XXL, VARIANTS, denoiser_config, meta_denoiser
from scripts.parts.training_scripts import SCRIPTS, load_script

ENDINGS = (  # of keys, as patterns: what they hold
    (r"\.lora_mid\.weight", "mid"),
    (r"\.(?:lora_down|lora\.down|lora_linear_layer\.down|lora_A(?:\.[\w-]+)?)\.weight|\.lora_A", "down"),
    (r"\.(?:lora_up|lora\.up|lora_linear_layer\.up|lora_B(?:\.[\w-]+)?)\.weight|\.lora_B", "up"),
    (r"\.lora_magnitude_vector(?:\.[\w-]+)?(?:\.weight)?|\.magnitude", "magnitude"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.alpha", "alpha"),
    (r"\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff)", ""),
    (r"(?<=_lora)\.down\.weight|(?<=_lora[12])\.down\.weight", "down"),  # attention processors
    (r"(?<=_lora)\.up\.weight|(?<=_lora[12])\.up\.weight", "up"),
)
REFUSED = (  # parts of keys that are no LoRA, and what they are
    ("oft_", "OFT"),
    ("boft", "BOFT"),
    ("on_input", "IA3"),
    ("lora_norm", "Lora with normalisations"),
    ("w_norm", "normalisation layers"),
    ("b_norm", "normalisation layers"),
    ("_norm.scale", "a control LoRA with normalisations"),
    ("lora_B.bias", "a control LoRA with biases"),
    (".diff_b", "a full difference with biases"),
    ("a1.weight", "GLoRA"),
    ("b1.weight", "GLoRA"),
    ("reshape_weight", "a LoRA that makes layers larger"),
)
ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
T5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}
PROJECTED = (("sdxl", "text_encoder_2"), ("sd3", "text_encoder"), ("sd3", "text_encoder_2"))  # CLIPs with a projection
PREFIXES = tuple(  # of keys, as patterns: the part
    [(rf"{part}\.", part) for part in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    + [(rf"(?:text_encoders\.{name}\.transformer|{name})\.", part) for name, part in ENCODERS.items()]
    + [(r"(?:text_encoders\.t5xxl\.transformer|t5xxl|t5)\.", "t5"), (r"lora_te3_", "t5")]
    + [(r"lora_te1?_", "text_encoder"), (r"lora_te2_", "text_encoder_2")]
    + [(r"(?:unet\.|lora_unet_(?=down_blocks|mid_block|up_blocks|input_blocks|output_blocks|middle_block))", "unet")]
    + [(r"(?:transformer\.(?=[a-z_]+[._])|lora_transformer_)", "transformer")]
    + [(r"(?:lora_unet_|lycoris_|(?:model\.)?diffusion_model\.|)", "")]
)


@dataclass
class Place:
    """Where a layer stands in a layer of a file: in its rows `rows`, in the order `order`, of `height` rows."""

    name: str
    rows: torch.Tensor
    order: torch.Tensor
    height: int


def split_key(key: str, source: Path) -> tuple[str, str]:
    """A key -> (layer, what it holds). Errors: FileError that names what is no LoRA."""
    what = next((name for part, name in REFUSED if part in key), None)
    if what is None:
        for pattern, kind in ENDINGS:
            found = re.search(f"(?:{pattern})$", key)
            if found:
                return key[: found.start()], kind or found[1]
    said = f"{what} can't be converted to a LoRA, or merged" if what else "not a key of a LoRA"
    raise FileError(f"{source}: {key}: {said}")


def original_places(script, denoiser) -> dict[str, Place]:
    """{diffusers name of a layer: its place} of all linear and convolution layers, by the training script's own layout."""
    places = {}
    for name, module in denoiser.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        # numbered, so that the layout shows where rows go
        numbered = torch.arange(1, module.weight.shape[0] + 1).float()[:, None]
        probe = {"lora_down.weight": torch.zeros(1, 1), "lora_up.weight": numbered, "alpha": torch.tensor(1.0)}
        ((original, found),) = script.kohya_layout({name: probe}, dict(denoiser.config)).items()
        column = found["lora_up.weight"].sum(1)
        rows = column.nonzero()[:, 0]
        places[name] = Place(original, rows, column[rows].long() - 1, len(column))
    return places


def encoder_shapes(config: dict) -> dict[str, tuple[int, int]]:
    """{layer: shape of its weight} of a text encoder with this configuration."""
    if "d_model" in config:
        width, inner, wide = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
        block = {f"layer.0.SelfAttention.{k}": (inner, width) for k in "qkv"}
        block |= {"layer.0.SelfAttention.o": (width, inner), "layer.1.DenseReluDense.wo": (width, wide)}
        block |= {f"layer.1.DenseReluDense.{k}": (wide, width) for k in ("wi_0", "wi_1", "wi")}
        return {f"encoder.block.{i}.{n}": s for i in range(config["num_layers"]) for n, s in block.items()}
    width, wide = config["hidden_size"], config["intermediate_size"]
    block = {f"self_attn.{k}_proj": (width, width) for k in ("q", "k", "v", "out")}
    block |= {"mlp.fc1": (wide, width), "mlp.fc2": (width, wide)}
    layers = range(config["num_hidden_layers"])
    out = {f"text_model.encoder.layers.{i}.{n}": s for i in layers for n, s in block.items()}
    return out | {"text_projection": (config["projection_dim"], width)}


class Base:
    """The layers of a base: which a name means, and their shapes. Made by `bases`."""

    def __init__(self, family: str, config: dict, encoders: dict[str, dict], title: str, folder: str | None) -> None:
        self.family, self.title, self.config, self.folder = family, title, config, folder
        self.script = script_of(family)
        denoiser = meta_denoiser(family, config)
        part = self.script.DENOISER
        self.shapes = {(part, n): tuple(m.weight.shape) for n, m in denoiser.named_modules() if is_layer(m)}
        for encoder, settings in encoders.items():
            self.shapes |= {(encoder, name): shape for name, shape in encoder_shapes(settings).items()}
            if (family, encoder) not in PROJECTED:
                self.shapes.pop((encoder, "text_projection"), None)
        self.places = original_places(self.script, denoiser)
        self.parts: dict[str, list[str]] = {}  # {layer of the original: the layers of diffusers that it holds}
        for name, place in sorted(self.places.items(), key=lambda item: int(item[1].rows[0])):
            self.parts.setdefault(place.name, []).append(name)
        layouts = [self.places]
        if family == "sd15":  # kohya's names are diffusers' here; the checkpoint's are SDXL's
            layouts.append(original_places(script_of("sdxl"), denoiser))
        self.known: dict[tuple[str, str], list[tuple[str, Place | None]]] = {}  # (part, flat name): what it holds
        for layout in layouts:
            self.know_original(part, layout)
        for owner, name in self.shapes:
            short = name.removeprefix("text_model.") if owner != part else name.removesuffix(".0")
            for spelling in (name, short):
                self.known[owner, flat(spelling)] = [(name, None)]

    def know_original(self, part: str, places: dict[str, Place]) -> None:
        """The names of the original checkpoint, and what other tools make of them."""
        for name, place in sorted(places.items(), key=lambda item: int(item[1].rows[0])):
            self.known.setdefault((part, flat(place.name)), []).append((name, place))
        for original, names in self.parts.items():
            for k, name in enumerate(names if len(names) > 1 else []):
                self.known[part, flat(f"{original}.{k}")] = [(name, None)]  # OMI
        if self.family != "flux":
            return
        self.known[part, "img_in_proj"] = [("x_embedder", None)]  # OMI, too
        for n in range(self.config["num_layers"]):  # x-flux: two streams, numbered
            for number, side in enumerate(("img", "txt"), 1):
                for what in ("qkv", "proj"):
                    own = self.known[part, f"double_blocks_{n}_{side}_attn_{what}"]
                    self.known[part, f"double_blocks_{n}_processor_{what}_lora{number}"] = own
        for n in range(self.config["num_single_layers"]):
            block = f"single_blocks_{n}"
            self.known[part, f"{block}_processor_proj_lora"] = self.known[part, f"{block}_linear2"]
            three = [p for p in self.known[part, f"{block}_linear1"] if p[0].rsplit(".", 2)[1] == "attn"]
            height = sum(len(place.rows) for _, place in three)
            self.known[part, f"{block}_processor_qkv_lora"] = [
                (name, Place(place.name, place.rows, place.order, height)) for name, place in three
            ]

    def meaning(self, key: str, source: Path) -> tuple[str, list[tuple[str, Place | None]]]:
        """A layer's key -> (part, [(layer, the rows that it has there; None: all)])."""
        bare, denoiser = re.sub(r"^(?:base_model\.model\.|module\.)+", "", key), self.script.DENOISER
        for pattern, part in PREFIXES:
            found = re.match(pattern, bare)
            if not found:
                continue
            if part in ("unet", "transformer") and part != denoiser:
                raise FileError(
                    f"{source}: {key}: a LoRA with a {part} does not fit {self.family}, which has a {denoiser}"
                )
            name = bare[found.end() :]
            part = T5.get(self.family, "") if part == "t5" else part or denoiser
            for owner in (part, "text_encoder") if found.end() == 0 else (part,):  # peft's own files don't say
                meant = self.known.get((owner, flat(plain_name(name, owner))))
                if meant is None and owner == "text_encoder_2" and self.family == "flux":
                    meant = self.known.get((T5["flux"], flat(name)))
                if meant:
                    return owner, meant
        raise FileError(
            f"{source}: {key}: not a layer of {self.title}; --family and --base FOLDER say which base it is for"
        )


def plain_name(name: str, part: str) -> str:
    """A layer's name without what diffusers' attention processors of 2023 put into it."""
    if "_blocks." in name and "lora" not in name.replace("_lora", ""):
        name = re.sub(r"\.processor\.to_(q|k|v|out)(?:_lora)?$", r".to_\1", name)
    if part.startswith("text_encoder"):
        name = re.sub(r"self_attn\.to_(q|k|v|out)(?:_lora)?$", r"self_attn.\1_proj", name)
    return name


def flat(name: str) -> str:
    return name.replace(".", "_")


def is_layer(module) -> bool:
    return isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))


@functools.cache
def script_of(family: str):
    return load_script(family)


def bases(family: str, folder: str | None):
    """The bases that a file of this family may be for: the one in the folder, or the released ones, the usual first."""
    script_of(family)  # first, because it keeps the libraries quiet
    if folder is not None:
        yield local_base(family, folder)
        return
    for name in ("", *VARIANTS[family]):
        yield released_base(family, name)


@functools.cache
def released_base(family: str, name: str) -> Base:
    changed = VARIANTS[family][name] if name else {}
    config = denoiser_config(family, None) | changed
    clip = CLIP_H if name == "Stable Diffusion 2.x" else CLIP_L
    encoders = {"text_encoder": clip}
    if family in ("sdxl", "sd3"):
        encoders["text_encoder_2"] = CLIP_G
    if family in T5:
        encoders[T5[family]] = T5_XXL
    return Base(family, config, encoders, f"the released {name or family}", None)


@functools.cache
def local_base(family: str, folder: str) -> Base:
    try:
        config, encoders = denoiser_config(family, folder), {}
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            file = Path(folder) / name / "config.json"
            if file.is_file():
                encoders[name] = read_json(file)
    except (ValueError, OSError) as error:
        raise FileError(str(error)) from None
    released = released_base(family, "")
    base = Base(family, config, encoders, folder, folder)
    for key, shape in released.shapes.items():  # a folder without text encoders, as --shape may be
        if key[0].startswith("text_encoder") and not encoders:
            base.shapes[key] = shape
    return base


def families_in_order(names: list[str], metadata: dict[str, str]) -> list[str]:
    """The families that a file may be for, the likeliest first: what its metadata says, then what its names look like."""
    said = " ".join(metadata.get(k, "") for k in ("modelspec.architecture", "ss_base_model_version")).lower()
    text = "\n".join(names)
    signs = {
        "flux": "flux" in said or re.search(r"double_blocks|single_blocks|single_transformer_blocks", text),
        "sd3": "diffusion-3" in said or "diffusion-v3" in said or re.search(r"joint_blocks|attn2?[._]add_q", text),
        "sdxl": "xl" in said
        or re.search(r"lora_te2|text_encoder_2\.|clip_g|transformer_blocks[._]1[._]|input_blocks", text),
        "sd15": "diffusion-v" in said or re.search(r"(down|up)_blocks|mid_block", text),
    }
    return sorted(SCRIPTS, key=lambda family: not signs[family])
