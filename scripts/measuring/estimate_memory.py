"""Estimates the GPU memory of a training step from the real models' shapes, without a GPU and without weights.

    python scripts/measuring/estimate_memory.py --family flux --resolution 512 --quantize_base nf4 --gradient_checkpointing
    python scripts/measuring/estimate_memory.py --table          every preset of config/presets/, as a Markdown table

The denoiser is built from its configuration on the `meta` device, gets its LoRA, and runs forward: every tensor that
autograd would keep is counted once, by its storage. Added up are
* the frozen base: 2 bytes per parameter in bf16, 1 in int8/fp8, 4.5 bits in nf4 (an absmax per 64 weights) for its
  linear layers, 2 bytes for the rest;
* the LoRA: 4 bytes per parameter for weights, 4 for gradients, 8 for AdamW's state (2 in 8 bits, 16 for Prodigy's);
* activations: all that is kept, or with gradient checkpointing the blocks' inputs and the largest block's own;
* the largest layer's weights in bf16 where the base is quantised: it is unpacked when it works;
* the VAE in --mixed_precision's dtype, and text encoders where they are trained or latents and embeddings aren't cached.
The CUDA context and the allocator's slack (0.5 to 1.5 GiB) come on top. Attention is counted as flash attention.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.released_models import real_denoiser
from scripts.parts.training_scripts import ROOT, SCRIPTS, load_script

GIB = 2**30
# Millions of parameters of the released VAE and text encoders
OTHERS = {
    "sd15": {"vae": 83.7, "text": 123.1},
    "sdxl": {"vae": 83.7, "text": 817.7},
    "sd3": {"vae": 83.8, "text": 5581.0},
    "flux": {"vae": 83.8, "text": 4885.0},
}


def inputs_of(family: str, batch: int, size: tuple[int, int], tokens: int) -> dict:
    """The denoiser's arguments for a batch of images of `size` (width, height) pixels; `tokens`: what T5 reads."""
    width, height = size[0] // 8, size[1] // 8

    def empty(*shape: int):
        return torch.empty(shape, dtype=torch.bfloat16)

    if family in ("sd15", "sdxl"):
        out = {
            "sample": empty(batch, 4, height, width),
            "timestep": torch.zeros(batch),
            "encoder_hidden_states": empty(batch, 77, 768 if family == "sd15" else 2048),
        }
        if family == "sdxl":
            out["added_cond_kwargs"] = {"text_embeds": empty(batch, 1280), "time_ids": empty(batch, 6)}
        return out
    if family == "sd3":
        return {
            "hidden_states": empty(batch, 16, height, width),
            "encoder_hidden_states": empty(batch, 77 + tokens, 4096),
            "pooled_projections": empty(batch, 2048),
            "timestep": torch.zeros(batch),
        }
    return {
        "hidden_states": empty(batch, width * height // 4, 64),
        "encoder_hidden_states": empty(batch, tokens, 4096),
        "pooled_projections": empty(batch, 768),
        "timestep": torch.zeros(batch),
        "guidance": torch.zeros(batch),
        "img_ids": torch.zeros(width * height // 4, 3),
        "txt_ids": torch.zeros(tokens, 3),
    }


class FlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: queries, keys, values, output and one number per query and head."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output, torch.empty(query.shape[:3], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("only the forward pass is estimated")


@contextlib.contextmanager
def counted_attention():
    """torch's attention replaced by one that can be counted on the meta device."""
    own = torch.nn.functional.scaled_dot_product_attention

    def counted(query, key, value, *rest, **options):
        return FlashAttention.apply(query, key, value)

    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = own


def kept_bytes(denoiser, inputs: dict, blocks: list[str]) -> tuple[int, int]:
    """(bytes that autograd keeps in a forward pass, the most that one block keeps), weights left out."""
    weights = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    seen: dict[int, int] = {}
    inside: dict[str, int] = dict.fromkeys(blocks, 0)
    current: list[str] = []

    def keep(tensor):
        place = tensor.untyped_storage()._cdata
        if place not in weights and place not in seen:
            seen[place] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            if current:
                inside[current[-1]] += seen[place]
        return tensor

    alive: list = []  # so that no storage's address is used twice
    hooks = []
    for name in blocks:
        module = denoiser.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: current.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: current.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counted_attention():
        denoiser(**inputs)
    for hook in hooks:
        hook.remove()
    return sum(seen.values()), max(inside.values())


@dataclass
class Estimate:
    """GiB by purpose."""

    base: float
    lora: float
    activations: float
    unpacked: float
    others: float

    @property
    def total(self) -> float:
        return self.base + self.lora + self.activations + self.unpacked + self.others


def estimate(family: str, args, script) -> Estimate:
    """Memory of a training step with these (parsed) flags."""
    with torch.device("meta"):
        denoiser = real_denoiser(family).to(torch.bfloat16)
    count = sum(p.numel() for p in denoiser.parameters())
    linears = [m.weight.numel() for m in denoiser.modules() if isinstance(m, torch.nn.Linear)]
    bits = {"nf4": 4.5, "int8": 8, "fp8": 8, None: 16}[args.quantize_base]
    half = args.mixed_precision in ("fp16", "bf16")
    base = (sum(linears) * bits / 8 + (count - sum(linears)) * 2) * (1 if half or args.quantize_base else 2)
    denoiser.requires_grad_(False)
    lora = 0
    if args.train_transformer_frac > 0:
        with torch.device("meta"):
            script.add_lora(denoiser, script.lora_targets(denoiser, args), args)
        lora = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
        for parameter in denoiser.parameters():  # the layers work with a bf16 shadow of the LoRA
            parameter.data = parameter.data.to(torch.bfloat16)
    state = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "adafactor": 0.1, "schedulefree": 8}[args.optimizer]
    size = tuple((args.resolution * 2)[:2])
    tokens = getattr(args, "max_sequence_length", 0)
    rows = args.train_batch_size * (2 if args.with_prior_preservation else 1)
    blocks = script.block_prefixes(denoiser)
    denoiser.train()
    with torch.device("meta"):
        total, largest = kept_bytes(denoiser, inputs_of(family, rows, size, tokens), blocks)
        if args.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
            kept, _ = kept_bytes(denoiser, inputs_of(family, rows, size, tokens), blocks)
            total = kept + largest
    others = 0.0 if args.cache_latents else OTHERS[family]["vae"] * 1e6 * (2 if half else 4)
    if args.train_text_encoder or args.train_text_encoder_ti or args.shuffle_tags or args.tag_dropout:
        others += OTHERS[family]["text"] * 1e6 * (2 if half else 4)
    return Estimate(
        base / GIB,
        lora * ((12 if half else 8) + state) / GIB,  # weights, gradients, and both in half precision
        total * (1 if half else 2) / GIB,
        max(linears) * 2 / GIB if args.quantize_base else 0.0,
        others / GIB,
    )


def preset_rows() -> list[str]:
    """A Markdown row for each file of config/presets/."""
    rows = [
        "| preset | resolution x batch | base | LoRA | activations | total GiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for family in SCRIPTS:
        script = load_script(family)
        for file in sorted(
            (ROOT / "config" / "presets").glob(f"{family}_*gb.yaml"), key=lambda f: int(f.stem.split("_")[1][:-2])
        ):
            args = script.parse_args(["--config", str(file), "-m", "BASE", "-d", str(ROOT / "assets")])
            e = estimate(family, args, script)
            how = ", ".join(filter(None, (args.quantize_base, "checkpointing" if args.gradient_checkpointing else "")))
            rows.append(
                f"| {file.stem} | {' x '.join(map(str, args.resolution))} x {args.train_batch_size}{f' ({how})' if how else ''} |"
                f" {e.base:.1f} | {e.lora:.2f} | {e.activations:.1f} | **{e.total:.1f}** |"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimates the GPU memory of a training step, without a GPU.")
    parser.add_argument("--family", choices=sorted(SCRIPTS), help="other flags are those of the family's script")
    parser.add_argument("--table", action="store_true", help="a table of all presets instead")
    known, rest = parser.parse_known_args()
    if known.table:
        print("\n".join(preset_rows()))
        return
    if not known.family:
        parser.error("give --family, or --table")
    script = load_script(known.family)
    args = script.parse_args(["-m", "BASE", "-d", str(ROOT / "assets"), "--mixed_precision", "bf16", *rest])
    e = estimate(known.family, args, script)
    for name, value in vars(e).items():
        print(f"{name:>12} {value:7.2f} GiB")
    print(f"{'total':>12} {e.total:7.2f} GiB, and 0.5 to 1.5 for the CUDA context and the allocator")


if __name__ == "__main__":
    main()
