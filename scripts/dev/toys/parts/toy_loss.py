"""The losses of the toy bases: noise prediction for UNets, rectified flow for transformers.

Some of the samples may be states of the base's own drawings (toy_drawings.py), which have an ideal picture
instead of noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from scripts.dev.toys.parts.toy_families import LATENT_CHANNELS
from scripts.dev.toys.parts.toy_models import ToyBase
from scripts.dev.toys.parts.toy_world import SIZE

# (states (N, C, H, W), their timesteps or noise levels (N,), ideal latents (N, C, H, W))
DrawnStates = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def compute_loss(
    base: ToyBase, scheduler, latents, embeds, pooled, dropped, generator, drawn: DrawnStates | None = None
) -> torch.Tensor:
    """The loss of a batch. latents: (B, C, H, W), of pictures of the world.

    embeds (B + N, L, D), pooled (B + N, P): of the latents' captions, then of the drawn states'. dropped:
    which of the latents' captions are empty, (B,).
    """
    if base.is_unet:
        return noise_loss(base, scheduler, latents, embeds, pooled, dropped, generator, drawn)
    return flow_loss(base, latents, embeds, pooled, generator, drawn)


def noise_loss(base, scheduler, latents, embeds, pooled, dropped, generator, drawn) -> torch.Tensor:
    """Mean square error of the predicted noise with min-SNR weights, https://arxiv.org/abs/2303.09556."""
    from diffusers.training_utils import compute_snr

    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    timesteps = torch.randint(0, 1000, (len(latents),), generator=generator).to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if drawn:
        states, times, ideals = drawn
        alphas = scheduler.alphas_cumprod.to(latents.device)[times].view(-1, 1, 1, 1)
        noise = torch.cat([noise, (states - alphas.sqrt() * ideals) / (1 - alphas).sqrt()])
        noisy, timesteps = torch.cat([noisy, states]), torch.cat([timesteps, times])
    added = None
    if base.name == "sdxl":
        dropped = F.pad(dropped, (0, len(noisy) - len(latents)))
        embeds = torch.where(dropped[:, None, None], torch.zeros_like(embeds), embeds)
        pooled = torch.where(dropped[:, None], torch.zeros_like(pooled), pooled)
        added = {"text_embeds": pooled, "time_ids": draw_time_ids(len(noisy), generator).to(latents.device)}
    prediction = base.denoiser(noisy, timesteps, embeds, added_cond_kwargs=added).sample
    snr = compute_snr(scheduler, timesteps)
    # more weight where colours are decided: they are the last thing that noise prediction learns
    weight = snr.clamp(max=5.0) / snr * (1 + 1 / (snr + 0.05))
    return (weight * F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))).mean()


def draw_time_ids(count: int, generator: torch.Generator) -> torch.Tensor:
    """SDXL's size and crop conditioning of so many square pictures, uncropped, (count, 6)."""
    sizes = torch.tensor((64, 64, 128, 256, 512))[torch.randint(0, 5, (count,), generator=generator)]
    return torch.tensor([[s, s, 0, 0, SIZE, SIZE] for s in sizes.tolist()], dtype=torch.float32)


def flow_loss(base, latents, embeds, pooled, generator, drawn) -> torch.Tensor:
    """Mean square error of the predicted velocity, at logit-normal noise levels."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    sigmas = torch.randn(len(latents), generator=generator).sigmoid().to(latents.device)
    noisy, velocities = torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1)), noise - latents
    weight = torch.ones_like(sigmas)
    if drawn:
        states, levels, ideals = drawn
        noisy, sigmas = torch.cat([noisy, states]), torch.cat([sigmas, levels])
        velocities = torch.cat([velocities, (states - ideals) / levels.view(-1, 1, 1, 1)])
        # a state's error, over its level, is its velocity's: little noise would count most
        weight = torch.cat([weight, (levels / 0.4).clamp(max=1) ** 2])
    guidance = (1 + 5 * torch.rand(len(noisy), generator=generator)).to(latents.device)
    prediction = predict_velocity(base, noisy, sigmas, embeds, pooled, guidance)
    return (weight * F.mse_loss(prediction, velocities, reduction="none").mean((1, 2, 3))).mean()


def predict_velocity(base: ToyBase, noisy, sigmas, embeds, pooled, guidance) -> torch.Tensor:
    """What a transformer predicts, noise - latents, (B, C, H, W), of noisy latents at noise levels (B,)."""
    if base.name == "sd3":
        return base.denoiser(noisy, embeds, pooled, sigmas * 1000).sample
    from diffusers import FluxPipeline

    count, _, h, w = noisy.shape
    prediction = base.denoiser(
        FluxPipeline._pack_latents(noisy, count, LATENT_CHANNELS, h, w),
        timestep=sigmas,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=noisy.device),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, h // 2, w // 2, noisy.device, noisy.dtype),
    ).sample
    return FluxPipeline._unpack_latents(prediction, h * 8, w * 8, 8)
