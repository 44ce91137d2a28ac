"""A plain loop of peft and accelerate as a measured program: what short example scripts do.

bf16 by autocast, float32 LoRA, autograd's gradients, a loss that is read in each step, one batch that lies on
the device. A quantised base is bf16 here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lora_training.lora.adapters import find_target_layers
from scripts.dev.benchmarks.programs import flatten, fresh_process, initialize_lora
from scripts.dev.benchmarks.project_script import FirstSteps
from scripts.dev.benchmarks.step_clock import STEPS, Clock
from scripts.dev.recipes import load_recipe


def run_plain_loop(args: argparse.Namespace, folder: Path, clock: Clock, record: FirstSteps) -> None:
    """Trains the base in `folder` to the clock's last tick. The first step's gradients go to `clock.results`.

    record: of a run of the project's script, for its batch.
    """
    import accelerate
    import diffusers
    import tqdm.auto
    from diffusers.optimization import get_scheduler

    recipe, family = load_recipe(args.family.name), args.family
    with fresh_process():
        accelerator = accelerate.Accelerator(mixed_precision="bf16")
        vae_config = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
        denoiser = load_denoiser(args, folder, accelerator.device)
        trained = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(list(trained.values()), args)
        schedule = get_scheduler("constant", optimizer)
        scheduler_class = getattr(diffusers, family.training_scheduler)
        scheduler = scheduler_class.from_pretrained(folder, subfolder="scheduler")
        denoiser, optimizer, schedule = accelerator.prepare(denoiser, optimizer, schedule)
        embeds = {name: value.to(torch.bfloat16) for name, value in record.embeds.items()}
        bar = tqdm.auto.tqdm(total=STEPS)
        while True:
            with accelerator.accumulate(denoiser):
                batch = dict(record.batch)
                latents = recipe.sample_latents(batch["moments"], batch["posterior_noise"], vae_config)
                clock.stamp("forward")
                losses = recipe.compute_loss(batch, latents, embeds, denoiser, scheduler, args)
                loss = (losses * batch["weight"]).sum()
                accelerator.backward(loss)
                if not clock.count:
                    clock.results["gradients"] = flatten({name: p.grad for name, p in trained.items()})
                accelerator.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                loss.item()
            bar.update()


def load_denoiser(args: argparse.Namespace, folder: Path, device: torch.device) -> torch.nn.Module:
    """The denoiser in bf16 with peft's LoRA in float32."""
    import diffusers
    import peft
    from diffusers.training_utils import cast_training_params

    name, recipe = args.family.denoiser, load_recipe(args.family.name)
    config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
    denoiser_class = getattr(diffusers, config["_class_name"])
    denoiser = denoiser_class.from_pretrained(folder, subfolder=name, dtype=torch.bfloat16)
    denoiser.requires_grad_(False).to(device).train()
    idle = recipe.idle_layers(name, denoiser.config, args)
    targets = find_target_layers(denoiser, args, recipe.LORA_TARGETS, idle)
    denoiser.add_adapter(peft.LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=targets))
    cast_training_params(denoiser, torch.float32)
    initialize_lora(denoiser)
    if args.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    if args.compile:
        denoiser.compile_repeated_blocks()
    return denoiser


def make_optimizer(parameters: list[torch.nn.Parameter], args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer as its library gives it."""
    settings = {"lr": args.learning_rate, "weight_decay": args.adam_weight_decay}
    if args.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings)
