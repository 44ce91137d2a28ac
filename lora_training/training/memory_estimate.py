"""Estimates the GPU memory of a training run from the released models' shapes, without a GPU or weights.

The denoiser is built from its configuration on the `meta` device, gets its LoRA, and runs forward: every
tensor that autograd would save is counted once, by its storage. A step takes
* the frozen base: 2 bytes per parameter in bf16, 1 in int8/fp8, 4.127 bits in nf4 (a scale in 8 bits per
  64 weights) for the linear layers of its blocks, 2 bytes for the rest and for its buffers; of swapped
  blocks, two places for the largest;
* the LoRA: 4 bytes per parameter for weights, 4 for gradients, both again in half precision, 8 for
  AdamW's state (2 in 8 bits, 16 for Prodigy's; OPTIMIZER_BYTES has the others);
* activations: all that is saved, or with gradient checkpointing the inputs of what is computed again and
  the largest inside;
* the largest layer's weights in bf16 where the base is quantised: it is unpacked when it works; with fp8
  its input too;
* the VAE in --mixed_precision's dtype, and text encoders where they are trained or latents and
  embeddings aren't cached.
Before it the VAE encodes and the text encoders read the captions, one after the other, each alone on the
GPU; pictures are drawn beside the frozen base and the LoRA, and the VAE's decoder is what takes most
then.
The CUDA context and the allocator's slack (0.5 to 1.5 GiB) come on top. Attention is counted as flash
attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lora_training.base_model.reading import import_class
from lora_training.base_model.released_models import OTHER_PARTS, released_denoiser
from lora_training.lora.adapters import add_lora, find_target_layers
from lora_training.memory.activations import save_activation_memory
from lora_training.memory.checkpointing import repeated_blocks
from lora_training.memory.counting import PeakMemory, counted_attention, saved_bytes

if TYPE_CHECKING:
    import argparse

    from lora_training.families import Family

GIB = 2**30
SLACK = 1.0  # GiB that the CUDA context and the allocator take beside the tensors; 0.5 to 1.5
# millions of parameters of all text encoders together
TEXT_ENCODER_PARAMETERS = {"sd15": 123.1, "sdxl": 817.7, "sd3": 5581.0, "flux": 4885.0}
HALF_PRECISIONS = ("fp16", "bf16", "auto")  # of --mixed_precision, on a GPU
WEIGHT_BITS = {"nf4": 4 + 8 / 64 + 32 / 64 / 256, "int8": 8, "fp8": 8, None: 16}
OPTIMIZER_BYTES = {  # of state for each trained weight; came: beside its mean, sums of rows and columns
    **{"adamw": 8, "adamw8bit": 2, "lion8bit": 1, "ademamix8bit": 3, "prodigy": 16, "adafactor": 0.1},
    **{"schedulefree": 8, "muon": 4, "came": 6},
}
# (part, its configuration, args) -> beginnings of names of layers whose output nothing reads
IdleLayers = Callable[[str, object, "argparse.Namespace"], tuple[str, ...]]


@dataclass
class MemoryEstimate:
    """GiB by purpose: what a step takes, and what is on the GPU at other times."""

    base: float
    lora: float
    activations: float
    unpacked: float  # of quantised layers, while they work
    others: float  # VAE and text encoders
    latents: float  # while the VAE encodes, before the base is there
    pictures: float  # while pictures are drawn, the base and the LoRA included

    @property
    def step(self) -> float:
        return self.base + self.lora + self.activations + self.unpacked + self.others

    @property
    def total(self) -> float:
        return max(self.step, self.latents, self.pictures)


def estimate_memory(
    args: argparse.Namespace, lora_targets: tuple[str, ...], idle_layers: IdleLayers
) -> MemoryEstimate:
    """Memory of a training run with these (parsed) flags. lora_targets, idle_layers: the recipe's."""
    family, size = args.family.name, tuple((args.resolution * 2)[:2])
    half = args.mixed_precision in HALF_PRECISIONS
    factor = 1 if half else 2  # the formulas are of half precision
    with torch.device("meta"):
        denoiser = released_denoiser(family).to(torch.bfloat16).requires_grad_(False).train()
    base, unpacked = base_bytes(denoiser, args, factor)
    with torch.device("meta"):
        parameters = add_trained_lora(denoiser, args, lora_targets, idle_layers)
        if not args.compile:
            save_activation_memory(denoiser)
        batch = args.train_batch_size * (2 if args.with_prior_preservation else 1)
        has_t5 = "max_sequence_length" in args.family.text_settings
        text_tokens = args.max_sequence_length if has_t5 else 0
        inputs = denoiser_inputs(args.family, batch, size, text_tokens)
        saved, inside = saved_bytes(denoiser, inputs, args.gradient_checkpointing)
    if args.quantize_base == "fp8" and args.family.predicts_flow:
        unpacked += fp8_input_bytes(denoiser, inputs, batch, size)
    state = OPTIMIZER_BYTES.get(args.optimizer, 8)
    lora = parameters * ((12 if half else 8) + state + 4 * args.use_ema)
    pictures = 0
    if args.num_validation_images or args.validation_prompt:  # with the averaged weights' copy
        pictures = base + lora + parameters * 4 + vae_bytes(family, size, vae_dtype(args), True)
    values = {
        "base": base,
        "lora": lora,
        "activations": (saved + inside) * factor,
        "unpacked": unpacked,
        "others": other_parts_bytes(args, size, half),
        "latents": vae_bytes(family, size, vae_dtype(args), False),
        "pictures": pictures,
    }
    return MemoryEstimate(**{name: value / GIB for name, value in values.items()})


def base_bytes(denoiser: torch.nn.Module, args: argparse.Namespace, factor: int) -> tuple[float, float]:
    """(the frozen base with its buffers, the largest quantised layer in bf16). factor: 2 in full precision.

    The linear layers of swapped blocks lie in the CPU's memory; two places of the largest block's size stand
    for them.
    """
    quantize = args.quantize_base
    blocks = linear_sizes(denoiser, "block")
    swapped = [sum(linear_sizes(block, "")) for block in swapped_blocks(denoiser, args.blocks_to_swap)]
    tensors = (*denoiser.parameters(), *denoiser.buffers())
    rest = sum(t.numel() for t in tensors) - sum(blocks)
    on_gpu = sum(blocks) - sum(swapped) + 2 * max(swapped, default=0)
    frozen = (on_gpu * WEIGHT_BITS[quantize] / 8 + rest * 2) * (1 if quantize else factor)
    return frozen, max(blocks) * 2 if quantize else 0


def linear_sizes(module: torch.nn.Module, inside: str) -> list[int]:
    """Numbers of weights of linear layers whose names contain `inside`."""
    named = module.named_modules()
    return [m.weight.numel() for name, m in named if isinstance(m, torch.nn.Linear) and inside in name]


def swapped_blocks(denoiser: torch.nn.Module, count: int | None) -> list[torch.nn.Module]:
    """The blocks that --blocks_to_swap chooses: `count`, evenly spread."""
    if not count:
        return []
    blocks = repeated_blocks(denoiser)
    return [blocks[k * len(blocks) // count] for k in range(count)]


def add_trained_lora(
    denoiser: torch.nn.Module,
    args: argparse.Namespace,
    lora_targets: tuple[str, ...],
    idle_layers: IdleLayers,
) -> int:
    """Adds the LoRA that the flags say to the denoiser; returns the number of its parameters."""
    if args.train_transformer_frac > 0:
        idle = idle_layers(args.family.denoiser, denoiser.config, args)
        add_lora(denoiser, find_target_layers(denoiser, args, lora_targets, idle), args)
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    for parameter in trained:  # the layers work with a bf16 shadow of the LoRA
        parameter.data = parameter.data.to(torch.bfloat16)
    return sum(p.numel() for p in trained)


def denoiser_inputs(family: Family, batch: int, size: tuple[int, int], text_tokens: int) -> dict:
    """The denoiser's arguments for a batch of images.

    size: (width, height) in pixels; text_tokens: those that T5 reads.
    """
    latent_size = size[0] // 8, size[1] // 8
    if family.denoiser == "unet":
        return unet_inputs(family.name, batch, latent_size)
    if family.name == "sd3":
        return sd3_inputs(batch, latent_size, text_tokens)
    return flux_inputs(batch, latent_size, text_tokens)


def empty_bf16(*shape: int) -> torch.Tensor:
    """A tensor of this shape, of no particular values."""
    return torch.empty(shape, dtype=torch.bfloat16)


def unet_inputs(family: str, batch: int, latent_size: tuple[int, int]) -> dict:
    """Arguments of the UNets of Stable Diffusion 1.5 and SDXL. latent_size: (width, height)."""
    width, height = latent_size
    inputs = {
        "sample": empty_bf16(batch, 4, height, width),
        "timestep": torch.zeros(batch),
        "encoder_hidden_states": empty_bf16(batch, 77, 768 if family == "sd15" else 2048),
    }
    if family == "sdxl":
        conditions = {"text_embeds": empty_bf16(batch, 1280), "time_ids": empty_bf16(batch, 6)}
        inputs["added_cond_kwargs"] = conditions
    return inputs


def sd3_inputs(batch: int, latent_size: tuple[int, int], text_tokens: int) -> dict:
    """Arguments of SD3's transformer. latent_size: (width, height)."""
    width, height = latent_size
    return {
        "hidden_states": empty_bf16(batch, 16, height, width),
        "encoder_hidden_states": empty_bf16(batch, 77 + text_tokens, 4096),
        "pooled_projections": empty_bf16(batch, 2048),
        "timestep": torch.zeros(batch),
    }


def flux_inputs(batch: int, latent_size: tuple[int, int], text_tokens: int) -> dict:
    """Arguments of FLUX.1's transformer, whose latents are packed. latent_size: (width, height)."""
    image_tokens = latent_size[0] * latent_size[1] // 4
    return {
        "hidden_states": empty_bf16(batch, image_tokens, 64),
        "encoder_hidden_states": empty_bf16(batch, text_tokens, 4096),
        "pooled_projections": empty_bf16(batch, 768),
        "timestep": torch.zeros(batch),
        "guidance": torch.zeros(batch),
        "img_ids": torch.zeros(image_tokens, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
    }


def fp8_input_bytes(denoiser: torch.nn.Module, inputs: dict, batch: int, size: tuple[int, int]) -> int:
    """The widest input of a block's linear layer, in bf16 and in fp8."""
    tokens = size[0] * size[1] // 256 + inputs["encoder_hidden_states"].shape[1]
    widths = [
        m.in_features
        for name, m in denoiser.named_modules()
        if isinstance(m, torch.nn.Linear) and "block" in name and ".norm" not in name
    ]
    return batch * tokens * max(widths) * 3


def other_parts_bytes(args: argparse.Namespace, size: tuple[int, int], half: bool) -> float:
    """VAE and text encoders, where a step needs them."""
    family, total = args.family.name, 0.0
    if not args.cache_latents:
        total += vae_bytes(family, size, vae_dtype(args), False)
    if args.train_text_encoder or args.train_text_encoder_ti or args.captions_vary:
        total += TEXT_ENCODER_PARAMETERS[family] * 1e6 * (2 if half else 4)
    return total


def vae_dtype(args: argparse.Namespace) -> torch.dtype:
    """The precision in which the VAE works."""
    half = args.mixed_precision in HALF_PRECISIONS
    return torch.bfloat16 if half and not args.family.vae_float32 else torch.float32


@functools.cache
def vae_bytes(family: str, size: tuple[int, int], dtype: torch.dtype, decodes: bool) -> int:
    """The VAE's weights, and the most that it takes beside them for one picture of `size` (width, height)."""
    library, kind, config = OTHER_PARTS[family]["vae"]
    with torch.device("meta"), torch.no_grad(), counted_attention():
        vae = import_class(library, kind)(**config).to(dtype)
        picture = torch.empty(1, 3, size[1], size[0], dtype=dtype)
        latents = torch.empty(1, config["latent_channels"], size[1] // 8, size[0] // 8, dtype=dtype)
        with PeakMemory() as memory:
            _ = vae.decode(latents).sample if decodes else vae.encode(picture).latent_dist
    return sum(p.numel() * p.element_size() for p in vae.parameters()) + memory.peak
