"""Validation and control images: drawn, saved with prompt and seed, and sent to the trackers."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from lora_training.cli.prompt_files import PROMPT_KEYS
from lora_training.console import progress
from lora_training.files import atomic_write
from lora_training.optim.parts import averaged_weights
from lora_training.seeds import validation_seed
from lora_training.training.requests import pictures_are_skipped
from lora_training.validation.drawing import (
    decode_latents,
    draw_images,
    draw_latents,
    evaluation_mode,
    initial_weights,
    pipeline_embeds,
    scaled_lora,
)

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from lora_training.training.run import Run

CONTROL_IMAGES = 4  # one for each noise level of the probe
PIXELS_AT_ONCE = 2**17  # larger images are drawn one by one, for their memory


def shown_weights(run: Run, step: int) -> contextlib.AbstractContextManager:
    """While inside, weights are those that a step's pictures show: of the start, else moving averages."""
    return averaged_weights(run.parts) if step else initial_weights(run)


def draw_samples(run: Run, step: int, first: int = 0) -> list[Path]:
    """Draws the validation prompts with what is trained so far; writes samples/step-N/PROMPT_IMAGE_words.png.

    Returns the files, none on other processes than the main one. Image k of prompt p has a seed of its own
    that is the same at every step. At step 0 the weights are those of the start. first: of each prompt's
    images, the first that is drawn.
    """
    files, total = [], len(run.sample_prompts) * (run.pictures.per_prompt - first)
    if pictures_are_skipped(run):
        return files
    with (
        shown_weights(run, step),
        evaluation_mode(run),
        torch.no_grad(),
        progress(f"pictures at step {step}", total) as bar,
        run.pictures.timed(total, run.pictures.inference_steps),
    ):
        pipeline = run.components.pipeline(run.denoiser)
        for number, prompt in enumerate(run.sample_prompts):
            for image_number, seed, image in draw_prompt(run, pipeline, number, first):
                if run.accelerator.is_main_process:
                    name = f"{number:02d}_{image_number:02d}"
                    files.append(save_sample(run, step, name, prompt, seed, image))
                bar.update()
                if pictures_are_skipped(run):
                    return files
    return files


def draw_prompt(run: Run, pipeline, number: int, first: int = 0) -> Iterator[tuple[int, int, Image.Image]]:
    """Yields (number of the image, its seed, the image) for the images of one validation prompt.

    Settings of --validation_prompts_file are the prompt's own.
    """
    args = run.args
    settings = args.prompt_settings[number] if args.prompt_settings else {}
    prompt, negative_prompt = run.sample_prompts[number], settings.get("negative_prompt", "")
    embeds = pipeline_embeds(run, prompt, negative_prompt)
    width, height = run.validation_size
    size = (settings.get("width", width), settings.get("height", height))
    flags = {PROMPT_KEYS[key][1]: value for key, value in settings.items()}
    flags = {"validation_inference_steps": run.pictures.inference_steps} | flags
    prompt_args = argparse.Namespace(**vars(args) | flags)
    batch_size = max(1, PIXELS_AT_ONCE // math.prod(size))
    for begin in range(first, run.pictures.per_prompt, batch_size):
        numbers = range(begin, min(begin + batch_size, run.pictures.per_prompt))
        if "seed" in settings:
            seeds = [settings["seed"] + k for k in numbers]
        else:
            seeds = [validation_seed(args.seed, number, k) for k in numbers]
        with scaled_lora(run.parts, settings.get("lora_scale", 1.0)):
            autocast = run.autocast()
            images = draw_images(pipeline, run.components, embeds, seeds, size, prompt_args, autocast)
        yield from zip(numbers, seeds, images, strict=True)


def draw_control_images(run: Run, step: int, probing: bool = False) -> list[torch.Tensor]:
    """Draws pictures of the control prompts, where the run compares before and after.

    Returns their latents, each (1, C, H, W). probing: there are CONTROL_IMAGES of them, to be measured on,
    and their pictures are written only if the budget says so.
    """
    latents, prompts, pictures = [], run.control_prompts, run.pictures
    count = CONTROL_IMAGES if probing else pictures.controls
    steps = pictures.probed_steps if probing else pictures.inference_steps
    saves = run.draws_comparison and (pictures.shows_probed or not probing)
    if not count:
        return latents
    args = argparse.Namespace(**vars(run.args) | {"validation_inference_steps": steps})
    with (
        shown_weights(run, step),
        evaluation_mode(run),
        torch.no_grad(),
        progress("control pictures", count) as bar,
        pictures.timed(count, steps),
    ):
        pipeline = run.components.pipeline(run.denoiser)
        for number in range(count):
            if not probing and pictures_are_skipped(run):
                break
            prompt = prompts[number % len(prompts)]
            seed = validation_seed(run.args.seed, -1, number)
            embeds, size = pipeline_embeds(run, prompt), run.validation_size
            latents.append(draw_latents(pipeline, embeds, [seed], size, args, run.autocast()))
            bar.update()
            if saves and run.accelerator.is_main_process:
                (image,) = decode_latents(pipeline, run.components, latents[-1])
                save_sample(run, step, f"control_{number}", prompt, seed, image)
    return latents


def save_sample(run: Run, step: int, name: str, prompt: str, seed: int, image: Image.Image) -> Path:
    """Writes samples/step-N/NAME_words.png, with prompt, seed, step, ... as texts in the file."""
    folder = Path(run.args.output_dir) / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    letters = "".join(character if character.isalnum() else " " for character in prompt)
    words = "-".join(letters.split())[:48]
    kind = "control" if name.startswith("control") else "validation"
    texts = PngImagePlugin.PngInfo()
    values = {"prompt": prompt, "seed": seed, "step": step, "kind": kind}
    for key, value in (values | {"inference_steps": run.pictures.inference_steps}).items():
        texts.add_itxt(key, str(value))
    file = folder / f"{name}_{words}.png"
    with atomic_write(file) as temporary:
        image.save(temporary, pnginfo=texts)
    return file


def draw_and_log_samples(run: Run, step: int) -> None:
    """Draws the validation prompts and sends the images to the trackers that show any."""
    files = draw_samples(run, step)
    if run.accelerator.is_main_process:
        for tracker in run.accelerator.trackers:
            log_samples(tracker, files, run.sample_prompts, step)


def log_samples(tracker: GeneralTracker, files: list[Path], prompts: list[str], step: int) -> None:
    """Sends pictures and their prompts to a tracker as its `log_images` takes them, if it has one."""
    pictures = [(f"validation/{file.name[:5]}", file, prompts[int(file.name[:2])]) for file in files]
    match tracker.name:
        case "tensorboard":
            batches = {name: np.asarray(Image.open(file))[None] for name, file, _ in pictures}
            tracker.log_images(batches, step, dataformats="NHWC")
        case "wandb":
            import wandb

            shown = [wandb.Image(str(file), caption=prompt) for _, file, prompt in pictures]
            tracker.log_images({"validation": shown}, step)
        case "swanlab":
            tracker.log_images({"validation": [Image.open(file) for _, file, _ in pictures]}, step)
        case "aim":
            tracker.log_images({name: (Image.open(file), prompt) for name, file, prompt in pictures}, step)
        case "trackio":  # accelerate's tracker for it logs numbers alone
            import trackio

            shown = {name: trackio.Image(str(file), caption=prompt) for name, file, prompt in pictures}
            tracker.log(shown, step)
        case "clearml":
            tracker.log_images({name: Image.open(file) for name, file, _ in pictures}, step)
