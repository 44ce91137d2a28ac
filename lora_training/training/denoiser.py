"""The denoiser made ready for training: memory saved, layers fused, split or compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.base_model.sharding import shard_base
from lora_training.console import print_status
from lora_training.memory.activations import save_activation_memory
from lora_training.memory.checkpointing import compile_blocks, enable_checkpointing
from lora_training.memory.cuda_graphs import CudaGraphs
from lora_training.memory.lora_products import fuse_lora

if TYPE_CHECKING:
    from lora_training.training.run import Run


def prepare_denoiser(run: Run) -> None:
    """Gradient checkpointing, FSDP2 and torch.compile, as the flags and the launcher say; before parts get
    their buffers.
    """
    args, family = run.args, run.family
    if args.gradient_checkpointing:
        whole = args.compile or args.use_dora
        enable_checkpointing(run.denoiser, family.last_products, args.lora_dropout > 0, whole=whole)
    if run.components.sharded:
        shard_base(run.denoiser, family.block_lists, run.accelerator.device)
        print_status(f"FSDP2: the {family.denoiser} is split over {run.accelerator.num_processes} processes")
    if args.compile:
        compile_blocks(run.denoiser)


def fuse_layers(run: Run) -> None:
    """LoRA layers whose products are taken together, and layers that keep less; after parts have their
    buffers.
    """
    args = run.args
    for module in run.lora_modules.values():
        if not (
            args.compile and module is run.denoiser
        ):  # the compiler fuses too, and would take each group anew
            fuse_lora(module)
    if not args.compile:
        save_activation_memory(run.denoiser)
    run.graphs = CudaGraphs(run.parts) if args.cuda_graphs else None
