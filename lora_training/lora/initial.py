"""--init_lora: a training that starts from the LoRA of an earlier one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from lora_training.adapter_names import LORA_TYPES
from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.lora.conversion import convert_lora_file
from lora_training.lora.even_ranks import equalize_ranks
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
    settings = lora_settings(start, metadata, args.family, file)
    if settings["rank"] is None:
        stated = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        try:
            rank, scale, changed = equalize_ranks(start, stated)
        except UserError as error:
            raise UserError(f"--init_lora {file}: {error}") from None
        settings |= {"rank": rank, "lora_alpha": scale * (rank**0.5 if args.use_rslora else rank)}
        print_status(f"{changed} layers of {file} get rank {rank} and alpha {settings['lora_alpha']:g}")
    apply_settings(args, settings, file)
    kind = LORA_TYPES[args.lora_type]
    print_status(f"starting from {file}: {kind}, rank {args.rank}, alpha {args.lora_alpha:g}")
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
) -> dict[str, object]:
    """{flag: value} of a file's training; rank and alpha are None if a plain LoRA has several.

    Errors: UserError for damaged metadata, and for another kind with several.
    """
    denoiser = family.denoiser
    try:
        settings = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        kind = settings.get(f"{denoiser}.peft_type", "LORA").lower()
        matrices = (item for state in start.values() for item in state.items())
        ranks = {len(value) for key, value in matrices if ".lora_A." in key}
        ranks |= {settings.get(f"{part}.r", 0) for part in start if kind != "lora"}
        alpha_name = "lora_alpha" if kind == "lora" else "alpha"
        usual_alpha = max(ranks, default=0)
        alphas = {float(settings.get(f"{part}.{alpha_name}", usual_alpha)) for part in start}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--init_lora {file}: its metadata is damaged: {one_line(error)}") from None
    if kind not in LORA_TYPES:
        raise UserError(f"--init_lora {file}: {kind} is none of {', '.join(LORA_TYPES.values())}")
    patterns = [f"{part}.{name}" for part in start for name in ("rank_pattern", "alpha_pattern")]
    has_several = len(ranks) != 1 or len(alphas) != 1 or any(settings.get(pattern) for pattern in patterns)
    if has_several and kind != "lora":
        advice = "scripts/lora/resize_lora.py makes a plain LoRA of it"
        raise UserError(f"--init_lora {file}: layers of several ranks or alphas; {advice}")
    flags = {
        "rank": None if has_several else ranks.pop(),
        "lora_alpha": None if has_several else alphas.pop(),
        "use_dora": any("magnitude" in key for key in start[denoiser]),
        "lora_type": kind,
        "lokr_factor": settings.get(f"{denoiser}.decompose_factor", -1),
    }
    if kind != "lora":
        flags |= {"lora_dropout": 0.0, "loraplus_lr_ratio": 1.0, "merge_lora": False}
    return flags


def apply_settings(args: argparse.Namespace, flags: dict[str, object], file: Path) -> None:
    """Sets flags to a file's values. Errors: UserError if the command line says another."""
    for name, value in flags.items():
        if args.settings[name] not in (args.defaults[name], value):
            advice = f"--init_lora {file} has {value}; leave the flag out"
            raise UserError(f"--{name} {args.settings[name]}: {advice}")
    vars(args).update(flags)
