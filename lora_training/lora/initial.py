"""--init_lora: a training that starts from the LoRA of an earlier one."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from lora_training.adapter_names import ADAPTER, LORA_TYPES
from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.lora.conversion import convert_lora_file
from lora_training.lora.layer_ranks import describe_ranks
from lora_training.lora.layer_tensors import metadata_alpha, setting_of_layer
from lora_training.tensors import read_safetensors

if TYPE_CHECKING:
    import argparse

    import torch

    from lora_training.families import Family

DIFFUSERS_PARTS = ("unet.", "transformer.", "text_encoder")  # how keys of diffusers' files begin


def read_initial_lora(args: argparse.Namespace, base: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The LoRA of --init_lora: {pipeline name: weights with peft's keys}; args get its kind, rank and alpha.

    base: the base's diffusers folder. New tokens that lie beside the file come under "embeddings". Errors:
    UserError for a file that isn't a LoRA of this family, or has another setting than the command line.
    """
    file = Path(args.init_lora)
    file = file / "pytorch_lora_weights.safetensors" if file.is_dir() else file
    weights, metadata = read_weights(file, args.family, base)
    start = split_by_part(weights, args.family)
    if args.family.denoiser not in start:
        advice = "is it a LoRA for another family?"
        raise UserError(f"--init_lora {file}: no layer of a {args.family.denoiser} in it: {advice}")
    settings, args.initial_ranks = lora_settings(start, metadata, args.family, file)
    apply_settings(args, settings, file)
    args.alpha_is_rank, described = False, f"rank {args.rank}, alpha {args.lora_alpha:g}"
    if len(set(args.initial_ranks.values())) > 1:
        described = describe_ranks(args.initial_ranks)
    print_status(f"starting from {file}: {LORA_TYPES[args.lora_type]}, {described}")
    if start.keys() - {args.family.denoiser} and not args.train_text_encoder:
        advice = "without --train_text_encoder it is left out"
        print_status(f"warning: {file} has a LoRA for the text encoder too; {advice}")
    tokens = file.with_name(f"{file.resolve().parent.name}_emb.safetensors")
    if args.train_text_encoder_ti and tokens.is_file():
        start["embeddings"] = read_safetensors(tokens)[0]
        print_status(f"new tokens start from {tokens}")
    return start


def read_weights(file: Path, family: Family, base: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(weights with diffusers' keys, metadata) of a file of any spelling. Errors: UserError."""
    try:
        weights, metadata = read_safetensors(file)
        if all(key.startswith(DIFFUSERS_PARTS) for key in weights):
            return weights, metadata
        with tempfile.TemporaryDirectory() as folder:
            converted = Path(folder) / file.name
            *notes, _ = convert_lora_file(file, converted, "diffusers", family.name, str(base))
            for note in notes:  # what was left out, or became a plain LoRA
                print_status(f"--init_lora: {note}")
            return read_safetensors(converted)
    except UserError as error:
        raise UserError(f"--init_lora: {error}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"--init_lora {file}: {one_line(error)}") from None


def split_by_part(weights: dict[str, torch.Tensor], family: Family) -> dict[str, dict[str, torch.Tensor]]:
    """Weights with diffusers' keys -> {pipeline name: weights with peft's keys}."""
    start: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in weights.items():
        part, _, name = key.partition(".")
        for peft, diffusers in family.diffusers_spelling if part == family.denoiser else ():
            name = name.replace(diffusers, peft)
        start.setdefault(part, {})[name] = value
    return start


def lora_settings(
    start: dict[str, dict[str, torch.Tensor]], metadata: dict[str, str], family: Family, file: Path
) -> tuple[dict[str, object], dict[tuple[str, str], tuple[int, float]]]:
    """({flag: value} of a file's training, {(part, layer): (rank, alpha)}).

    The flags have the pair of rank and alpha that most layers have.

    Errors: UserError for damaged metadata, and for another kind of adapter.
    """
    try:
        settings = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        kind = str(settings.get(f"{family.denoiser}.peft_type", "LORA")).lower()
        ranks = {
            (part, name.removeprefix("text_model.")): rank_and_alpha(state, part, name, settings)
            for part, state in start.items()
            for name in sorted({ADAPTER.split(key)[0] for key in state})
        }
    except UserError as error:
        raise UserError(f"--init_lora {file}: {error}") from None
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise UserError(f"--init_lora {file}: its metadata is damaged: {one_line(error)}") from None
    if kind not in LORA_TYPES:
        raise UserError(f"--init_lora {file}: {kind} is none of {', '.join(LORA_TYPES.values())}")
    (rank, alpha), _ = Counter(ranks.values()).most_common(1)[0]
    flags = {
        "rank": rank,
        "lora_alpha": alpha,
        "use_dora": any("magnitude" in key for key in start[family.denoiser]),
        "lora_type": kind,
        "lokr_factor": settings.get(f"{family.denoiser}.decompose_factor", -1),
    }
    if kind != "lora":
        flags |= {"lora_dropout": 0.0, "loraplus_lr_ratio": 1.0, "merge_lora": False}
    return flags, ranks


def rank_and_alpha(state: dict[str, torch.Tensor], part: str, name: str, settings: dict) -> tuple[int, float]:
    """(rank, alpha) of a layer, the scale being alpha / rank. state: its part's weights with peft's keys.

    Errors: UserError for an A and a B of different ranks.
    """
    if not any(key.startswith(f"{name}.lora_") for key in state):
        rank, alpha = (setting_of_layer(settings, part, key, name) for key in ("r", "alpha"))
        return int(rank), float(alpha)
    down, up = (state.get(f"{name}.lora_{letter}.weight") for letter in "AB")
    if down is None or up is None or up.shape[1] != len(down):
        raise UserError(f"{part}.{name}: its two matrices don't belong together")
    return len(down), metadata_alpha(settings, part, name, len(down))


def apply_settings(args: argparse.Namespace, flags: dict[str, object], file: Path) -> None:
    """Sets flags to a file's values. Errors: UserError if the command line says another."""
    for name, value in flags.items():
        if args.settings[name] not in (args.defaults[name], value):
            advice = f"--init_lora {file} has {value}; leave the flag out"
            raise UserError(f"--{name} {args.settings[name]}: {advice}")
    vars(args).update(flags)
