"""The base of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.components import Components
from lora_training.base_model.reading import reading_base
from lora_training.base_model.sources import resolve_base
from lora_training.base_model.vae import latent_shape
from lora_training.errors import UserError
from lora_training.tensors import torch_dtype

if TYPE_CHECKING:
    from lora_training.training.run import Run


def open_base(run: Run, check_base, draw_noise) -> Components:
    """The base's parts, none of them loaded yet. check_base, draw_noise: the recipe's, tried on it."""
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
    size = sum(
        file.stat().st_size for file in components.folder_of(args.family.denoiser).glob("*.safetensors")
    )
    if accelerator.device.type == "cpu" and size < 100 << 20 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(
            1
        )  # for small matrices threads wait for each other, and for ever beside other work
    return components
