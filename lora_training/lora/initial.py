"""--init_lora: a training that starts from the LoRA of an earlier one."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from lora_training.console import print_status
from lora_training.errors import UserError, one_line
from lora_training.lora.adapters import LORA_TYPES
from lora_training.tensors import read_safetensors

if TYPE_CHECKING:
    import argparse


def read_initial_lora(args: argparse.Namespace, base: Path) -> dict[str, dict]:
    """--init_lora: {pipeline name: weights with peft's keys}; kind, rank, alpha and layers are set from the file.

    New tokens that lie beside it come under "embeddings". Errors: UserError for a file that isn't a LoRA of this family, or
    has layers of several ranks.
    """
    file = Path(args.init_lora)
    CONVERT = args.script.parent / "scripts" / "lora" / "convert_lora.py"
    file = file / "pytorch_lora_weights.safetensors" if file.is_dir() else file
    with tempfile.TemporaryDirectory() as folder:
        try:
            weights, metadata = read_safetensors(file)
            diffusers = ("unet.", "transformer.", "text_encoder")
            if not all(key.startswith(diffusers) for key in weights):
                if not CONVERT.is_file():
                    raise UserError(
                        f"--init_lora {file}: its keys aren't diffusers'; convert it with {CONVERT.name}"
                    )
                words = ["--to", "diffusers", "--family", args.family.name, "--base", str(base)]
                told, problem = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(told), contextlib.redirect_stderr(problem):
                    failed = runpy.run_path(str(CONVERT))["main"](
                        [str(file), f"{folder}/{file.name}", *words]
                    )
                if failed:
                    raise UserError(f"--init_lora: {problem.getvalue().strip().rpartition('error: ')[2]}")
                for line in told.getvalue().splitlines()[:-1]:  # what was left out, or became a plain LoRA
                    print_status(f"--init_lora: {line}")
                weights, metadata = read_safetensors(Path(folder) / file.name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--init_lora {file}: {one_line(error)}") from None
    start: dict[str, dict] = {}
    for key, value in weights.items():
        part, _, name = key.partition(".")
        for ours, theirs in args.family.diffusers_spelling if part == args.family.denoiser else ():
            name = name.replace(theirs, ours)
        start.setdefault(part, {})[name] = value
    if args.family.denoiser not in start:
        raise UserError(
            f"--init_lora {file}: no layer of a {args.family.denoiser} in it: is it a LoRA for another family?"
        )
    try:
        said = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        kind = said.get(f"{args.family.denoiser}.peft_type", "LORA").lower()
        ranks = {len(value) for state in start.values() for key, value in state.items() if ".lora_A." in key}
        ranks |= {said.get(f"{part}.r", 0) for part in start if kind != "lora"}
        name = f"{'lora_' * (kind == 'lora')}alpha"
        alphas = {float(said.get(f"{part}.{name}", max(ranks, default=0))) for part in start}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--init_lora {file}: its metadata is damaged: {one_line(error)}") from None
    if kind not in LORA_TYPES:
        raise UserError(f"--init_lora {file}: {kind} is none of {', '.join(LORA_TYPES.values())}")
    uneven = any(said.get(f"{part}.{name}") for part in start for name in ("rank_pattern", "alpha_pattern"))
    if len(ranks) != 1 or len(alphas) != 1 or uneven:
        raise UserError(
            f"--init_lora {file}: layers of several ranks or alphas; scripts/lora/resize_lora.py makes them equal"
        )
    found = {"rank": ranks.pop(), "lora_alpha": alphas.pop()}
    found |= {"use_dora": any("magnitude" in key for key in start[args.family.denoiser]), "lora_type": kind}
    found["lokr_factor"] = said.get(f"{args.family.denoiser}.decompose_factor", -1)
    found |= {"lora_dropout": 0.0, "loraplus_lr_ratio": 1.0, "merge_lora": False} if kind != "lora" else {}
    for name, value in found.items():
        if args.settings[name] not in (args.defaults[name], value):
            raise UserError(
                f"--{name} {args.settings[name]}: --init_lora {file} has {value}; leave the flag out"
            )
    vars(args).update(found)
    print_status(f"starting from {file}: {LORA_TYPES[kind]}, rank {args.rank}, alpha {args.lora_alpha:g}")
    if start.keys() - {args.family.denoiser} and not args.train_text_encoder:
        print_status(
            f"warning: {file} has a LoRA for the text encoder too; without --train_text_encoder it is left out"
        )
    tokens = file.with_name(f"{file.resolve().parent.name}_emb.safetensors")
    if args.train_text_encoder_ti and tokens.is_file():
        start["embeddings"] = read_safetensors(tokens)[0]
        print_status(f"new tokens start from {tokens}")
    return start
