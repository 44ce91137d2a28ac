"""What a toy base draws itself, to be trained on beside the pictures of the world.

A base that has met noise on perfect pictures alone doesn't know its own half-finished ones, and its errors
add up on the way to a picture. So half of what it is trained on are states from its own sampling, and the
target of each is the ideal picture nearest to what it drew (DAgger, https://arxiv.org/abs/1011.0686).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch

from scripts.dev.toys.parts.toy_autoencoder import encode_pictures
from scripts.dev.toys.parts.toy_families import UNETS
from scripts.dev.toys.parts.toy_models import ToyBase
from scripts.dev.toys.parts.toy_outline import nearest_picture
from scripts.dev.toys.parts.toy_scores import SAMPLING
from scripts.dev.toys.parts.toy_text import SHORT_CLIP_LENGTH, encode, tokenize
from scripts.dev.toys.parts.toy_world import SIZE, describe, random_scene

DRAWINGS = 1024  # at a time
PER_CALL = 64
# shares of noise at which they are shown; with more a base is sharper, and a LoRA learns worse
SHOWN_LEVELS = 0.12, 0.8
# T5 attends to its padding, so the base must know several lengths; a short one costs a third of a long one
T5_LENGTHS = (*(16,) * 9, 32, 77, 128)
GUIDED = ("sd15", "sd3")  # SDXL's pipeline is guided away from zeros, FLUX.1's not at all


@dataclass
class Drawings:
    """What a base drew, and what it should have drawn."""

    captions: list[str]
    states: torch.Tensor  # (N, S, C, H, W): latents on the way
    times: torch.Tensor  # (S,), as the denoiser reads them: a UNet timesteps, a transformer noise levels
    shown: list[int]  # of these states, those at SHOWN_LEVELS
    ideals: torch.Tensor  # (N, C, H, W): latents of the ideal pictures nearest to what was drawn

    def sample(self, count: int, rng: random.Random) -> tuple[list[str], tuple[torch.Tensor, ...]]:
        """`count` captions; and of each one's drawing a state (count, C, H, W), its time (count,), and the
        ideal latents (count, C, H, W).
        """
        rows = [rng.randrange(len(self.captions)) for _ in range(count)]
        steps = rng.choices(self.shown, k=count)
        captions = [self.captions[row] for row in rows]
        return captions, (self.states[rows, steps], self.times[steps], self.ideals[rows])


@torch.no_grad()
def draw_with_base(base: ToyBase, pipeline, seed: int) -> Drawings:
    """Has a base draw captions of the world. A drawing that is nothing like its caption is left out.

    Errors: SystemExit if most are.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    sampling = SAMPLING[type(pipeline).__name__]
    pipeline.set_progress_bar_config(disable=True)
    captions, states, ideals, tries = [], [], [], 0
    path: list[torch.Tensor] = []  # the latents (B, C, H, W) after each step of one call

    def record(pipeline, i, timestep, values):
        latents = values["latents"]
        path.append(pipeline._unpack_latents(latents, SIZE, SIZE, 8) if base.name == "flux" else latents)
        return {}

    while len(captions) < DRAWINGS:
        if tries >= 4 * DRAWINGS:
            problem = f"only {len(captions)} of {tries} drawings are like their captions"
            raise SystemExit(f"{problem}: this base draws too badly")
        tries += PER_CALL
        prompts = [describe(*random_scene(rng), rng) for _ in range(PER_CALL)]
        embeds = encode_for_pipeline(base, prompts, rng.choice(T5_LENGTHS), pipeline.vae.device)
        path.clear()
        size = {"height": SIZE, "width": SIZE}
        images = pipeline(
            **embeds, **sampling, **size, generator=generator, callback_on_step_end=record
        ).images
        for row, (image, caption) in enumerate(zip(images, prompts, strict=True)):
            if ideal := nearest_picture(image, caption):
                captions.append(caption)
                states.append(torch.stack([latents[row] for latents in path[:-1]]))
                ideals.append(torch.from_numpy(np.array(ideal)).permute(2, 0, 1))
    ideal_latents = encode_pictures(pipeline.vae, torch.stack(ideals), pipeline.vae.device)
    ideal_latents = ideal_latents * pipeline.vae.config.scaling_factor
    times, levels = times_of_states(base, pipeline, len(path))
    shown = [i for i, level in enumerate(levels.tolist()) if SHOWN_LEVELS[0] <= level <= SHOWN_LEVELS[1]]
    return Drawings(captions, torch.stack(states), times, shown, ideal_latents)


def encode_for_pipeline(base: ToyBase, prompts: list[str], t5_length: int, device) -> dict:
    """Prompts as the pipeline's arguments, with those of the empty prompt where it is guided."""
    embeds = {}
    sides = {"": prompts} | ({"negative_": [""] * len(prompts)} if base.name in GUIDED else {})
    for prefix, texts in sides.items():
        captions = [texts] * len(base.tokenizers)
        ids = [i.to(device) for i in tokenize(base.name, base.tokenizers, captions, t5_length)]
        if not base.is_unet:
            ids = [*(i[:, :SHORT_CLIP_LENGTH] for i in ids[:-1]), ids[-1]]
        hidden, pooled = encode(base.name, base.text_encoders, ids)
        embeds[f"{prefix}prompt_embeds"] = hidden
        if pooled is not None:
            embeds[f"{prefix}pooled_prompt_embeds"] = pooled
    return embeds


def times_of_states(base: ToyBase, pipeline, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(times, noise levels), (S,) each, of the states of a drawing of so many steps: of all but the last."""
    from diffusers.training_utils import compute_snr

    device = pipeline.vae.device
    if base.name in UNETS:
        times = pipeline.scheduler.timesteps[1:].to(device)
        noise = compute_snr(pipeline.scheduler, times).rsqrt()
        return times, noise / (1 + noise)
    levels = pipeline.scheduler.sigmas[1:steps].to(device)
    return levels, levels
