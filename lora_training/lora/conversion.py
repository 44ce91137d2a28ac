"""LoRA files and token embeddings, from one tool's spelling to another's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

from lora_training.errors import UserError
from lora_training.files import atomic_write
from lora_training.lora.reading import Lora, read_lora, read_lora_tensors
from lora_training.lora.resizing import check_size, resize_lora
from lora_training.lora.single_file import BaseWeights
from lora_training.lora.writing import write_lora

TOOLS = {"kohya": "ComfyUI, AUTOMATIC1111 and kohya's scripts", "diffusers": "diffusers"}
EMBEDDING_KEYS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}  # diffusers': ComfyUI's
EMBEDDING_KEY_A1111 = "emb_params"


def convert_lora_file(
    source: Path,
    target: Path,
    spelling: str | None = None,
    family: str | None = None,
    base: str | None = None,
    rank: int = 64,
) -> list[str]:
    """Converts a LoRA file or a file of token embeddings. Returns lines that say what was written.

    spelling: "kohya" or "diffusers"; None for that which the source has not. family: None to find it out.
    base: a diffusers folder or a single file, for another shape than the released models', and for DoRA's
    norms. rank: of what was LoHa, LoKr or a full difference. Errors: UserError.
    """
    check_target(target)
    if is_embedding_file(source):
        return [convert_embeddings(source, target, spelling)]
    lora = read_lora(source, family, config_folder(base))
    spelling = spelling or ("diffusers" if lora.is_foreign else "kohya")
    weights = open_base_weights(lora, base)
    lines = list(lora.notes)
    if set(lora.kinds) - {"LoRA", "DoRA"}:
        kinds = " and ".join(lora.kinds)
        lora, lost_share = resize_lora(lora, rank=rank, base_weights=weights, only_unfit=True)
        lines.append(f"{kinds} became LoRA of rank {rank}: {lost_share:.2%} of the update is lost (--rank)")
    write_lora(lora, target, spelling, weights)
    count = sum(len(layers) for layers in lora.layers.values())
    kinds, parts = " and ".join(lora.kinds), ", ".join(lora.layers)
    lines.append(f"{target}: {lora.family} {kinds}, {count} layers of {parts}, for {TOOLS[spelling]}")
    return lines


def resize_lora_file(
    source: Path,
    target: Path,
    rank: int | None,
    energy_share: float | None,
    spelling: str | None,
    family: str | None,
    base: str | None,
) -> list[str]:
    """Writes a LoRA file at another rank, as plain LoRA. Returns lines that say what was written.

    rank, energy_share: as `resize_layer` takes them; one of them is needed. spelling: None for the source's.
    family, base: as `convert_lora_file` takes them. Errors: UserError.
    """
    check_size(rank, energy_share)
    check_target(target)
    if target.exists() and target.samefile(source):
        raise UserError(f"{target}: is the file to read; name another target")
    lora = read_lora(source, family, config_folder(base))
    lines, kinds, before = list(lora.notes), " and ".join(lora.kinds), rank_range(lora)
    spelling = spelling or ("kohya" if lora.is_foreign else "diffusers")
    weights = open_base_weights(lora, base)
    lora, lost_share = resize_lora(lora, rank, energy_share, weights, fused=spelling == "kohya")
    write_lora(lora, target, spelling, weights)
    became = f"{kinds} of rank {before} became LoRA of rank {rank_range(lora)}"
    size = target.stat().st_size / 1e6
    lines.append(f"{became}: {lost_share:.2%} of the update is lost")
    lines.append(f"{target}: {lora.family} LoRA, {size:.1f} MB, for {TOOLS[spelling]}")
    return lines


def check_target(target: Path) -> None:
    """Makes the folder that a file is written to. Errors: UserError if it isn't a .safetensors file."""
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: must end with .safetensors")
    target.parent.mkdir(parents=True, exist_ok=True)


def config_folder(base: str | None) -> str | None:
    """The folder with the configuration of a base; a single file has none."""
    return base if base and Path(base).suffix != ".safetensors" else None


def open_base_weights(lora: Lora, base: str | None) -> BaseWeights | None:
    """The weights of the base, or of that of the LoRA's training; None if neither is at hand."""
    base = base or lora.base.folder
    return BaseWeights(Path(base), lora.family, lora.base.config) if base else None


def rank_range(lora: Lora) -> str:
    """The ranks of a LoRA: "4", or "2 to 16"."""
    ranks = Counter(layer.rank for _, _, layer in lora)
    return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def is_embedding_file(path: Path) -> bool:
    """Whether a file holds token embeddings, and nothing else."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    keys = set(read_lora_tensors(path)[0])
    return bool(keys) and keys <= {*EMBEDDING_KEYS, *EMBEDDING_KEYS.values(), EMBEDDING_KEY_A1111}


def convert_embeddings(source: Path, target: Path, spelling: str | None) -> str:
    """Token embeddings with ComfyUI's keys for diffusers', or the other way.

    Returns a line about what was written. Errors: UserError for numbers that are not finite.
    """
    tensors, metadata = read_lora_tensors(source)
    for key, value in tensors.items():
        if not torch.isfinite(value.float()).all():
            raise UserError(f"{source}: {key} has numbers that are not finite")
    diffusers_keys = {comfy: key for key, comfy in EMBEDDING_KEYS.items()} | {EMBEDDING_KEY_A1111: "clip_l"}
    converted = {diffusers_keys.get(key, key): value.contiguous() for key, value in tensors.items()}
    if spelling is None:
        spelling = "diffusers" if set(tensors) - set(EMBEDDING_KEYS) else "kohya"
    if spelling == "kohya":
        converted = {EMBEDDING_KEYS[key]: value for key, value in converted.items()}
    with atomic_write(target) as part:
        save_file(converted, part, metadata=metadata | {"format": "pt"})
    tool = "ComfyUI and AUTOMATIC1111" if spelling == "kohya" else "diffusers"
    count = len(next(iter(converted.values())))
    return f"{target}: {count} tokens with the keys {', '.join(converted)}, for {tool}"
