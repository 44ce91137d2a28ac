"""The trained weights as files: LoRA, new tokens' embeddings, and the base with the LoRA merged in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from lora_training.base_model.reading import import_class
from lora_training.errors import UserError
from lora_training.files import last_checkpoint_note, output_name, staging_folder
from lora_training.lora.adapters import lora_state
from lora_training.lora.formats import (
    kohya_state,
    neighbours_norms,
    reference_free,
    text_encoder_keys,
    to_diffusers_keys,
)
from lora_training.lora.metadata import tensor_hashes
from lora_training.optim.parts import averaged_weights
from lora_training.tensors import read_safetensors
from lora_training.training.lora_metadata import lora_metadata
from lora_training.training.run import layers_of_other_rank

if TYPE_CHECKING:
    import argparse

    from lora_training.training.run import Run

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def save_weights(run: Run) -> None:
    """Writes LoRA and embeddings to the output folder."""
    dtype = torch.float32 if run.args.upcast_before_saving else run.components.dtype
    with staging_folder(Path(run.args.output_dir), "LoRA") as folder, averaged_weights(run.parts):
        write_weights(run, folder, dtype)


def write_weights(run: Run, folder: Path, dtype: torch.dtype) -> None:
    """Writes the LoRA, once with diffusers' and once with kohya's keys, and the embeddings into a folder.

    dtype: of the LoRA; embeddings are float32. Errors: UserError for weights that aren't finite.
    """
    check_finite(run)
    name = output_name(run.args.output_dir)
    if run.lora_modules:
        write_lora(run, folder, name, dtype)
    if run.token_rows:
        tables = {key: rows.weight.detach().float().cpu().clone() for key, rows in run.token_rows.items()}
        save_file(tables, folder / f"{name}_emb.safetensors", metadata={"format": "pt"})


def check_finite(run: Run) -> None:
    """Errors: UserError if weights aren't finite; they are never saved."""
    for part in run.parts:
        if not part.weights.isfinite().all():
            problem = f"the {part.name}'s weights are no longer finite, and are not saved"
            advice = "try a lower --learning_rate or weight decay, or a higher --adam_epsilon"
            checkpoint = last_checkpoint_note(Path(run.args.output_dir))
            raise UserError(f"{problem}: {advice}{checkpoint}")


def write_lora(run: Run, folder: Path, name: str, dtype: torch.dtype) -> None:
    """Writes the LoRA as diffusers' file and as NAME.safetensors, with kohya's keys."""
    args, family = run.args, run.family
    modules = run.lora_modules.items()
    states = {component: lora_state(module, run.parts) for component, module in modules}
    states, alpha, rank = reference_free(states, run.initial_states, args)
    for component, state in states.items():
        states[component] = {key: value.to(dtype) for key, value in state.items()}
    growth = rank // args.rank, alpha / args.lora_alpha  # of what `reference_free` has made
    differing = {
        component: {
            name: (own_rank * growth[0], own_alpha * growth[1])
            for name, (own_rank, own_alpha) in layers_of_other_rank(run, component).items()
        }
        for component in states
    }
    metadata = lora_metadata(run, alpha, rank, any(differing.values()))
    write_diffusers_file(run, folder / DIFFUSERS_FILE, states, alpha, rank, metadata)
    config = run.components.config(family.denoiser)
    if args.use_dora and run.dora_norms is None:  # once, since it reads the base
        denoiser_folder = run.components.folder_of(family.denoiser)
        run.dora_norms = neighbours_norms(family, denoiser_folder, states[family.denoiser], config)
    alphas = {
        component: {name: kohya_alpha(*pair, args) for name, pair in layers.items()}
        for component, layers in differing.items()
    }
    alpha, scale = kohya_alpha(rank, alpha, args)
    tensors = kohya_state(family, states, alpha, config, run.dora_norms, scale, alphas)
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / f"{name}.safetensors", metadata=metadata | tensor_hashes(tensors))


def kohya_alpha(rank: int, alpha: float, args: argparse.Namespace) -> tuple[float, float]:
    """(alpha, scale) for kohya's scripts, which divide alpha by the rank; rsLoRA divides by its root."""
    alpha *= math.sqrt(rank) if args.use_rslora else 1
    return alpha, alpha / rank


def write_diffusers_file(
    run: Run, file: Path, states: dict[str, dict], alpha: float, rank: int, metadata: dict[str, str]
) -> None:
    """Writes the LoRA as the family's pipeline does, with alpha and rank, and with `metadata`.

    states: component of the pipeline -> weights with peft's keys.
    """
    from diffusers.training_utils import _collate_lora_metadata

    args, arguments = run.args, _collate_lora_metadata(run.lora_modules)  # without it alpha is lost
    for component, state in states.items():
        if component == run.family.denoiser:
            arguments[f"{component}_lora_layers"] = to_diffusers_keys(state, run.family.diffusers_spelling)
        else:
            arguments[f"{component}_lora_layers"] = text_encoder_keys(state)
        adapter_config = arguments[f"{component}_lora_adapter_metadata"]
        if "lora_alpha" in adapter_config:
            growth = {"rank_pattern": rank // args.rank, "alpha_pattern": alpha / args.lora_alpha}
            patterns = {n: {k: v * g for k, v in adapter_config[n].items()} for n, g in growth.items()}
            adapter_config |= {"lora_alpha": alpha, "r": rank, "init_lora_weights": True} | patterns
        for key, value in adapter_config.items():
            if isinstance(value, set):  # which JSON doesn't have
                adapter_config[key] = sorted(value)
    pipeline_class = import_class("diffusers", run.family.pipeline_class)
    pipeline_class.save_lora_weights(file.parent, weight_name=file.name, **arguments)
    tensors, written = read_safetensors(file)  # the pipeline takes no other metadata than its own
    save_file(tensors, file, metadata=metadata | {"modelspec.implementation": "diffusers"} | written)


def save_merged(run: Run, folder: Path) -> None:
    """Writes the base with the LoRA merged in, as a diffusers folder."""
    components = run.components
    pipeline_class = import_class("diffusers", run.family.pipeline_class)
    pipeline = pipeline_class.from_pretrained(components.folder, dtype=components.dtype)
    pipeline.load_lora_weights(run.args.output_dir, weight_name=DIFFUSERS_FILE)
    pipeline.fuse_lora(components=list(run.lora_modules), safe_fusing=True)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(folder)
