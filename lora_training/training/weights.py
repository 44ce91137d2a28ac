"""The trained weights as files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from lora_training.base_model.reading import import_class
from lora_training.errors import UserError
from lora_training.files import last_checkpoint_note, staging_folder
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

if TYPE_CHECKING:
    from lora_training.training.run import Run


def save_weights(run: Run) -> None:
    """Writes LoRA and embeddings to the output folder."""
    with staging_folder(Path(run.args.output_dir), "LoRA") as part, averaged_weights(run.parts):
        write_weights(run, part, torch.float32 if run.args.upcast_before_saving else run.components.dtype)


def write_weights(run: Run, folder: Path, dtype) -> None:
    """Writes the LoRA (diffusers, and kohya/ComfyUI keys) and the token embeddings into a folder."""
    args, name = run.args, Path(run.args.output_dir).resolve().name
    for part in run.parts:
        if not part.weights.isfinite().all():
            advice = "a lower --learning_rate or weight decay, or a higher --adam_epsilon"
            kept = last_checkpoint_note(Path(args.output_dir))
            raise UserError(
                f"the {part.name}'s weights are no longer finite, and are not saved: try {advice}{kept}"
            )
    if run.lora_modules:
        states = {part: lora_state(module, run.parts) for part, module in run.lora_modules.items()}
        states, alpha, rank = reference_free(states, run.initial_states, args)
        states = {part: {k: v.to(dtype) for k, v in state.items()} for part, state in states.items()}
        about = lora_metadata(run, alpha, rank)
        write_diffusers_file(run, folder / "pytorch_lora_weights.safetensors", states, alpha, rank, about)
        config, scale = (
            run.components.config(args.family.denoiser),
            math.sqrt(rank) if args.use_rslora else 1.0,
        )
        if args.use_dora and run.norms is None:  # once, for it reads the base
            run.norms = neighbours_norms(
                run.family,
                run.components.folder_of(args.family.denoiser),
                states[args.family.denoiser],
                config,
            )
        exported = kohya_state(run.family, states, alpha * scale, config, run.norms, alpha * scale / rank)
        exported = {k: v.contiguous() for k, v in exported.items()}
        save_file(exported, folder / f"{name}.safetensors", metadata=about | tensor_hashes(exported))
    if run.rows:
        tables = {key: row.weight.detach().float().cpu().clone() for key, row in run.rows.items()}
        save_file(tables, folder / f"{name}_emb.safetensors", metadata={"format": "pt"})


def write_diffusers_file(
    run: Run, file: Path, states: dict, alpha: float, rank: int, about: dict[str, str]
) -> None:
    """The LoRA as the family's pipeline writes it, with alpha and rank in its metadata, and `about`."""
    from diffusers.training_utils import _collate_lora_metadata

    arguments = _collate_lora_metadata(run.lora_modules)  # without it alpha is lost
    for part, state in states.items():
        arguments[f"{part}_lora_layers"] = (
            to_diffusers_keys(state, run.family.diffusers_spelling)
            if part == run.family.denoiser
            else text_encoder_keys(state)
        )
        metadata = arguments[f"{part}_lora_adapter_metadata"]
        metadata |= (
            {"lora_alpha": alpha, "r": rank, "init_lora_weights": True} if "lora_alpha" in metadata else {}
        )
        metadata |= {key: sorted(value) for key, value in metadata.items() if isinstance(value, set)}
    import_class("diffusers", run.family.pipeline_class).save_lora_weights(
        file.parent, weight_name=file.name, **arguments
    )
    tensors, own = read_safetensors(file)  # the pipeline takes no other metadata than its own
    save_file(tensors, file, metadata=about | {"modelspec.implementation": "diffusers"} | own)


def save_merged(run: Run, folder: Path) -> None:
    """Writes the base with the LoRA merged in, as a diffusers folder."""
    components, kind = run.components, import_class("diffusers", run.family.pipeline_class)
    pipeline = kind.from_pretrained(components.folder, dtype=components.dtype)
    pipeline.load_lora_weights(run.args.output_dir, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora(components=list(run.lora_modules), safe_fusing=True)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(folder)
