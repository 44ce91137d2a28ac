"""Estimates the GPU memory of a training run from the real models' shapes, without a GPU and without weights.

    python scripts/measuring/estimate_memory.py --family flux --resolution 512 --quantize_base nf4 --gradient_checkpointing
    python scripts/measuring/estimate_memory.py --table          every preset of config/presets/, as a Markdown table
    python scripts/measuring/estimate_memory.py --counts         beside what was counted operation by operation

The denoiser is built from its configuration on the `meta` device, gets its LoRA, and runs forward: every tensor that
autograd would keep is counted once, by its storage. A step takes
* the frozen base: 2 bytes per parameter in bf16, 1 in int8/fp8, 4.127 bits in nf4 (a scale in 8 bits per 64 weights) for the
  linear layers of its blocks, 2 bytes for the rest and for its buffers; of swapped blocks, two places for the largest;
* the LoRA: 4 bytes per parameter for weights, 4 for gradients, both again in half precision, 8 for AdamW's state (2 in 8
  bits, 16 for Prodigy's);
* activations: all that is kept, or with gradient checkpointing the inputs of what is computed again and the largest inside;
* the largest layer's weights in bf16 where the base is quantised: it is unpacked when it works; with fp8 its input too;
* the VAE in --mixed_precision's dtype, and text encoders where they are trained or latents and embeddings aren't cached.
Before it the VAE encodes and the text encoders read the captions, one after the other, each alone on the GPU; pictures are
drawn beside the frozen base and the LoRA, and the VAE's decoder is what takes most then.
The CUDA context and the allocator's slack (0.5 to 1.5 GiB) come on top. Attention is counted as flash attention.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.released_models import OTHER_PARTS, PARTS_WITHOUT_TOKENIZERS, real_denoiser
from scripts.parts.training_scripts import ROOT, SCRIPTS, load_script

GIB = 2**30
TEXT_ENCODERS = {"sd15": 123.1, "sdxl": 817.7, "sd3": 5581.0, "flux": 4885.0}  # millions of parameters, all together
# GiB at most in a step, by `count_step.py --project . --case CASE` (bf16, cached latents, rank 4, AdamW)
COUNTED = {
    "sd15:512:1": 2.31,
    "sd15:512:4": 4.39,
    "sd15:512:1:gradient_checkpointing": 1.83,
    "sd15:768:6:rank=32": 11.15,
    "sd15:512:4:gradient_checkpointing,rank=16": 2.53,
    "sd15:768:16:rank=64": 27.34,
    "sdxl:1024:1": 9.40,
    "sdxl:1024:1:gradient_checkpointing": 5.52,
    "sdxl:1024:1:gradient_checkpointing,optimizer=adamw8bit": 5.49,
    "sdxl:1024:1:gradient_checkpointing,optimizer=prodigy,rank=16": 6.02,
    "sdxl:1024:4:gradient_checkpointing,rank=32,optimizer=adamw8bit": 7.90,
    "sdxl:1024:8:rank=64": 43.11,
    "sd3:1024:1": 11.45,
    "sd3:1024:1:gradient_checkpointing": 5.25,
    "sd3:1024:4:gradient_checkpointing,rank=16,optimizer=adamw8bit": 7.16,
    "sd3:1024:8:rank=64": 60.07,
    "flux:1024:1:gradient_checkpointing": 24.45,
    "flux:1024:1": 46.71,
    "flux:512:1:gradient_checkpointing": 23.07,
    "flux:512:1": 30.49,
    "flux:1024:4:gradient_checkpointing,rank=32": 32.11,
    "flux:512:1:gradient_checkpointing,quantize_base=nf4": 6.80,
    "flux:1024:1:gradient_checkpointing,quantize_base=fp8": 13.57,
    "flux:1024:1:gradient_checkpointing,quantize_base=nf4": 8.18,
    "flux:1024:1:gradient_checkpointing,quantize_base=int8": 13.52,
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


class Kept:
    """Bytes of tensors, each storage once; weights left out. Holds the tensors, so that no address is used twice."""

    def __init__(self, *without: int) -> None:
        self.seen, self.tensors, self.bytes = set(without), [], 0

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.tensors.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

    def hooks(self):
        """While inside, what autograd keeps is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)


def kept_bytes(denoiser, inputs: dict, checkpointing: bool) -> tuple[int, int]:
    """(bytes that autograd keeps of a forward pass, the most that one checkpointed function keeps inside)."""
    weights = {p.untyped_storage()._cdata for p in denoiser.parameters()}
    kept, largest = Kept(*weights), 0

    def checkpointed(function, *args, **named):
        nonlocal largest
        for tensor in tree_iter((args, named)):
            if torch.is_tensor(tensor):
                kept.add(tensor)
        inside = Kept(*kept.seen)
        with inside.hooks():
            result = function(*args, **named)
        largest = max(largest, inside.bytes)
        return result

    if checkpointing:
        denoiser.enable_gradient_checkpointing(checkpointed)
    else:
        denoiser.disable_gradient_checkpointing()
    with kept.hooks(), counted_attention():
        denoiser(**inputs)
    return kept.bytes, largest


class Peak(TorchDispatchMode):
    """The most bytes that tensors made while inside take at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if torch.is_tensor(tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, storage._cdata)
        return out

    def drop(self, key: int) -> None:
        self.now -= self.live.pop(key, 0)


@functools.cache
def vae_bytes(family: str, size: tuple[int, int], dtype, decodes: bool) -> int:
    """The VAE's weights, and the most that it takes beside them for one picture of `size` (width, height)."""
    import diffusers

    _, kind, config = (OTHER_PARTS | PARTS_WITHOUT_TOKENIZERS)[family]["vae"]
    with torch.device("meta"), torch.no_grad(), counted_attention():
        vae = getattr(diffusers, kind)(**config).to(dtype)
        picture = torch.empty(1, 3, size[1], size[0], dtype=dtype)
        latents = torch.empty(1, config["latent_channels"], size[1] // 8, size[0] // 8, dtype=dtype)
        with Peak() as peak:
            _ = vae.decode(latents).sample if decodes else vae.encode(picture).latent_dist
    return sum(p.numel() * p.element_size() for p in vae.parameters()) + peak.most


@dataclass
class Estimate:
    """GiB by purpose: what a step takes, and what is on the GPU at other times."""

    base: float
    lora: float
    activations: float
    unpacked: float
    others: float
    latents: float  # while the VAE encodes, before the base is there
    pictures: float  # while pictures are drawn, the base and the LoRA included

    @property
    def step(self) -> float:
        return self.base + self.lora + self.activations + self.unpacked + self.others

    @property
    def total(self) -> float:
        return max(self.step, self.latents, self.pictures)


def base_bytes(denoiser, quantize: str | None, half: bool, swapped: list) -> tuple[float, float]:
    """(the frozen base with its buffers, the largest quantised layer in bf16). swapped: blocks whose linear layers lie in the
    CPU's memory; two places of the largest one's size stand for them.
    """
    bits = {"nf4": 4 + 8 / 64 + 32 / 64 / 256, "int8": 8, "fp8": 8, None: 16}[quantize]

    def linears(module, inside: str) -> list[int]:
        named = module.named_modules()
        return [m.weight.numel() for n, m in named if isinstance(m, torch.nn.Linear) and inside in n]

    blocks, away = linears(denoiser, "block"), [sum(linears(block, "")) for block in swapped]
    values = (*denoiser.parameters(), *denoiser.buffers())
    rest = sum(t.numel() for t in values) - sum(blocks)
    held = sum(blocks) - sum(away) + 2 * max(away, default=0)
    frozen = (held * bits / 8 + rest * 2) * (1 if half or quantize else 2)
    return frozen, max(blocks) * 2 if quantize else 0


def estimate(family: str, args, script) -> Estimate:
    """Memory of a training run with these (parsed) flags."""
    with torch.device("meta"):
        denoiser = real_denoiser(family).to(torch.bfloat16).requires_grad_(False).train()
    half = args.mixed_precision in ("fp16", "bf16")
    swapped = []
    if number := vars(args).get("blocks_to_swap"):
        blocks = script.repeated(denoiser)
        swapped = [blocks[k * len(blocks) // number] for k in range(number)]
    base, unpacked = base_bytes(denoiser, args.quantize_base, half, swapped)
    size, rows = tuple((args.resolution * 2)[:2]), args.train_batch_size * (2 if args.with_prior_preservation else 1)
    with torch.device("meta"):
        if args.train_transformer_frac > 0:
            script.add_lora(denoiser, script.lora_targets(denoiser, args), args)
        if not args.compile:
            script.lighten(denoiser)
        trained = [p for p in denoiser.parameters() if p.requires_grad]
        for parameter in trained:  # the layers work with a bf16 shadow of the LoRA
            parameter.data = parameter.data.to(torch.bfloat16)
        inputs = inputs_of(family, rows, size, getattr(args, "max_sequence_length", 0))
        kept, inside = kept_bytes(denoiser, inputs, args.gradient_checkpointing)
    if args.quantize_base == "fp8" and script.PREDICTS_FLOW:  # the widest input, in bf16 and in fp8
        tokens = size[0] * size[1] // 256 + inputs["encoder_hidden_states"].shape[1]
        layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear) and ".norm" not in n}
        unpacked += rows * tokens * max(m.in_features for n, m in layers.items() if "block" in n) * 3
    lora = sum(p.numel() for p in trained)
    state = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "adafactor": 0.1, "schedulefree": 8}.get(args.optimizer, 8)
    weights = lora * ((12 if half else 8) + state + 4 * args.use_ema)
    vae = torch.float32 if script.VAE_FLOAT32 or not half else torch.bfloat16
    others = 0 if args.cache_latents else vae_bytes(family, size, vae, False)
    if args.train_text_encoder or args.train_text_encoder_ti or args.captions_vary:
        others += TEXT_ENCODERS[family] * 1e6 * (2 if half else 4)
    draws = args.num_validation_images or args.validation_prompt
    pictures = base + weights + lora * 4 + vae_bytes(family, size, vae, True) if draws else 0  # averaged weights, kept
    activations = (kept + inside) * (1 if half else 2)
    latents = vae_bytes(family, size, vae, False)
    found = (base, weights, activations, unpacked, others, latents, pictures)
    return Estimate(*(value / GIB for value in found))


SLACK = 1.0  # GiB that the CUDA context and the allocator take beside the tensors; 0.5 to 1.5


def preset_rows() -> list[str]:
    """A Markdown row for each file of config/presets/."""
    rows = [
        "| preset | resolution x batch | base | LoRA | activations | step | pictures | GiB in all |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family in SCRIPTS:
        script = load_script(family)
        for file in presets(family):
            args = preset_args(script, file)
            e = estimate(family, args, script)
            rows.append(
                f"| {described(file, args)} | {e.base:.1f} | {e.lora:.2f} | {e.activations:.1f} | {e.step:.1f} |"
                f" {e.pictures:.1f} | **{e.total:.1f}** |"
            )
    return rows


def presets(family: str) -> list[Path]:
    """The family's presets, the smallest card's first."""
    return sorted((ROOT / "config" / "presets").glob(f"{family}_*gb.yaml"), key=card_gib)


def card_gib(preset: Path) -> int:
    """sd15_8gb.yaml -> 8."""
    return int(preset.stem.split("_")[1][:-2])


def preset_args(script, file: Path):
    """The parsed flags of a preset."""
    return script.parse_args(["--config", str(file), "-m", "BASE", "-d", str(ROOT / "assets")])


def described(file: Path, args) -> str:
    """A preset's name, and the settings on which its memory depends: the first two cells of its row."""
    shape = " x ".join(map(str, (*args.resolution, args.train_batch_size)))
    how = [args.quantize_base, "checkpointing" if args.gradient_checkpointing else "", f"rank {args.rank}"]
    return f"{file.stem} | {shape} ({', '.join(filter(None, [*how, args.optimizer]))})"


def count_rows() -> list[str]:
    """A Markdown row for each case that was counted."""
    rows = ["| case | counted GiB | by formula | |", "| --- | --- | --- | --- |"]
    for case, counted in COUNTED.items():
        found = estimate_case(case).step
        rows.append(f"| {case} | {counted:.2f} | {found:.2f} | {found / counted - 1:+.1%} |")
    return rows


def estimate_case(case: str) -> Estimate:
    """The estimate of a case of count_step.py, family:size:batch[:flag[=value],...]: bf16, cached latents, rank 4."""
    family, size, batch, *flags = case.split(":", 3)
    script, words = load_script(family), ["--resolution", size, "--train_batch_size", batch, "--rank", "4"]
    for flag in flags[0].split(",") if flags else []:
        words += f"--{flag}".split("=", 1)
    common = ["-m", "BASE", "-d", str(ROOT / "assets"), "--mixed_precision", "bf16", "--cache_latents"]
    return estimate(family, script.parse_args([*common, *words]), script)


def main() -> None:
    parser = argparse.ArgumentParser(description="Estimates the GPU memory of a training step, without a GPU.")
    parser.add_argument("--family", choices=sorted(SCRIPTS), help="other flags are those of the family's script")
    parser.add_argument("--table", action="store_true", help="a table of all presets instead")
    parser.add_argument("--counts", action="store_true", help="a table of what was counted instead")
    known, rest = parser.parse_known_args()
    if known.table or known.counts:
        print("\n".join(preset_rows() if known.table else count_rows()))
        return
    if not known.family:
        parser.error("give --family, --table or --counts")
    script = load_script(known.family)
    args = script.parse_args(["-m", "BASE", "-d", str(ROOT / "assets"), "--mixed_precision", "bf16", *rest])
    e = estimate(known.family, args, script)
    parts = {"base": e.base, "LoRA": e.lora, "activations": e.activations, "unpacked": e.unpacked, "others": e.others}
    for name, value in parts.items():
        print(f"{name:>24} {value:7.2f} GiB")
    print(f"{'a step':>24} {e.step:7.2f} GiB")
    print(f"{'while pictures are drawn':>24} {e.pictures:7.2f} GiB")
    print(f"{'before, the VAE':>24} {e.latents:7.2f} GiB")
    print(f"{'at most':>24} {e.total:7.2f} GiB, and 0.5 to 1.5 for the CUDA context and the allocator")


if __name__ == "__main__":
    main()
