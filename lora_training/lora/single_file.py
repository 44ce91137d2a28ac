"""A base in the original checkpoint's layout: places of its layers, their weights, a folder as one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from lora_training.base_model.original_layout import (
    DENOISER_PREFIX,
    TEXT_PREFIXES,
    OriginalPlace,
    denoiser_to_original,
    text_layer_key,
    text_to_original,
    vae_to_original,
)
from lora_training.base_model.released_models import empty_denoiser
from lora_training.errors import UserError
from lora_training.families import FAMILIES
from lora_training.files import read_json_file
from lora_training.lora.kohya_layouts import kohya_layout

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.families import Family


def is_layer(module: torch.nn.Module) -> bool:
    """Whether a LoRA can stand on it."""
    return isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))


def original_places(family: Family, denoiser: torch.nn.Module) -> dict[str, OriginalPlace]:
    """{diffusers name: place} of all linear and convolution layers, by the family's kohya layout.

    The layout is shown LoRAs whose rows are numbered, so that it tells where rows go.
    """
    places, config = {}, dict(denoiser.config)
    for name, module in denoiser.named_modules():
        if not is_layer(module):
            continue
        numbered = torch.arange(1, module.weight.shape[0] + 1).float()[:, None]
        probe = {
            "lora_down.weight": torch.zeros(1, 1),
            "lora_up.weight": numbered,
            "alpha": torch.tensor(1.0),
        }
        ((original, tensors),) = kohya_layout(family, {name: probe}, config).items()
        column = tensors["lora_up.weight"].sum(1)
        rows = column.nonzero()[:, 0]
        places[name] = OriginalPlace(original, rows, column[rows].long() - 1, len(column))
    return places


def denoiser_places(family: str, config: dict) -> dict[str, OriginalPlace]:
    """{diffusers name of a layer: its place in the original denoiser}; names without DENOISER_PREFIX."""
    layout = (
        "sdxl" if family == "sd15" else family
    )  # kohya's SD 1.5 names are diffusers', a checkpoint's aren't
    return original_places(FAMILIES[layout], empty_denoiser(family, config))


def single_file(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """A diffusers folder -> the tensors of one checkpoint with denoiser, VAE and text encoders."""
    denoiser = FAMILIES[family].denoiser
    index = read_json_file(folder / "model_index.json")
    places = denoiser_places(family, read_json_file(folder / denoiser / "config.json"))
    out = denoiser_to_original(family, read_part(folder / denoiser), places)
    vae_config = read_json_file(folder / "vae" / "config.json")
    out |= vae_to_original(family, read_part(folder / "vae"), vae_config)
    for part in TEXT_PREFIXES[family]:
        if index.get(part) not in (None, [None, None]):
            out |= text_to_original(family, part, read_part(folder / part))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    marks = prediction_marks(read_json_file(scheduler) if scheduler.is_file() else {})
    return {key: value.contiguous() for key, value in out.items()} | marks


def prediction_marks(schedule: dict) -> dict[str, torch.Tensor]:
    """Empty tensors that tell other tools what a denoiser predicts, as `prediction_settings` reads them.

    schedule: the scheduler's configuration.
    """
    marks = {"v_pred": schedule.get("prediction_type") == "v_prediction"}
    marks["ztsnr"] = bool(schedule.get("rescale_betas_zero_snr"))
    return {name: torch.tensor([]) for name, is_so in marks.items() if is_so}


def part_files(folder: Path) -> list[Path]:
    """The weight files of a part's folder, without a half-precision variant that lies beside them."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if ".fp16" not in file.name] or files


def read_part(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a part's folder, from one file or several. Errors: UserError if there is none."""
    files = part_files(folder)
    if not files:
        raise UserError(f"{folder}: no .safetensors weights")
    return {key: value for file in files for key, value in load_file(file).items()}


class BaseWeights:
    """The weights of a base's layers, one by one, from a diffusers folder or a single file."""

    def __init__(self, base: Path, family: str, config: dict) -> None:
        """config: the denoiser's."""
        self.base, self.family = base, family
        self.is_folder = base.is_dir()
        self.places: dict[str, OriginalPlace] = {}
        self.files: dict[str, tuple] = {}  # {part.key or key: (opened file, key in it)}
        self.layer_keys: set[str] = set()  # of those that a layer has been read from
        if self.is_folder:
            for folder in (entry for entry in base.iterdir() if entry.is_dir()):
                for file in part_files(folder):
                    self.add_file(file, f"{folder.name}.")
        else:
            self.add_file(base, "")
            self.places = denoiser_places(family, config)

    def add_file(self, file: Path, prefix: str) -> None:
        try:
            opened = safe_open(file, "pt")
        except SafetensorError as error:
            raise UserError(f"{file}: not a safetensors file, or damaged ({error})") from None
        self.files |= {f"{prefix}{key}": (opened, key) for key in opened.keys()}  # noqa: SIM118

    def __call__(self, part: str, layer: str) -> torch.Tensor:
        """The weight of a layer. Errors: UserError if the base has none."""
        if self.is_folder:
            names = (layer, layer.removeprefix("text_model."))
            return self.tensor(part, layer, *(f"{part}.{name}.weight" for name in names))
        if layer in self.places:
            place = self.places[layer]
            keys = (f"{DENOISER_PREFIX}{place.name}.weight", f"{place.name}.weight")
            return place.read(self.tensor(part, layer, *keys))
        key, third = text_layer_key(TEXT_PREFIXES[self.family].get(part, ""), layer)
        weight = self.tensor(part, layer, key)
        return weight if third is None else weight.chunk(3)[third]

    def tensor(self, part: str, layer: str, *keys: str) -> torch.Tensor:
        """The first of these keys' tensors, which is a layer's weight. Errors: UserError if none is there."""
        for key in keys:
            if key in self.files:
                opened, name = self.files[key]
                self.layer_keys.add(key)
                return opened.get_tensor(name)
        raise UserError(f"{self.base}: no weight of {part}.{layer}")

    def row_norms(self, part: str, layer: str) -> torch.Tensor:
        """Norms of the rows of a layer's weight: the magnitudes of a DoRA that changes nothing."""
        return self(part, layer).float().flatten(1).norm(dim=1)
