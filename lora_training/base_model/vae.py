"""Pixels, latents and their shapes."""

from __future__ import annotations

import math

import torch

from lora_training.base_model.reading import reading_base


def latent_shape(size: tuple[int, int], vae_config: dict) -> tuple[int, int, int]:
    """(width, height) in pixels -> (channels, height, width) of the latents."""
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    return vae_config["latent_channels"], size[1] // factor, size[0] // factor


def encode_pixels(pixels, vae):
    """Pixels (B, 3, H, W), uint8 -> moments (B, 2C, h, w): mean and standard deviation of the latents."""
    with torch.no_grad(), reading_base("the vae"):
        values = pixels.to(vae.device).float() / 127.5 - 1
        distribution = vae.encode(values.to(vae.dtype)).latent_dist
    return torch.cat([distribution.mean, distribution.std], dim=1).float()


def unscale_latents(latents, config: dict):
    """Latents as the denoiser works on them -> as the VAE does, (B, C, H, W) both."""
    return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)


def pack_latents(latents):
    """(B, C, H, W) -> (B, H/2 * W/2, 4C): 2 x 2 patches as tokens, as FLUX.1 takes them."""
    patches = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, H/2, 2, W/2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack_latents(tokens, height: int, width: int):
    """(B, H/2 * W/2, 4C) -> (B, C, H, W)."""
    patches = tokens.unflatten(2, (-1, 2, 2)).unflatten(1, (height // 2, width // 2))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def unpack_output(latents, size: tuple[int, int]):
    """A pipeline's latents -> (B, C, H, W): FLUX.1's are tokens (B, H/2 * W/2, 4C).

    size: (width, height) in pixels.
    """
    if latents.dim() == 4:
        return latents
    height = 2 * round(math.sqrt(latents.shape[1] * size[1] / size[0]))  # whatever the VAE's factor is
    return unpack_latents(latents, height, 4 * latents.shape[1] // height)
