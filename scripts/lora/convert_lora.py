"""Converts a LoRA between diffusers and the other tools (kohya's scripts, AUTOMATIC1111, ComfyUI), both ways.

    python scripts/lora/convert_lora.py output/mine/pytorch_lora_weights.safetensors mine_comfy.safetensors
    python scripts/lora/convert_lora.py downloaded.safetensors for_diffusers/pytorch_lora_weights.safetensors
    python scripts/lora/convert_lora.py output/mine/mine_emb.safetensors mine_comfy_emb.safetensors        token embeddings

The spelling that the input does not have is written, or what --to says. Weights, ranks and alpha of every layer survive, text
encoders too; what has no place in the other spelling is an error. --base FOLDER is for a base of another shape than the
released models (the toys in assets/, say). Only .safetensors files are read: others can run code when they are opened.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.lora.parts.lora_files import FileError, Lora, read_lora, read_tensors, to_kohya, write_diffusers
from scripts.parts.training_scripts import SCRIPTS, load_script

EMBEDDING_KEYS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}  # ours: ComfyUI's


def kohya_metadata(lora: Lora, tensors: dict, name: str) -> dict[str, str]:
    """The metadata of a file for other tools: what the input had, and what modelspec 1.0.0 asks for."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].float().numpy().tobytes())
    ranks = {layer.rank for _, _, layer in lora}
    alphas = {layer.alpha for _, _, layer in lora}
    kept = {k: v for k, v in lora.metadata.items() if k.startswith(("modelspec.", "ss_"))}
    made = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": load_script(lora.family).MODELSPEC_ARCHITECTURE,
        "modelspec.implementation": "diffusers",
        "modelspec.title": kept.get("modelspec.title", name),
        "modelspec.date": kept.get("modelspec.date", time.strftime("%Y-%m-%dT%H:%M:%S")),
        "modelspec.hash_sha256": f"0x{digest.hexdigest()}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "sshs_model_hash": digest.hexdigest(),
    }
    return kept | made


def is_embedding(path: Path) -> bool:
    """Whether a file holds token embeddings."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    known = {*EMBEDDING_KEYS, *EMBEDDING_KEYS.values(), "emb_params"}
    return set(read_tensors(path)[0]) <= known


def convert_embedding(source: Path, target: Path) -> str:
    """Token embeddings with ComfyUI's keys for ours, and the other way. Returns what was written."""
    tensors, metadata = read_tensors(source)
    if "t5xxl" in tensors or "emb_params" in tensors:
        back = {theirs: ours for ours, theirs in EMBEDDING_KEYS.items()} | {"emb_params": "clip_l"}
        tensors, what = {back[key]: value for key, value in tensors.items()}, "diffusers"
    else:
        tensors, what = {EMBEDDING_KEYS[key]: value for key, value in tensors.items()}, "ComfyUI and AUTOMATIC1111"
    save_file({k: v.contiguous() for k, v in tensors.items()}, target, metadata=metadata | {"format": "pt"})
    return f"{target}: {len(next(iter(tensors.values())))} tokens with the keys {', '.join(tensors)}, for {what}"


def convert(source: Path, target: Path, to: str | None, family: str | None, base: str | None) -> str:
    """Converts a LoRA file; returns what was written."""
    lora = read_lora(source, family, base)
    to = to or ("diffusers" if lora.kohya else "kohya")
    part = target.with_name(f".{target.name}")
    if to == "kohya":
        state = to_kohya(lora, base)
        save_file(state, part, metadata=kohya_metadata(lora, state, target.stem))
    else:
        write_diffusers(lora, part)
    os.replace(part, target)
    count = sum(len(layers) for layers in lora.layers.values())
    tool = "ComfyUI, AUTOMATIC1111 and kohya's scripts" if to == "kohya" else "diffusers"
    return f"{target}: {lora.family} LoRA, {count} layers of {', '.join(lora.layers)}, for {tool}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Converts a LoRA or token embeddings between diffusers and other tools."
    )
    parser.add_argument("source", type=Path, help="a .safetensors file, or a folder that training or peft has written")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    parser.add_argument("--to", choices=["kohya", "diffusers"], help="default: the spelling that the source has not")
    parser.add_argument("--family", choices=sorted(SCRIPTS), help="default: found out from the file")
    parser.add_argument("--base", help="diffusers folder of a base of another shape than the released one")
    args = parser.parse_args(argv)
    try:
        if args.target.suffix != ".safetensors":
            raise FileError(f"{args.target}: must end with .safetensors")
        args.target.parent.mkdir(parents=True, exist_ok=True)
        if is_embedding(args.source):
            print(convert_embedding(args.source, args.target))
        else:
            print(convert(args.source, args.target, args.to, args.family, args.base))
    except (FileError, ValueError, OSError, json.JSONDecodeError) as error:
        print(f"convert_lora.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
