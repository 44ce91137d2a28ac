#!/usr/bin/env python
"""A whole training with lora.py and a loop of ten lines: train, compare, save, load, merge.

    python lora_example.py               # on the embedded toy base, in half a minute without a GPU
    python lora_example.py --base BASE_FOLDER --data my_pictures --resolution 512 \\
        --learning_rate 1e-4 --steps 1000

It shows how a LoRA is trained in code of your own. What it leaves out (buckets, caches, checkpoints, prior
preservation, …) the training scripts have: train_lora_sd15.py. For bases of Stable Diffusion 1.x/2.x.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from lora import (
    count_parameters,
    get_lora_parameters,
    load_lora,
    load_models,
    merge_lora_weights,
    save_lora,
    set_lora_enabled,
)

ROOT = Path(__file__).resolve().parent


def read_pictures(folder: Path, side: int) -> tuple[torch.Tensor, list[str]]:
    """Pictures of a folder with metadata.jsonl, as (N, 3, side, side) from -1 to 1, and their captions."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    images = [Image.open(folder / row["file_name"]).convert("RGB").resize((side, side)) for row in rows]
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images]) / 127.5 - 1
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), [row["text"] for row in rows]


def train(models: dict, folder: Path, side: int, steps: int, learning_rate: float, batch: int) -> list[float]:
    """Trains the LoRA of the models' denoiser on a folder of pictures; returns the losses."""
    unet, vae, device = models["diffusion"], models["vae"], models["diffusion"].device
    noise_scheduler = DDPMScheduler.from_config(models["scheduler"].config)
    pixels, captions = read_pictures(folder, side)
    with torch.no_grad():  # what does not change is computed once
        latents = vae.encode(pixels.to(device)).latent_dist.mean * vae.config.scaling_factor
        tokens = models["tokenizer"](captions, padding="max_length", truncation=True, return_tensors="pt")
        prompt_embeds = models["clip"](tokens.input_ids.to(device))[0]
    optimizer, losses = torch.optim.AdamW(get_lora_parameters(unet), lr=learning_rate), []
    generator = torch.Generator().manual_seed(0)

    for _ in range(steps):
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        timesteps = torch.randint(len(noise_scheduler), (batch,), generator=generator).to(device)
        noise = torch.randn(latents[chosen].shape, generator=generator).to(device)
        noisy_latents = noise_scheduler.add_noise(latents[chosen], noise, timesteps)
        model_pred = unet(noisy_latents, timesteps, prompt_embeds[chosen]).sample
        loss = torch.nn.functional.mse_loss(model_pred, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def draw(models: dict, prompt: str, side: int, count: int = 4) -> list[Image.Image]:
    """Pictures of a prompt, the same seeds each time."""
    pipeline = models["pipeline"]
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(models["scheduler"].config)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    size = {"width": side, "height": side}
    sampling = {"num_inference_steps": 20, "guidance_scale": 3.0}
    return pipeline([prompt] * count, generator=generators, **sampling, **size).images


def difference(first: list[Image.Image], second: list[Image.Image]) -> int:
    """The largest difference of any pixel, of 255."""
    pairs = zip(first, second, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def beside(*rows: list[Image.Image]) -> Image.Image:
    """Rows of pictures as one."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * width, len(rows) * height))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    return sheet


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Trains a LoRA with lora.py, compares, saves, loads, merges."
    )
    add, assets = parser.add_argument, ROOT / "assets"
    add("--base", default=str(assets / "toy_sd15"), help="folder or checkpoint (the toy)")
    add("--data", type=Path, default=assets / "sample_data" / "smiley", help="pictures")
    add("--output", type=Path, default=Path("output/lora_example"), help="(output/lora_example)")
    add("--prompt", default="a sks circle on a blue background", help="what is drawn to compare")
    add("--rank", type=int, default=8, help="(8)")
    add("--steps", type=int, default=400, help="(400)")
    add("--batch", type=int, default=4, help="pictures a step (4)")
    add("--learning_rate", type=float, default=4e-3, help="(4e-3; of a real base 1e-4)")
    add("--resolution", type=int, default=64, help="side of the pictures (64)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Trains, compares, saves, loads and merges; returns the exit code."""
    args = parse_args(argv)
    try:
        models, begun = load_models(args.base, args.device, lora_rank=args.rank), time.time()
        counts = count_parameters(models["diffusion"])
        print(f"LoRA of rank {args.rank}: {counts['lora']:,} parameters beside the base's {counts['base']:,}")
        losses = train(models, args.data, args.resolution, args.steps, args.learning_rate, args.batch)
    except (ValueError, OSError) as error:
        print(f"lora_example.py: error: {error}", file=sys.stderr)
        return 2
    tenth = max(1, len(losses) // 10)
    first, last = (sum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    print(f"{args.steps} steps in {time.time() - begun:.0f} s; loss {first:.3f} -> {last:.3f}")

    set_lora_enabled(models["diffusion"], False)  # the base alone
    without = draw(models, args.prompt, args.resolution)
    set_lora_enabled(models["diffusion"], True)
    trained = draw(models, args.prompt, args.resolution)
    args.output.mkdir(parents=True, exist_ok=True)
    beside(without, trained).save(args.output / "comparison.png")
    print(f"{args.output / 'comparison.png'}: the base above, with the LoRA below")

    file = save_lora(models["diffusion"], args.output / "lora.safetensors")
    print(f"{file}: {file.stat().st_size:,} bytes")
    fresh = load_models(args.base, args.device, apply_to_diffusion=False)
    load_lora(fresh["diffusion"], file)
    print(f"loaded: differs by {difference(trained, draw(fresh, args.prompt, args.resolution))} of 255")
    merge_lora_weights(fresh["diffusion"])
    print(f"merged: differs by {difference(trained, draw(fresh, args.prompt, args.resolution))} of 255")
    return 0


if __name__ == "__main__":
    sys.exit(main())
