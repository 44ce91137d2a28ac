"""Pictures drawn while training."""

from __future__ import annotations

import argparse
import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from lora_training.adapter_names import LINEAR_FACTORS
from lora_training.base_model.reading import reading_base
from lora_training.base_model.vae import unpack_output, unscale_latents
from lora_training.cli.prompt_files import PROMPT_KEYS
from lora_training.console import progress
from lora_training.files import atomic_write
from lora_training.optim.parts import TrainedPart, averaged_weights, restored_afterwards
from lora_training.seeds import validation_seed

if TYPE_CHECKING:
    from lora_training.base_model.components import Components
    from lora_training.training.run import Run


def draw_samples(run: Run, step: int) -> list[Path]:
    """Draws the validation prompts with what is trained so far; files samples/step-N/PROMPT_IMAGE_words.png.

    Image k of prompt p has a seed of its own that is the same at every step.
    """
    args = run.args
    files, total = [], len(run.sample_prompts) * args.num_validation_images
    with (
        averaged_weights(run.parts),
        evaluating(run),
        torch.no_grad(),
        progress(f"pictures at step {step}", total) as bar,
    ):
        pipeline = run.components.pipeline(run.denoiser)
        for p, prompt in enumerate(run.sample_prompts):
            own = args.prompt_settings[p] if args.prompt_settings else {}  # of --validation_prompts_file
            embeds = run.prompts.for_pipeline(prompt, own.get("negative_prompt", ""))
            embeds = {k: v.to(run.components.dtype) for k, v in embeds.items()}
            size = own.get("width", run.plan_size[0]), own.get("height", run.plan_size[1])
            settings = argparse.Namespace(**vars(args) | {PROMPT_KEYS[k][1]: v for k, v in own.items()})
            together = max(1, 2**17 // math.prod(size))  # large pictures singly, for their memory
            for begin in range(0, args.num_validation_images, together):
                numbers = range(begin, min(begin + together, args.num_validation_images))
                seeds = [
                    own["seed"] + k if "seed" in own else validation_seed(args.seed, p, k) for k in numbers
                ]
                with scaled_lora(run.parts, own.get("lora_scale", 1.0)):
                    context = run.autocast()
                    images = sample_images(pipeline, run.components, embeds, seeds, size, settings, context)
                bar.update(len(images))
                for k, seed, image in zip(numbers, seeds, images, strict=True):
                    if run.accelerator.is_main_process:
                        files.append(save_sample(run, step, f"{p:02d}_{k:02d}", prompt, seed, image))
    return files


@contextlib.contextmanager
def scaled_lora(parts: list[TrainedPart], scale: float):
    """While inside, the LoRA's update counts `scale` times."""
    changed = parts if scale != 1 else []
    with restored_afterwards(changed):
        for part in changed:
            for name, view in part.views(part.weights.data).items():
                view.mul_(scale if any(factor in name for factor in LINEAR_FACTORS) else 1.0)
            part.update_shadow()
        yield


def save_sample(run: Run, step: int, number: str, prompt: str, seed: int, image) -> Path:
    """Writes samples/step-N/NUMBER_words.png, with prompt, seed and step in its text."""
    folder = Path(run.args.output_dir) / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    words = "-".join("".join(c if c.isalnum() else " " for c in prompt).split())[:48]
    text = PngImagePlugin.PngInfo()
    kind = "control" if number.startswith("control") else "validation"
    for key, value in {"prompt": prompt, "seed": seed, "step": step, "kind": kind}.items():
        text.add_itxt(key, str(value))
    file = folder / f"{number}_{words}.png"
    with atomic_write(file) as part:
        image.save(part, pnginfo=text)
    return file


def log_samples(run: Run, step: int) -> None:
    """Draws samples and sends them to TensorBoard or W&B."""
    files = draw_samples(run, step)
    for tracker in run.accelerator.trackers if run.accelerator.is_main_process else []:
        if tracker.name == "tensorboard":
            for file in files:
                tracker.writer.add_image(
                    f"validation/{file.name[:5]}", np.asarray(Image.open(file)), step, dataformats="HWC"
                )
        elif tracker.name == "wandb":
            import wandb

            pictures = [wandb.Image(str(f), caption=run.sample_prompts[int(f.name[:2])]) for f in files]
            tracker.log({"validation": pictures}, step=step)


def sample_images(
    pipeline, components: Components, embeds: dict, seeds: list[int], size, args, context
) -> list:
    """Draws one image of a size (width, height) per seed, with one prompt's embeddings. `context` (autocast)
    holds for the denoiser alone: the VAE decodes in its own precision, so that a float32 one stays float32.
    """
    return decode_latents(
        pipeline, components, sample_latents_of(pipeline, embeds, seeds, size, args, context)
    )


def decode_latents(pipeline, components: Components, latents) -> list:
    """Latents (B, C, H, W) as the denoiser works on them -> images."""
    vae, latents = components.vae(), unscale_latents(latents, components.config("vae"))
    with torch.no_grad(), reading_base("the vae"):
        pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
    return pipeline.image_processor.postprocess(pixels.float())


def sample_latents_of(pipeline, embeds: dict, seeds: list[int], size: tuple[int, int], args, context):
    """What the denoiser draws with one prompt's embeddings, as it works on it: (number of seeds, C, H, W)."""
    with context:
        latents = pipeline(
            **{k: v.repeat_interleave(len(seeds), dim=0) for k, v in embeds.items()},
            width=size[0],
            height=size[1],
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            output_type="latent",
        ).images
    return unpack_output(latents, size)


@contextlib.contextmanager
def evaluating(run: Run):
    """Trained modules in evaluation mode, the VAE on the device, and text embeddings of this moment; all put
    back after.
    """
    modules = {m: m.training for m in (run.denoiser, *run.lora_modules.values())}
    vae = run.components.vae()
    run.prompts.forget()
    for module in modules:
        module.eval()
    vae.to(run.accelerator.device)
    try:
        with torch.compiler.set_stance("force_eager"):  # other shapes than in training would be compiled anew
            yield
    finally:
        for module, training in modules.items():
            module.train(training)
        run.prompts.forget()
        if run.args.offload and run.args.cache_latents:  # else each step encodes
            vae.to("cpu")
