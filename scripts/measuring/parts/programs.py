"""The programs whose steps are timed: the project's training script, a plain loop, and diffusers' example script.

Each is told to train STEPS steps on a base of random weights, and is ended by the clock.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import runpy
import signal
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import MagicMock, patch

from scripts.measuring.parts.random_bases import drawn
from scripts.measuring.parts.step_clock import STEPS, Clock
from scripts.parts.training_scripts import load_script

EXAMPLES = {  # of diffusers: those that train the same layers and can cache latents
    "sd15": "advanced_diffusion_training/train_dreambooth_lora_sd15_advanced.py",
    "sdxl": "advanced_diffusion_training/train_dreambooth_lora_sdxl_advanced.py",
    "sd3": "dreambooth/train_dreambooth_lora_sd3.py",
    "flux": "dreambooth/train_dreambooth_lora_flux.py",
}
SEEN_STEPS = 3  # the first ones, whose gradients are kept for comparison


@dataclass
class Seen:
    """What a run of the project's script shows of its first steps: the batch, and the gradients by step."""

    batch: dict | None = None
    embeds: dict | None = None
    gradients: dict[int, object] = field(default_factory=dict)  # (N,) float32 on the CPU, in the order of names


class Enough(BaseException):
    """Ends a run of which only the first gradients are wanted."""


@functools.cache
def script_of(family: str):
    """The family's training script as a module."""
    return load_script(family)


def flat(gradients: dict):
    """Gradients by name -> one tensor on the CPU, whose order depends on the names alone."""
    import torch

    return torch.cat([gradients[name].detach().float().cpu().flatten() for name in sorted(gradients)])


def begin_lora(module) -> None:
    """Gives a LoRA weights that depend on their names, small beside the base's, and none 0: its partner has no gradient."""
    for name, parameter in module.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            value = drawn(name, parameter.shape, parameter.dtype, parameter.device)
            parameter.data.copy_(value * (0.1 if "lora_B" in name else 1.0))


TRIALS = ("channels_last", "cudnn_attention", "kept_attention")  # what a case can try that is no flag of the scripts


def case_words(flags: list[str]) -> list[str]:
    """["rank=8", "compile"] -> the words of a command line."""
    return [word for flag in flags if flag not in TRIALS for word in f"--{flag}".split("=", 1)]


@contextlib.contextmanager
def tried(family: str, flags: list[str], kind: str):
    """While inside, what a case tries (TRIALS) is so: a UNet's pictures with their channels last, cuDNN's attention alone,
    and in our own program checkpointing that keeps what attention gave. What a script has changed in diffusers is undone.
    """
    import torch.utils.checkpoint
    from diffusers.models.transformers import transformer_flux

    script, cuda, library = script_of(family), torch.backends.cuda, torch.utils.checkpoint
    keeps = "kept_attention" in flags and kind == "ours"
    if keeps and "gradient_checkpointing" not in flags:
        raise ValueError("kept_attention means nothing without gradient_checkpointing")
    lighten, others = script.lighten, (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp)

    def channels_last(denoiser) -> None:
        lighten(denoiser)
        denoiser.to(memory_format=torch.channels_last)

    def keeping(*given, checkpoint=library.checkpoint, context_fn=library.noop_context_fn, **options):
        kinds = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
        kept = [getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default for kind in kinds]

        def contexts():
            pairs = zip(library.create_selective_checkpoint_contexts(kept), context_fn(), strict=True)
            return tuple(both(*pair) for pair in pairs)

        return checkpoint(*given, context_fn=contexts, **options)

    for switch in others:
        switch("cudnn_attention" not in flags)
    try:
        with (
            patch.object(script, "lighten", channels_last if "channels_last" in flags else lighten),
            patch.object(library, "checkpoint", keeping if keeps else library.checkpoint),
            patch.object(transformer_flux, "apply_rotary_emb", transformer_flux.apply_rotary_emb),
        ):
            yield
    finally:
        for switch in others:
            switch(True)


@contextlib.contextmanager
def both(outer, inner):
    """Two contexts as one."""
    with outer, inner:
        yield


def common_words(output: Path, base: Path, pictures: Path, size: int, batch: int) -> list[str]:
    """The words that the project's scripts and diffusers' examples share."""
    words = ["--pretrained_model_name_or_path", base, "--output_dir", output, "--resolution", size]
    words += ["--instance_data_dir", pictures, "--instance_prompt", "a picture", "--train_batch_size", batch]
    words += ["--mixed_precision", "bf16", "--cache_latents", "--max_train_steps", STEPS, "--rank", 4, "--seed", 0]
    return [str(word) for word in words]


def arguments(family: str, words: list[str], flags: list[str]):
    """The project's parsed arguments. Errors: SystemExit after a line on stderr, UserError."""
    words = [*words, "--report_to", "none", "--num_validation_images", "0", "--learning_rate"]
    words += ["1" if "optimizer=prodigy" in flags else "1e-8"]  # so small that steps can be compared
    return script_of(family).parse_args([*words, *case_words(flags)])


@contextlib.contextmanager
def fresh_process():
    """As if the program were a process of its own: accelerate's state, and afterwards the signals' answers."""
    import accelerate

    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()
    answers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, answer in answers.items():
            signal.signal(number, answer)


def free_memory() -> None:
    """Gives back what an ended program held; to be called when no frame of it is left, so after its exception."""
    import gc

    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def run_project(family: str, args, clock: Clock, seen: Seen, only_gradients: bool = False) -> None:
    """Runs the training script itself, from its first line to the clock's last tick."""
    import safetensors
    import torch

    script = script_of(family)
    add_lora, batch_loss, backward, compute_loss = (
        script.add_lora,
        script.batch_loss,
        script.backward,
        script.compute_loss,
    )

    def with_lora(module, *rest) -> None:
        add_lora(module, *rest)
        begin_lora(module)

    def noted_loss(run, batch, embeds):
        if seen.batch is None:
            seen.batch = {k: v.clone() if torch.is_tensor(v) else v for k, v in batch.items()}
            seen.embeds = {k: v.clone() for k, v in embeds.items()}
        return batch_loss(run, batch, embeds)

    def noted_backward(run, batch, step, micro):
        loss = backward(run, batch, step, micro)
        if step < SEEN_STEPS and step not in seen.gradients:
            (part,) = run.parts
            seen.gradients[step] = flat(part.split(part.gradients))
            if only_gradients and step == SEEN_STEPS - 1:
                raise Enough
        return loss

    def stamped_loss(*rest):
        clock.stamp("forward")
        return compute_loss(*rest)

    with (
        patch.object(script, "add_lora", with_lora),
        patch.object(script, "batch_loss", noted_loss),
        patch.object(script, "backward", noted_backward),
        patch.object(script, "compute_loss", stamped_loss),
        patch.object(script, "safe_open", safetensors.safe_open),  # the one that makes weights up
        fresh_process(),
        script.locked_output(args),
    ):
        script.execute(args)


def run_plain(family: str, args, base: Path, clock: Clock, seen: Seen) -> None:
    """A plain loop of peft and accelerate on one batch that lies on the device: what short example scripts do.

    bf16 by autocast, float32 LoRA, autograd's own gradients, a loss that is read in each step. A quantised base is bf16 here.
    seen: a run of the project's script, for its batch. The first step's gradients go to `clock.found`.
    """
    import accelerate
    import diffusers
    import peft
    import torch
    import tqdm.auto
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import cast_training_params

    script = script_of(family)
    with fresh_process():
        accelerator = accelerate.Accelerator(mixed_precision="bf16")
        kind, config = (
            json.loads((base / part / "config.json").read_text(encoding="utf-8")) for part in (script.DENOISER, "vae")
        )
        kind = getattr(diffusers, kind["_class_name"])
        denoiser = kind.from_pretrained(base, subfolder=script.DENOISER, dtype=torch.bfloat16)
        denoiser.requires_grad_(False).to(accelerator.device).train()
        targets = script.lora_targets(denoiser, args)
        denoiser.add_adapter(peft.LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=targets))
        cast_training_params(denoiser, torch.float32)
        begin_lora(denoiser)
        trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        if args.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if args.compile:
            denoiser.compile_repeated_blocks()
        optimizer = plain_optimizer(list(trained.values()), args)
        schedule = get_scheduler("constant", optimizer)
        scheduler = getattr(diffusers, script.TRAINING_SCHEDULER).from_pretrained(base, subfolder="scheduler")
        denoiser, optimizer, schedule = accelerator.prepare(denoiser, optimizer, schedule)
        embeds = {name: value.to(torch.bfloat16) for name, value in seen.embeds.items()}
        bar = tqdm.auto.tqdm(total=STEPS)
        while True:
            with accelerator.accumulate(denoiser):
                batch = dict(seen.batch)
                latents = script.sample_latents(batch["moments"], batch["posterior_noise"], config)
                clock.stamp("forward")
                loss = script.compute_loss(batch, latents, embeds, denoiser, scheduler, args) * batch["weight"]
                loss = loss.sum()
                accelerator.backward(loss)
                if not clock.count:
                    clock.found["gradients"] = flat({name: p.grad for name, p in trained.items()})
                accelerator.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                loss.item()
            bar.update()


def plain_optimizer(parameters: list, args):
    """The optimizer as its library gives it."""
    import torch

    rest = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    if args.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **rest)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, **rest)
    return torch.optim.AdamW(parameters, **rest)


def run_example(script: Path, words: list[str], flags: list[str], run_name: str) -> None:
    """Runs one of diffusers' example scripts as it is. flags: those of a case; run_name: as runpy has it."""
    import diffusers
    from PIL import Image  # noqa: F401  (before a stand-in for torchvision is there)

    flags = ["use_8bit_adam" if flag == "optimizer=adamw8bit" else flag for flag in flags]
    words = [*words, *case_words(flags), *(["--learning_rate", "1"] if "optimizer=prodigy" in flags else [])]
    encode = diffusers.AutoencoderKL.encode

    def cast(vae, pixels, *rest, **named):  # SD3's with --cache_latents and bf16 gives a float32 VAE bfloat16 pixels
        return encode(vae, pixels.to(vae.dtype), *rest, **named)

    stand_in = {} if importlib.util.find_spec("torchvision") else torchvision()
    with (
        patch.object(diffusers.utils, "check_min_version"),  # it may be of a later day than the library
        patch.object(diffusers.AutoencoderKL, "encode", cast),
        patch.object(sys, "argv", [str(script), *words]),
        patch.dict(os.environ),
        fresh_process(),
    ):
        sys.modules.update(stand_in)
        try:
            runpy.run_path(str(script), run_name=run_name)
        finally:
            for name in stand_in:  # these alone: other libraries, once imported, can't be imported again
                del sys.modules[name]


def torchvision() -> dict[str, object]:
    """A stand-in where it isn't installed: the pictures have the right size, so that nothing needs to be cut."""
    import numpy as np
    import torch

    same, transforms = MagicMock(side_effect=lambda image, *_: image), MagicMock()
    same.get_params.return_value = (0, 0, 1, 1)
    for cut in ("Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip"):
        getattr(transforms, cut).return_value = same
    transforms.functional.crop = transforms.functional.hflip = same
    transforms.Compose.return_value = lambda i: torch.from_numpy(np.array(i, "f4")).permute(2, 0, 1) / 127.5 - 1
    modules = {"torchvision.transforms": transforms, "torchvision.transforms.functional": transforms.functional}
    return {"torchvision": types.SimpleNamespace(transforms=transforms)} | modules
