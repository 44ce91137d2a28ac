"""Drawing with the models of a training: what samples, class images and probes have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from lora_training.adapter_names import LINEAR_FACTORS
from lora_training.base_model.reading import reading_base
from lora_training.base_model.vae import unpack_output, unscale_latents
from lora_training.optim.parts import TrainedPart, restored_afterwards

if TYPE_CHECKING:
    import argparse

    from PIL import Image

    from lora_training.base_model.components import Components
    from lora_training.training.run import Run


def draw_images(
    pipeline,
    components: Components,
    embeds: dict[str, torch.Tensor],
    seeds: list[int],
    size: tuple[int, int],
    args: argparse.Namespace,
    autocast: contextlib.AbstractContextManager,
) -> list[Image.Image]:
    """Draws one image per seed with one prompt's embeddings. The arguments are those of `draw_latents`.

    autocast holds for the denoiser alone: the VAE decodes in its own precision, so that a float32 one stays
    float32.
    """
    latents = draw_latents(pipeline, embeds, seeds, size, args, autocast)
    return decode_latents(pipeline, components, latents)


def draw_latents(
    pipeline,
    embeds: dict[str, torch.Tensor],
    seeds: list[int],
    size: tuple[int, int],
    args: argparse.Namespace,
    autocast: contextlib.AbstractContextManager,
) -> torch.Tensor:
    """What the denoiser draws, as it works on it: (number of seeds, C, H, W).

    embeds: one prompt's, (1, ...), by the pipeline's names for them; size: (width, height) in pixels.
    """
    with autocast:
        latents = pipeline(
            **{name: value.repeat_interleave(len(seeds), dim=0) for name, value in embeds.items()},
            width=size[0],
            height=size[1],
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
        ).images
    return unpack_output(latents, size)


def decode_latents(pipeline, components: Components, latents: torch.Tensor) -> list[Image.Image]:
    """Latents (B, C, H, W) as the denoiser works on them -> images."""
    vae, latents = components.vae(), unscale_latents(latents, components.config("vae"))
    with torch.no_grad(), reading_base("the vae"):
        pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
    return pipeline.image_processor.postprocess(pixels.float())


def pipeline_embeds(run: Run, prompt: str, negative_prompt: str = "") -> dict[str, torch.Tensor]:
    """A prompt's embeddings as the pipeline takes them, in the base's precision."""
    embeds = run.prompts.for_pipeline(prompt, negative_prompt)
    return {name: value.to(run.components.dtype) for name, value in embeds.items()}


@contextlib.contextmanager
def scaled_lora(parts: list[TrainedPart], scale: float) -> Iterator[None]:
    """While inside, the LoRA's update is multiplied by `scale`."""
    if scale == 1:
        yield
        return
    with restored_afterwards(parts):
        for part in parts:
            for name, view in part.views(part.weights.data).items():
                if any(factor in name for factor in LINEAR_FACTORS):
                    view.mul_(scale)
            part.update_shadow()
        yield


@contextlib.contextmanager
def initial_weights(run: Run) -> Iterator[None]:
    """While inside, what is trained has its weights of the start, so that the run draws as it did then."""
    with restored_afterwards(run.parts):
        for part in run.parts:
            part.assign(part.initial)
        try:
            yield
        finally:
            run.prompts.forget()


@contextlib.contextmanager
def evaluation_mode(run: Run) -> Iterator[None]:
    """While inside, trained modules are in evaluation mode and the VAE is on the device.

    Text embeddings are those of this moment. All of it is undone afterwards.
    """
    modules = {module: module.training for module in (run.denoiser, *run.lora_modules.values())}
    vae = run.components.vae()
    run.prompts.forget()
    for module in modules:
        module.eval()
    vae.to(run.accelerator.device)
    try:
        with torch.compiler.set_stance("force_eager"):  # other shapes than in training would be compiled anew
            yield
    finally:
        for module, was_training in modules.items():
            module.train(was_training)
        run.prompts.forget()
        if run.args.offload and run.args.cache_latents:  # else each step encodes
            vae.to("cpu")
