"""Converts a LoRA between diffusers and the other tools (kohya's scripts, AUTOMATIC1111, ComfyUI), both ways.

    python scripts/lora/convert_lora.py output/mine/pytorch_lora_weights.safetensors mine_comfy.safetensors
    python scripts/lora/convert_lora.py downloaded.safetensors for_diffusers/pytorch_lora_weights.safetensors
    python scripts/lora/convert_lora.py output/mine/mine_emb.safetensors mine_comfy_emb.safetensors        token embeddings

Reads what kohya's scripts, OneTrainer, ai-toolkit, SimpleTuner, x-flux, peft and diffusers (of 2023, too) write, and the layout
of Black Forest Labs. Writes the spelling that the input does not have, or what --to says. Weights, ranks and alpha of every
layer survive, text encoders and DoRA too; LoHa, LoKr and full differences become plain LoRAs of the rank --rank, and how far
they are off is printed. What has no place in the other spelling is an error. --base BASE is for a base of another shape than the
released models (the toys in assets/, say), and for DoRA on a part of FLUX.1's or SD3's fused layers. Only .safetensors files
are read: others can run code when they are opened.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.lora.parts.lora_files import (
    PASSED_ON,
    Lora,
    plain_lora,
    read_lora,
    read_tensors,
    to_kohya,
    write_diffusers,
)
from scripts.lora.parts.low_rank import FileError
from scripts.lora.parts.original_layout import BaseWeights
from scripts.parts.netted import netted
from scripts.parts.training_scripts import SCRIPTS

EMBEDDING_KEYS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}  # ours: ComfyUI's
TOOLS = {"kohya": "ComfyUI, AUTOMATIC1111 and kohya's scripts", "diffusers": "diffusers"}
DEFAULT_RANK = 64


def kohya_metadata(lora: Lora, tensors: dict, name: str) -> dict[str, str]:
    """The metadata of a file for other tools: what the input had, and what modelspec 1.0.0 asks for."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].float().numpy().tobytes())
    kept = {k: v for k, v in lora.metadata.items() if k.startswith(PASSED_ON)}
    made = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": kept.get("modelspec.title", name),
        "modelspec.date": kept.get("modelspec.date", time.strftime("%Y-%m-%dT%H:%M:%S")),
        "modelspec.hash_sha256": f"0x{digest.hexdigest()}",
        "ss_network_module": "networks.lora",
        "sshs_model_hash": digest.hexdigest(),
    }
    for key, ending, size in (
        ("ss_network_dim", ".lora_down.weight", len),
        ("ss_network_alpha", ".alpha", float),
    ):
        values = {size(tensor) for name, tensor in tensors.items() if name.endswith(ending)}
        made[key] = f"{values.pop():g}" if len(values) == 1 else "Dynamic"
    versions = lora.base.script.base_versions(lora.base.config, {})
    dual = any(".attn2." in layer for _, layer, _ in lora)
    if lora.family == "sd3" and lora.base.folder is None and lora.base.config["num_layers"] == 24 and not dual:
        versions = {"modelspec.architecture": "stable-diffusion-3/lora"}  # medium and 3.5 medium have these layers
    return versions | kept | made


def embedding_keys(path: Path) -> set[str]:
    """The keys of a file of token embeddings; none if it is something else."""
    if not path.is_file() or path.suffix != ".safetensors":
        return set()
    keys = set(read_tensors(path)[0])
    return keys if keys <= {*EMBEDDING_KEYS, *EMBEDDING_KEYS.values(), "emb_params"} else set()


def convert_embedding(source: Path, target: Path, to: str | None) -> str:
    """Token embeddings with ComfyUI's keys for ours, and the other way. Returns what was written."""
    tensors, metadata = read_tensors(source)
    if bad := [key for key, value in tensors.items() if not torch.isfinite(value.float()).all()]:
        raise FileError(f"{source}: {bad[0]} has numbers that are not finite")
    back = {theirs: ours for ours, theirs in EMBEDDING_KEYS.items()} | {"emb_params": "clip_l"}
    ours = {back.get(key, key): value for key, value in tensors.items()}
    to = to or ("diffusers" if set(tensors) - set(EMBEDDING_KEYS) else "kohya")
    if to == "kohya":
        ours = {EMBEDDING_KEYS[key]: value for key, value in ours.items()}
    save_file({k: v.contiguous() for k, v in ours.items()}, target, metadata=metadata | {"format": "pt"})
    tool = "ComfyUI and AUTOMATIC1111" if to == "kohya" else "diffusers"
    return f"{target}: {len(next(iter(ours.values())))} tokens with the keys {', '.join(ours)}, for {tool}"


def shape_of(base: str | None) -> str | None:
    """The folder with the configuration of a base; a single file has none."""
    return base if base and Path(base).suffix != ".safetensors" else None


def weights_of(lora: Lora, base: str | None) -> BaseWeights | None:
    """The base's weights, where they are at hand."""
    base = base or lora.base.folder
    return BaseWeights(Path(base), lora.family, lora.base.config) if base else None


def write_lora(lora: Lora, target: Path, to: str, weights: BaseWeights | None) -> None:
    """Writes a LoRA in one of the two spellings; the target appears only when it is whole. Errors: FileError for NaN in it."""
    lora.check_finite()
    part = target.with_name(f".{target.name}")
    try:
        if to == "kohya":
            state = to_kohya(lora, weights and weights.norms)
            save_file(state, part, metadata=kohya_metadata(lora, state, target.stem))
        else:
            write_diffusers(lora, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def convert(source: Path, target: Path, to: str | None, family: str | None, base: str | None, rank: int) -> list[str]:
    """Converts a LoRA file; returns what was written, and how far it is off."""
    lora = read_lora(source, family, shape_of(base))
    to = to or ("diffusers" if lora.foreign else "kohya")
    said = list(lora.notes)
    if set(lora.kinds) - {"LoRA", "DoRA"}:
        weights = weights_of(lora, base)
        kinds = " and ".join(lora.kinds)
        lora, error = plain_lora(lora, rank=rank, weights=weights, only=lambda layer: layer.kind != "LoRA")
        said.append(f"{kinds} became LoRA of rank {rank}: {error:.2%} of the update is lost (--rank)")
    write_lora(lora, target, to, weights_of(lora, base))
    count = sum(len(layers) for layers in lora.layers.values())
    what = f"{lora.family} {' and '.join(lora.kinds)}, {count} layers of {', '.join(lora.layers)}, for {TOOLS[to]}"
    return [*said, f"{target}: {what}"]


@netted
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Converts a LoRA or token embeddings between diffusers and other tools."
    )
    parser.add_argument("source", type=Path, help="a .safetensors file, or a folder that training or peft has written")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--to", choices=["kohya", "diffusers"], help="default: the spelling that the source has not")
    parser.add_argument("--family", choices=sorted(SCRIPTS), help="default: found out from the file")
    parser.add_argument("--base", help="folder of a base of another shape than the released one, or for DoRA's norms")
    parser.add_argument(
        "--rank", type=int, default=DEFAULT_RANK, help="of what was LoHa, LoKr or a full difference (64)"
    )
    args = parser.parse_args(argv)
    try:
        if args.target.suffix != ".safetensors":
            raise FileError(f"{args.target}: must end with .safetensors")
        if args.rank < 1:
            raise FileError(f"--rank {args.rank}: must be 1 or more")
        args.target.parent.mkdir(parents=True, exist_ok=True)
        if embedding_keys(args.source):
            print(convert_embedding(args.source, args.target, args.to))
        else:
            print("\n".join(convert(args.source, args.target, args.to, args.family, args.base, args.rank)))
    except (FileError, ValueError, OSError, json.JSONDecodeError) as error:
        print(f"convert_lora.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
