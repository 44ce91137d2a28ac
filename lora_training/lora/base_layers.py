"""The layers of a base that a LoRA may change, and which of them a key of a LoRA file means.

Names and shapes are those of a real base, from its configuration, so that nothing is taken for a layer that
isn't one.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.base_model.original_layout import OriginalPlace
from lora_training.base_model.released_models import (
    CLIP_G,
    CLIP_H,
    CLIP_L,
    T5_XXL,
    VARIANTS,
    denoiser_config,
    empty_denoiser,
)
from lora_training.errors import UserError
from lora_training.families import FAMILIES
from lora_training.files import read_json_file
from lora_training.libraries import import_model_libraries
from lora_training.lora.layer_names import T5_PARTS, diffusers_name, split_prefix, underscored
from lora_training.lora.single_file import is_layer, original_places

if TYPE_CHECKING:
    from collections.abc import Iterator

# text encoders that end with a projection
PROJECTED = (("sdxl", "text_encoder_2"), ("sd3", "text_encoder"), ("sd3", "text_encoder_2"))
# what a key means: [(layer, its place where a file holds several layers as one; None where it has its own)]
Meaning = list[tuple[str, OriginalPlace | None]]


class BaseLayers:
    """The layers of a base by part and diffusers name: shapes, places in the original, spellings."""

    def __init__(
        self, family: str, config: dict, encoders: dict[str, dict], title: str, folder: str | None
    ) -> None:
        """config: the denoiser's; encoders: the text encoders' by part; folder: None for a released model."""
        self.family, self.title, self.config, self.folder = FAMILIES[family], title, config, folder
        denoiser, part = empty_denoiser(family, config), self.family.denoiser
        layers = {name: module for name, module in denoiser.named_modules() if is_layer(module)}
        self.shapes = {(part, name): tuple(module.weight.shape) for name, module in layers.items()}
        for encoder, settings in encoders.items():
            self.shapes |= {(encoder, name): shape for name, shape in encoder_shapes(settings).items()}
            if (family, encoder) not in PROJECTED:
                self.shapes.pop((encoder, "text_projection"), None)
        self.places = original_places(self.family, denoiser)
        self.fused: dict[
            str, list[str]
        ] = {}  # {layer of the original: the layers of diffusers that it holds}
        for name, place in in_row_order(self.places):
            self.fused.setdefault(place.name, []).append(name)
        self.meanings: dict[tuple[str, str], Meaning] = {}  # by part and name with underscores
        self.add_original_names(self.places)
        if family == "sd15":  # kohya's names are diffusers' here; the checkpoint's are SDXL's
            self.add_original_names(original_places(FAMILIES["sdxl"], denoiser))
        for owner, name in self.shapes:
            short = name.removeprefix("text_model.") if owner != part else name.removesuffix(".0")
            for spelling in (name, short):
                self.meanings[owner, underscored(spelling)] = [(name, None)]

    def add_original_names(self, places: dict[str, OriginalPlace]) -> None:
        """Learns the names of the original checkpoint, and what other tools make of them."""
        part = self.family.denoiser
        for name, place in in_row_order(places):
            self.meanings.setdefault((part, underscored(place.name)), []).append((name, place))
        for original, names in self.fused.items():
            for k, name in enumerate(names if len(names) > 1 else []):
                self.meanings[part, underscored(f"{original}.{k}")] = [(name, None)]  # OMI
        if self.family.name == "flux":
            self.meanings[part, "img_in_proj"] = [("x_embedder", None)]  # OMI, too
            self.add_x_flux_names()

    def add_x_flux_names(self) -> None:
        """Learns the names of x-flux: two streams, numbered."""
        part = self.family.denoiser
        for n in range(self.config["num_layers"]):
            for number, side in enumerate(("img", "txt"), 1):
                for what in ("qkv", "proj"):
                    meaning = self.meanings[part, f"double_blocks_{n}_{side}_attn_{what}"]
                    self.meanings[part, f"double_blocks_{n}_processor_{what}_lora{number}"] = meaning
        for n in range(self.config["num_single_layers"]):
            block = f"single_blocks_{n}"
            self.meanings[part, f"{block}_processor_proj_lora"] = self.meanings[part, f"{block}_linear2"]
            linear1 = self.meanings[part, f"{block}_linear1"]
            projections = [(name, place) for name, place in linear1 if name.rsplit(".", 2)[1] == "attn"]
            height = sum(len(place.rows) for _, place in projections)
            self.meanings[part, f"{block}_processor_qkv_lora"] = [
                (name, OriginalPlace(place.name, place.rows, place.order, height))
                for name, place in projections
            ]

    def meaning(self, key: str, source: Path) -> tuple[str, Meaning]:
        """A layer's key -> (part, the layers that it means). Errors: UserError that names `source`."""
        family, denoiser = self.family.name, self.family.denoiser
        for part, prefix, name in split_prefix(key):
            if part in ("unet", "transformer") and part != denoiser:
                problem = f"a LoRA with a {part} does not fit {family}, which has a {denoiser}"
                raise UserError(f"{source}: {key}: {problem}")
            part = T5_PARTS.get(family, "") if part == "t5" else part or denoiser
            for owner in (part,) if prefix else (part, "text_encoder"):  # peft's own files don't say
                meaning = self.meanings.get((owner, underscored(diffusers_name(name, owner))))
                if meaning:
                    return owner, meaning
        advice = "--family and --base FOLDER say which base it is for"
        raise UserError(f"{source}: {key}: not a layer of {self.title}; {advice}")

    def knows(self, key: str) -> bool:
        """Whether a layer's key means a layer of this base."""
        try:
            self.meaning(key, Path())
        except UserError:
            return False
        return True


def in_row_order(places: dict[str, OriginalPlace]) -> list[tuple[str, OriginalPlace]]:
    """Layers and their places, by their first row: the parts of a fused layer from top to bottom."""
    return sorted(places.items(), key=lambda item: int(item[1].rows[0]))


def encoder_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """{layer: shape of its weight} of a text encoder with this configuration, T5's or CLIP's."""
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
    shapes = {f"text_model.encoder.layers.{i}.{n}": s for i in layers for n, s in block.items()}
    return shapes | {"text_projection": (config["projection_dim"], width)}


def candidate_bases(family: str, folder: str | None) -> Iterator[BaseLayers]:
    """The bases that a file may be for: that in the folder, or the released ones, the usual one first."""
    import_model_libraries()
    if folder is not None:
        yield local_base(family, folder)
        return
    for variant in ("", *VARIANTS[family]):
        yield released_base(family, variant)


@functools.cache
def released_base(family: str, variant: str) -> BaseLayers:
    """A released model's layers; `variant` as in VARIANTS, "" for the usual one."""
    config = denoiser_config(family, None) | (VARIANTS[family][variant] if variant else {})
    encoders = released_encoders(family, variant)
    return BaseLayers(family, config, encoders, f"the released {variant or family}", None)


def released_encoders(family: str, variant: str = "") -> dict[str, dict]:
    """The configurations of a released model's text encoders, by part."""
    encoders = {"text_encoder": CLIP_H if variant == "Stable Diffusion 2.x" else CLIP_L}
    if family in ("sdxl", "sd3"):
        encoders["text_encoder_2"] = CLIP_G
    if family in T5_PARTS:
        encoders[T5_PARTS[family]] = T5_XXL
    return encoders


@functools.cache
def local_base(family: str, folder: str) -> BaseLayers:
    """The layers of the base in a diffusers folder. Errors: UserError for a damaged one.

    A folder without text encoders, as merge_lora.py's --shape may be, is taken to have the released ones.
    """
    config, encoders = denoiser_config(family, folder), {}
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        file = Path(folder) / name / "config.json"
        if file.is_file():
            encoders[name] = read_json_file(file)
    return BaseLayers(family, config, encoders or released_encoders(family), folder, folder)
