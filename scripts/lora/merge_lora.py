"""Merges LoRAs into a base: the result draws what base and LoRAs draw together, and needs neither peft nor the files.

    python scripts/lora/merge_lora.py BASE_FOLDER merged --lora output/mine 0.8 --lora other.safetensors
    python scripts/lora/merge_lora.py BASE_FOLDER merged.safetensors --lora output/mine        one file, for ComfyUI and the like
    python scripts/lora/merge_lora.py base.ckpt merged.safetensors --lora output/mine      or a .safetensors base

The weight after a LoRA is its scale (1). LoRAs may be of any spelling, with text encoders; DoRA, LoHa and LoKr too. A folder is
diffusers' own layout, file by file as it was; a .safetensors file has the original checkpoint's names. Sums are made in
float32 and stored in the base's precision, or in --dtype. A LoRA or base with NaN is refused.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.lora.parts.lora_files import Lora, read_lora
from scripts.lora.parts.low_rank import FileError, Layer, Product, doras_weight
from scripts.lora.parts.original_layout import DENOISER_PREFIX, TEXT_PREFIXES, denoiser_places, single_file, text_place
from scripts.parts.base_family import detect, pickled_tensors
from scripts.parts.netted import netted
from scripts.parts.released_models import denoiser_config
from scripts.parts.training_scripts import SCRIPTS, load_script

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Merger:
    """LoRAs with their scales, put into the weights as these come by; counts what it has used."""

    def __init__(self, loras: list[tuple[Lora, float]], dtype: torch.dtype | None) -> None:
        self.loras, self.dtype = loras, dtype
        self.left = {(k, part, name) for k, (lora, _) in enumerate(loras) for part, name, _ in lora}

    def layers(self, part: str, name: str) -> list[tuple[Layer | Product, float]]:
        """The LoRAs of one layer."""
        found = []
        for k, (lora, scale) in enumerate(self.loras):
            layer = lora.layers.get(part, {}).get(name)
            if layer is not None:
                found.append((layer, scale))
                self.left.discard((k, part, name))
        return found

    def merge(self, part: str, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of one layer with every LoRA in it, in the weight's own precision."""
        out = weight
        if not weight.is_floating_point():
            raise FileError(f"{part}.{name}: the base's weights are {weight.dtype}, to which nothing can be added")
        for layer, scale in self.layers(part, name):
            if layer.shape[0] != weight.shape[0] or math.prod(layer.shape) != weight.numel():
                raise FileError(f"{part}.{name} is {tuple(weight.shape)} in the base, and another size in the LoRA")
            out = doras_weight(out, scale * layer.update(), layer)
        if not torch.isfinite(out).all():
            raise FileError(f"{part}.{name}: the base's weight is not finite")
        return out.to(weight.dtype)

    def stored(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors in --dtype, ready for a file."""
        return {k: v.to(self.dtype or v.dtype).contiguous() if v.is_floating_point() else v for k, v in tensors.items()}

    def finish(self) -> None:
        """Errors if a layer of a LoRA had no place in the base."""
        if self.left:
            _, part, name = sorted(self.left)[0]
            raise FileError(f"{len(self.left)} layers of the LoRAs are not in the base, such as {part}.{name}")


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a base's file. Errors: FileError that names it."""
    try:
        return load_file(file) if file.suffix == ".safetensors" else pickled_tensors(file)
    except Exception as error:  # torch has many kinds for a damaged .ckpt, or one that holds more than tensors
        raise FileError(f"{file}: damaged ({' '.join(str(error).split())[:200]})") from None


def merged_part(part: str, merger: Merger, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of one weight file of a diffusers part, merged."""
    tensors = read_weights(file)
    if merger.dtype:  # sums in the target's precision, not rounded to the base's in between
        tensors = merger.stored(tensors)
    for key, value in tensors.items():
        if not key.endswith(".weight") or value.dim() < 2:
            continue
        name = key.removesuffix(".weight")
        if part.startswith("text_encoder") and name.startswith("encoder.layers."):
            name = f"text_model.{name}"
        tensors[key] = merger.merge(part, name, value)
    return tensors


def merge_folder(base: Path, target: Path, merger: Merger, parts: set[str]) -> None:
    """A diffusers folder with the LoRAs in it; what no LoRA touches is copied."""
    try:
        shutil.copytree(base, target)
    except shutil.Error as error:  # a list of all files that can't be read
        file, _, why = error.args[0][0]
        raise FileError(f"{file}: {why}") from None
    for part in sorted(p.name for p in base.iterdir() if p.is_dir()):
        files = sorted((target / part).glob("*.safetensors"))
        if part not in parts and not merger.dtype:
            continue
        if part in parts and not files:
            raise FileError(f"{base / part}: no .safetensors weights")
        for file in files:
            tensors = merger.stored(merged_part(part, merger, base / part / file.name))
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata()
            save_file(tensors, file, metadata=metadata)


def merge_single(base: Path, family: str, shape: str | None, merger: Merger) -> dict[str, torch.Tensor]:
    """The tensors of a single-file checkpoint with the LoRAs in it."""
    tensors = read_weights(base)
    if base.suffix == ".ckpt":  # a .safetensors file holds no two tensors in one piece of memory
        tensors = {name: value.clone() for name, value in tensors.items()}
    if merger.dtype:
        tensors = merger.stored(tensors)
    prefix = DENOISER_PREFIX if any(k.startswith(DENOISER_PREFIX) for k in tensors) else ""
    part = load_script(family).DENOISER
    for name, place in denoiser_places(family, denoiser_config(family, shape)).items():
        key = f"{prefix}{place.name}.weight"
        if key not in tensors or not merger.layers(part, name):
            continue
        own = torch.empty_like(tensors[key][place.rows])
        own[place.order] = tensors[key][place.rows]
        tensors[key][place.rows] = merger.merge(part, name, own)[place.order]
    for text, start in TEXT_PREFIXES[family].items():
        names = {name for lora, _ in merger.loras for name in lora.layers.get(text, {})}
        for name in sorted(names):
            key, third = text_place(start, name)
            if key in tensors:
                own = tensors[key] if third is None else tensors[key].chunk(3)[third]  # a view
                own[:] = merger.merge(text, name, own)
    return tensors


def read_loras(args: argparse.Namespace, family: str, shape: str | None) -> list[tuple[Lora, float]]:
    """The LoRAs with their scales. Errors: FileError for a wrong number, or weights that are not finite."""
    loras = []
    for words in args.lora:
        if len(words) > 2:
            raise FileError(f"--lora takes a file and a scale, not {' '.join(words)}")
        try:
            scale = float(words[1]) if len(words) > 1 else 1.0
        except ValueError:
            raise FileError(f"--lora {words[0]} {words[1]}: the scale is not a number") from None
        if not math.isfinite(scale):
            raise FileError(f"--lora {words[0]} {words[1]}: the scale is not finite")
        lora = read_lora(words[0], family, shape)
        lora.check_finite()
        loras.append((lora, scale))
    return loras


def base_family(base: Path, named: str | None) -> str:
    """The family of a base folder or file; `named` on the command line wins. Errors: FileError for what is no base."""
    if not base.exists():
        raise FileError(f"{base}: no such file or folder")
    if base.is_dir() and not (base / "model_index.json").is_file():
        raise FileError(f"{base}: no model_index.json in this folder")
    if base.is_file() and base.suffix not in (".safetensors", ".ckpt"):
        raise FileError(f"{base}: only .safetensors and .ckpt files are read; others can run code when they are opened")
    try:
        family = detect(str(base))
    except Exception as error:  # damaged, or a .ckpt that holds more than tensors, which is not opened: many kinds
        raise FileError(f"{base}: no base, or damaged ({' '.join(str(error).split())[:200]})") from None
    family = named or family
    if family is None:
        raise FileError(f"{base}: not a base of Stable Diffusion 1.x/2.x, SDXL, SD3 or FLUX.1")
    return family


def merge(args: argparse.Namespace) -> None:
    """Merges as the command line says; the target appears only when it is whole."""
    base, target = args.base, args.target
    to_file = target.suffix == ".safetensors"
    if target.exists():
        raise FileError(f"{target} is there already: name another target")
    if base.is_file() and not to_file:
        raise FileError(f"{target}: a single-file base is merged into a single file: end the target with .safetensors")
    family = base_family(base, args.family)
    shape = str(base) if base.is_dir() else args.shape
    merger = Merger(read_loras(args, family, shape), DTYPES.get(args.dtype))
    parts = {part for lora, _ in merger.loras for part in lora.layers}
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if base.is_dir():
            merge_folder(base, part, merger, parts)
            merger.finish()
            if to_file:
                tensors = single_file(family, part)
                shutil.rmtree(part)
                save_file(tensors, part, metadata={"format": "pt"})
        else:
            tensors = merge_single(base, family, shape, merger)
            merger.finish()
            save_file(merger.stored(tensors), part, metadata={"format": "pt"})
        os.replace(part, target)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


@netted
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Merges LoRAs into a base.")
    parser.add_argument("base", type=Path, help="diffusers folder, or a .safetensors or .ckpt checkpoint")
    parser.add_argument("target", type=Path, help="folder to write, or a .safetensors file")
    parser.add_argument(
        "--lora", nargs="+", action="append", required=True, metavar=("FILE", "SCALE"), help="again for each"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="precision of the result (default: the base's)")
    parser.add_argument("--family", choices=sorted(SCRIPTS), help="default: found out from the base")
    parser.add_argument(
        "--shape", help="for a single file of another shape than the released model: a diffusers folder of it"
    )
    args = parser.parse_args(argv)
    try:
        merge(args)
    except (FileError, ValueError, OSError) as error:
        print(f"merge_lora.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.target}: {args.base} with {', '.join(' x '.join(words) for words in args.lora)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
