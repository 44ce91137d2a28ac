"""The difference of two checkpoints as a LoRA, layer by layer by singular value decomposition."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from lora_training.base_model.family_detection import tensor_types
from lora_training.base_model.original_layout import DENOISER_PREFIX, TEXT_PREFIXES, VAE_PREFIXES
from lora_training.console import progress
from lora_training.errors import UserError
from lora_training.lora.base_layers import BaseLayers, candidate_bases
from lora_training.lora.conversion import TOOLS, check_target, rank_range
from lora_training.lora.low_rank import LoraLayer, LycorisLayer
from lora_training.lora.merging import DTYPES, family_of_base
from lora_training.lora.reading import Lora
from lora_training.lora.resizing import Resizer, check_size
from lora_training.lora.single_file import BaseWeights, denoiser_places
from lora_training.lora.writing import check_diffusers_part, write_lora


def extract_lora_file(
    base: Path,
    tuned: Path,
    target: Path,
    rank: int | None,
    energy_share: float | None,
    spelling: str,
    dtype: str,
    family: str | None = None,
    shape: str | None = None,
) -> list[str]:
    """Writes what `tuned` has learned over `base` as a LoRA. Returns lines that say what was written.

    base, tuned: diffusers folders or .safetensors files. rank, energy_share: as `resize_layer` takes them;
    one of them is needed. spelling: "kohya" or "diffusers". dtype: a key of DTYPES. family: None to find it
    out. shape: a diffusers folder, for single files of another shape than the released models. Errors:
    UserError.
    """
    check_size(rank, energy_share)
    check_target(target)
    if target.exists():
        raise UserError(f"{target} is there already: name another target")
    family = family_of_pair(base, tuned, family)
    layers = base_of_checkpoint(base if base.is_dir() else tuned, family, shape)
    name = base.resolve().name
    metadata = {"ss_sd_model_name": name, "ss_base_model": name}
    lora = Lora(family, {}, metadata, spelling == "kohya", layers)
    extraction = Extraction(lora, base, tuned, rank, energy_share, DTYPES[dtype])
    extraction.run()
    write_lora(lora, target, spelling, None)
    size = target.stat().st_size / 1e6
    return [
        *extraction.describe(),
        f"{target}: {family} LoRA of rank {rank_range(lora)}, {size:.1f} MB, for {TOOLS[spelling]}",
    ]


def family_of_pair(base: Path, tuned: Path, family: str | None) -> str:
    """The family of both checkpoints. Errors: UserError if they have none, or two."""
    for checkpoint in (base, tuned):
        if checkpoint.suffix == ".ckpt":
            advice = "scripts/bases/unpack_checkpoint.py makes a folder of it"
            raise UserError(f"{checkpoint}: a .ckpt file can't be read layer by layer; {advice}")
    families = [family_of_base(checkpoint, family) for checkpoint in (base, tuned)]
    if families[0] != families[1]:
        raise UserError(f"{base} is {families[0]}, {tuned} is {families[1]}: two of one family are needed")
    return families[0]


def base_of_checkpoint(checkpoint: Path, family: str, shape: str | None) -> BaseLayers:
    """The layers of a folder, or of a single file as the released models have them, or the folder `shape`.

    Errors: UserError for a file of another shape.
    """
    for layers in candidate_bases(family, str(checkpoint) if checkpoint.is_dir() else shape):
        if checkpoint.is_dir() or fits(layers, checkpoint):
            return layers
    advice = "--shape FOLDER names a diffusers folder of its shape"
    raise UserError(f"{checkpoint}: not of the shape of {layers.title}; {advice}")


def fits(layers: BaseLayers, checkpoint: Path) -> bool:
    """Whether a single file's denoiser has most of these layers, and none in another size.

    Stable Diffusion 3 medium hasn't all of 3.5's, FLUX.1-schnell not all of dev's.
    """
    shapes = {
        key.removeprefix(DENOISER_PREFIX): shape for key, (_, shape) in tensor_types(checkpoint).items()
    }
    places = denoiser_places(layers.family.name, layers.config)
    sizes = {
        f"{place.name}.weight": place.height * math.prod(layers.shapes[layers.family.denoiser, name][1:])
        for name, place in places.items()
    }
    present = {key: size for key, size in sizes.items() if key in shapes}
    return len(present) > len(sizes) / 2 and all(math.prod(shapes[k]) == n for k, n in present.items())


class Extraction:
    """Goes through the layers of two checkpoints, and adds up by part what a LoRA of them loses."""

    def __init__(
        self,
        lora: Lora,
        base: Path,
        tuned: Path,
        rank: int | None,
        energy_share: float | None,
        dtype: torch.dtype,
    ) -> None:
        """lora: gets the layers that differ."""
        self.lora, self.layers = lora, lora.base
        self.base, self.tuned = (BaseWeights(p, lora.family, lora.base.config) for p in (base, tuned))
        parts = dict.fromkeys(part for part, _ in self.layers.shapes)
        self.resizers = {part: Resizer(rank, energy_share, None, dtype) for part in parts}
        self.others: dict[str, list[float]] = {}  # {part: squared changes of tensors that are no layer's}
        self.missing: list[str] = []  # layers that one of the two hasn't

    def run(self) -> None:
        """Fills the LoRA. Errors: UserError if nothing differs, or a weight can't be compared."""
        for part, resizer in self.resizers.items():
            groups = self.groups(part)
            with progress(part, len(groups)) as bar:
                for names in groups:
                    bar.update()
                    self.extract(part, names, resizer)
        self.compare_others()
        if not self.lora.layers:
            raise UserError(
                f"no layer of {self.tuned.base} differs from {self.base.base}: nothing to extract"
            )

    def groups(self, part: str) -> list[list[str]]:
        """The layers of a part; those that the LoRA's file holds as one, together."""
        names = [name for owner, name in self.layers.shapes if owner == part]
        if part != self.layers.family.denoiser or not self.lora.is_foreign:
            return [[name] for name in names]
        return list(self.layers.fused.values())

    def extract(self, part: str, names: list[str], resizer: Resizer) -> None:
        """Puts the LoRA of a layer, or of the layers of a group, into the whole one."""
        deltas = {name: self.change(part, name) for name in names}
        deltas = {name: delta for name, delta in deltas.items() if delta is not None}
        if not deltas:
            return
        if not self.lora.is_foreign:
            check_diffusers_part(part, {}, self.lora)
        layers = self.lora.layers.setdefault(part, {})
        if len(deltas) == 1:
            ((name, delta),) = deltas.items()
            diff = LycorisLayer({"diff": delta}, None, tuple(delta.shape))
            layers[name] = resizer.resize(diff, part, name)
            return
        places = {name: self.layers.places[name] for name in names}
        whole = torch.zeros(places[names[0]].height, next(iter(deltas.values())).shape[1])
        for name, delta in deltas.items():
            places[name].write(whole, delta)
        small = resizer.resize(LycorisLayer({"diff": whole}, None, tuple(whole.shape)), part, names[0])
        for name in deltas:
            layers[name] = LoraLayer(small.down, places[name].read(small.up), small.alpha)

    def change(self, part: str, name: str) -> torch.Tensor | None:
        """What a layer's weight has changed by, float32; None where it is the same, but for its precision."""
        before, after = (find_weight(weights, part, name) for weights in (self.base, self.tuned))
        if before is None or after is None:
            if before is not after:
                self.missing.append(f"{part}.{name}")
            return None
        shape = self.layers.shapes[part, name]
        if before.numel() != after.numel() or before.numel() != math.prod(shape):
            sizes = f"{tuple(before.shape)} in {self.base.base}, {tuple(after.shape)} in {self.tuned.base}"
            raise UserError(f"{part}.{name} is {sizes}")
        return difference(before.reshape(shape), after.reshape(shape), f"{part}.{name}")

    def compare_others(self) -> None:
        """Adds up what differs beside the layers: normalisations, biases, embeddings, the VAE."""
        if self.base.is_folder != self.tuned.is_folder:
            return
        keys = self.base.files.keys() & self.tuned.files.keys()
        for key in sorted(keys - self.base.layer_keys - self.tuned.layer_keys):
            (first, name), (second, _) = self.base.files[key], self.tuned.files[key]
            before, after = first.get_tensor(name), second.get_tensor(name)
            if not after.is_floating_point() or before.shape != after.shape:
                continue
            delta = difference(before, after, key)
            if delta is not None:
                squared_change = delta.double().square().sum().item()
                self.others.setdefault(self.part_of(key), []).append(squared_change)

    def part_of(self, key: str) -> str:
        """The part that a tensor of the base belongs to."""
        if self.base.is_folder:
            return key.partition(".")[0]
        family = self.lora.family
        prefixes = TEXT_PREFIXES[family] | {"vae": VAE_PREFIXES[family], "model_ema": "model_ema."}
        return next(
            (p for p, prefix in prefixes.items() if key.startswith(prefix)), self.layers.family.denoiser
        )

    def describe(self) -> list[str]:
        """Lines about what is lost, by part and in all."""
        lines, error, norm = [], 0.0, 0.0
        for part, resizer in self.resizers.items():
            others = self.others.pop(part, [])
            part_error, part_norm = (x + sum(others) for x in (resizer.squared_error, resizer.squared_norm))
            count = len(self.lora.layers.get(part, {}))
            if part_norm == 0:
                lines.append(f"{part}: no layer differs")
                continue
            line = f"{part}: {count} layers differ, {share(part_error, part_norm):.2%} of the change is lost"
            if others:
                kinds = "normalisations, biases and other tensors that no LoRA holds"
                line += f", {share(sum(others), part_norm):.2%} by {len(others)} {kinds}"
            lines.append(line)
            error, norm = error + part_error, norm + part_norm
        lines.append(f"in all: {share(error, norm):.2%} of the change is lost")
        for part, others in self.others.items():
            lines.append(f"note: {len(others)} tensors of the {part} differ, too; no LoRA holds them")
        if self.missing:
            count = f"{len(self.missing)} layers, such as {self.missing[0]},"
            lines.append(f"note: {count} are not in both checkpoints, and left as they are")
        if self.base.is_folder != self.tuned.is_folder:
            lines.append("note: normalisations and biases of a folder and a file were not compared")
        return lines


def find_weight(weights: BaseWeights, part: str, name: str) -> torch.Tensor | None:
    """A layer's weight; None for a part that a single file hasn't, or a layer of T5's other kind."""
    try:
        return weights(part, name)
    except UserError:
        return None


def difference(before: torch.Tensor, after: torch.Tensor, name: str) -> torch.Tensor | None:
    """after - before in float32; None if one is the other, rounded.

    Errors: UserError for NaN or whole numbers.
    """
    for weight in (before, after):
        if not weight.is_floating_point():
            raise UserError(f"{name}: its weights are {weight.dtype}, as of a quantised model: not compared")
    first, second = before.float(), after.float()
    if not torch.isfinite(first).all() or not torch.isfinite(second).all():
        raise UserError(f"{name} has weights that are not finite")
    rounded = before.to(after.dtype).float(), after.to(before.dtype).float()
    same = torch.equal(rounded[0], second) or torch.equal(rounded[1], first)
    return None if same else second - first


def share(squared_part: float, squared_whole: float) -> float:
    """The length of a part, as a share of the whole's."""
    return (squared_part / squared_whole) ** 0.5 if squared_whole else 0.0
