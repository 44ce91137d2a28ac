"""The base of a run: opened and checked, and its denoiser made ready for training."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.components import Components
from lora_training.base_model.reading import import_class, reading_base
from lora_training.base_model.sharding import shard_base
from lora_training.base_model.sources import resolve_base
from lora_training.base_model.vae import latent_shape
from lora_training.console import print_status
from lora_training.errors import UserError
from lora_training.lora.adapters import check_patterns, find_target_layers, trained_layers
from lora_training.lora.layer_ranks import layer_ranks
from lora_training.memory.activations import save_activation_memory
from lora_training.memory.checkpointing import compile_blocks, enable_checkpointing
from lora_training.memory.cuda_graphs import CudaGraphs
from lora_training.memory.lora_products import fuse_lora
from lora_training.optim.optimizers import find_class, needs_shapes
from lora_training.optim.trial import try_optimizer
from lora_training.tensors import torch_dtype

if TYPE_CHECKING:
    import argparse

    from accelerate import Accelerator

    from lora_training.training.run import Run

SMALL_BASE = 100 << 20  # bytes of a denoiser whose matrices are too small for several threads


def open_base(run: Run, check_base: Callable, draw_noise: Callable) -> Components:
    """The base's components, none of them loaded yet.

    check_base, draw_noise: the recipe's functions, tried on the base's configurations. Errors: UserError for
    a base that can't be trained with these settings.
    """
    args, accelerator = run.args, run.accelerator
    dtype = torch_dtype(accelerator.mixed_precision)
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1
    if sharded and (args.quantize_base or args.compile or args.blocks_to_swap or args.cuda_graphs):
        flags = "--quantize_base, --compile, --blocks_to_swap and --cuda_graphs"
        raise UserError(f"{flags} don't work with FSDP: use a configuration for several GPUs")
    components = Components(resolve_base(args), args, dtype, accelerator.device, sharded)
    with reading_base("a configuration"):
        check_base(components)
        shape = latent_shape((64, 64), components.config("vae"))
        draw_noise(torch.Generator(), shape, components.training_scheduler(), args)
    check_layers(components, args)
    limit_threads(components, accelerator)
    return components


def check_layers(components: Components, args: argparse.Namespace) -> None:
    """Looks for the layers that flags name before weights are read, and tries the optimizer on convolutions.

    Errors: UserError for flags that match no layer, or an optimizer that can't train the layers.
    """
    is_shaped = needs_shapes(find_class(args.optimizer))
    has_patterns = any(patterns.entries for patterns in args.patterns.values())
    names_layers = args.lora_layers or args.lora_blocks or vars(args).get("conv_rank")
    if args.train_transformer_frac == 0 or not (has_patterns or (is_shaped and names_layers)):
        return
    name = components.family.denoiser
    with reading_base(name), torch.device("meta"):
        denoiser = import_class(*components.index[name]).from_config(components.config(name))
    targets = trained_layers(name, find_target_layers(denoiser, args, args.lora_targets, ()), args)
    layer_ranks(denoiser, name, targets, args)
    if not args.train_text_encoder:  # whose layers the patterns may mean, too
        check_patterns(args, denoiser)
    if is_shaped and names_layers:
        kinds = {type(denoiser.get_submodule(target)) for target in targets}
        try_optimizer(args, components.device, torch.nn.Conv2d in kinds)


def limit_threads(components: Components, accelerator: Accelerator) -> None:
    """One CPU thread for a small base, unless OMP_NUM_THREADS says otherwise.

    Several threads wait for each other at small matrices, for ever if other work takes the cores.
    """
    if accelerator.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    files = components.folder_of(components.family.denoiser).glob("*.safetensors")
    if sum(file.stat().st_size for file in files) < SMALL_BASE:
        torch.set_num_threads(1)


def prepare_denoiser(run: Run) -> None:
    """Gradient checkpointing, FSDP2 and torch.compile, as the flags and the launcher say.

    To be called before the parts get their buffers.
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
    """Computes products of LoRA layers together, and replaces layers by ones that keep less for backward.

    To be called after the parts have their buffers.
    """
    args = run.args
    for module in run.lora_modules.values():
        # the compiler fuses too, and would compile each group of layers anew
        if not args.compile or module is not run.denoiser:
            fuse_lora(module)
    if not args.compile:
        save_activation_memory(run.denoiser)
    run.cuda_graphs = CudaGraphs(run.parts) if args.cuda_graphs else None
