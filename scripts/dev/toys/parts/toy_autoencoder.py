"""The autoencoder of the toy bases, and the drawn world as its latents.

Its encoder is set, not trained: space-to-depth in the strided convolutions, principal components in the 1 x 1
shortcuts, residual branches zero. Only the decoder is trained. Latents have unit variance per channel after
scaling; otherwise the loss does not see outlines.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lora_training.files import atomic_write
from scripts.dev.toys.parts.toy_families import LATENT_CHANNELS
from scripts.dev.toys.parts.toy_world import SIZE, draw, draw_scribble, random_scene

LATENT_STD = 2.0  # of unscaled latents; scaling_factor brings them to 1
LOG_VARIANCE = -14.0  # latents are all but deterministic
# The last level's GroupNorm and SiLU become nearly linear through one large constant channel in each group
# and a large bias
CONSTANT, LIFT = 60.0, 16.0

Scene = tuple[str, str, str]  # shape, colour, background


def world_pictures(count: int, seed: int, scribbles: float = 0.0) -> tuple[torch.Tensor, list[Scene]]:
    """`count` drawn pictures, uint8 (N, 3, 64, 64), and their scenes.

    scribbles: the share of them that are scribbles, whose scene is ("", "", "").
    """
    rng = random.Random(seed)
    pictures, scenes = [], []
    for _ in range(count):
        if rng.random() < scribbles:
            pictures.append(np.asarray(draw_scribble(rng)))
            scenes.append(("", "", ""))
        else:
            scene = random_scene(rng)
            pictures.append(np.asarray(draw(*scene, rng)))
            scenes.append(scene)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous(), scenes


def normalize(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def encode_pictures(vae, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """uint8 pictures (N, 3, H, W) -> unscaled latents (N, 16, H/8, W/8)."""
    batches = pictures.split(100)
    return torch.cat([vae.encode(normalize(batch).to(device)).latent_dist.mode() for batch in batches])


def world_latents(vae, work: Path, seed: int, device: str) -> tuple[torch.Tensor, list[Scene]]:
    """12,000 pictures of the world as latents of unit variance, and their scenes.

    They are stored in `work`, for all families.
    """
    file = work / f"world_{seed}.pt"
    if not file.exists():
        pictures, scenes = world_pictures(12000, seed)
        with atomic_write(file) as part:
            torch.save({"latents": encode_pictures(vae, pictures, device).cpu(), "scenes": scenes}, part)
    world = torch.load(file, weights_only=True)
    return world["latents"].to(device) * vae.config.scaling_factor, world["scenes"]


# ---- the encoder, which is set -----------------------------------------------------------------------------


def principal_components(
    features: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, C, H, W) -> components (count, C), mean (C,), standard deviation along each component (count,)."""
    rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    order = values.argsort(descending=True)[:count]
    return vectors[:, order].T.float(), mean.float(), values[order].clamp(min=1e-8).sqrt().float()


def set_to_zero(layer: torch.nn.Module) -> None:
    """Weight and bias of a layer."""
    layer.weight.zero_()
    layer.bias.zero_()


def set_space_to_depth(conv: torch.nn.Conv2d, channels: int) -> None:
    """Makes a 3 x 3 convolution of stride 2 move each 2 x 2 block of its channels into 4 x `channels`."""
    set_to_zero(conv)
    for c in range(channels):
        for k, (dy, dx) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            conv.weight[4 * c + k, c, dy, dx] = 1.0


def level_input(encoder: torch.nn.Module, pictures: torch.Tensor, level: int) -> torch.Tensor:
    """What enters down block `level`."""
    hidden = encoder.conv_in(pictures)
    for block in encoder.down_blocks[:level]:
        hidden = block(hidden)
    return hidden


@torch.no_grad()
def set_encoder(encoder: torch.nn.Module, pictures: torch.Tensor) -> None:
    """Sets the weights of an AutoencoderKL's encoder: latents are principal components of 8 x 8 blocks.

    Works for one resnet per level and three strided levels.
    """
    for module in encoder.modules():
        if type(module).__name__ == "ResnetBlock2D":
            set_to_zero(module.conv2)
    set_to_zero(encoder.conv_in)
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1.0
    levels = encoder.down_blocks
    channels = 3
    for i, count in ((0, 3), (1, 8), (2, 16)):
        if i:  # principal components of what the level before gave
            features = levels[i - 1](level_input(encoder, pictures, i - 1))
            components, mean, _ = principal_components(features[:, : 4 * channels], count)
            shortcut = levels[i].resnets[0].conv_shortcut
            set_to_zero(shortcut)
            shortcut.weight[:count, : 4 * channels, 0, 0] = components
            shortcut.bias[:count] = -components @ mean
        channels = count
        set_space_to_depth(levels[i].downsamplers[0].conv, channels)
    features = levels[2](level_input(encoder, pictures, 2))[:, : 4 * channels]
    set_last_level(encoder, features)


def set_last_level(encoder: torch.nn.Module, features: torch.Tensor) -> None:
    """Sets the encoder's last level and output; features (N, C, H, W): what its shortcut reads."""
    components, mean, std = principal_components(features, LATENT_CHANNELS)
    components = components * (LATENT_STD / std)[:, None]
    shortcut, norm = encoder.down_blocks[3].resnets[0].conv_shortcut, encoder.conv_norm_out
    width = (
        shortcut.weight.shape[0] // norm.num_groups
    )  # a group: one constant channel, two of data, the rest 0
    set_to_zero(shortcut)
    set_to_zero(encoder.conv_out)
    center, spread = CONSTANT / width, CONSTANT * (width - 1) ** 0.5 / width
    norm.weight.fill_(spread)
    norm.bias.fill_(center + LIFT)
    for z in range(LATENT_CHANNELS):
        group, offset = divmod(z, 2)
        channel = group * width + 1 + offset
        shortcut.bias[group * width] = CONSTANT
        shortcut.weight[channel, : features.shape[1], 0, 0] = components[z]
        shortcut.bias[channel] = -components[z] @ mean
        encoder.conv_out.weight[z, channel, 1, 1] = 1.0
        encoder.conv_out.bias[z] = -LIFT
    encoder.conv_out.bias[LATENT_CHANNELS:] = LOG_VARIANCE


# ---- the decoder, which is trained -------------------------------------------------------------------------


def make_autoencoder(folder: Path, steps: int, device: str):
    """The AutoencoderKL that serves all families; an unfinished one in `folder` is trained on."""
    from diffusers import AutoencoderKL

    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 72),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1 / LATENT_STD,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).to(device)
    pictures, _ = world_pictures(6000, seed=1, scribbles=0.4)
    set_encoder(vae.encoder, normalize(pictures[:1500]).to(device))
    state_file = folder.parent / "autoencoder_state.pt"
    train_decoder(vae, pictures, steps, device, state_file)
    vae = vae.eval().cpu()
    vae.save_pretrained(folder)
    state_file.unlink(missing_ok=True)
    return vae


def train_decoder(vae, pictures: torch.Tensor, steps: int, device: str, state_file: Path) -> None:
    """Trains the decoder on uint8 pictures (N, 3, H, W), from the state in `state_file` if there is one."""
    latents = encode_pictures(vae, pictures, device)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=2e-3, weight_decay=0)
    first_step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
    vae.decoder.train()
    for step in range(first_step, steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, max(0.02, 1.25 * (1 - step / steps)))
        rows = torch.randint(0, len(pictures), (16,), generator=torch.Generator().manual_seed(step))
        target = normalize(pictures[rows]).to(device)
        output = vae.decode(latents[rows]).sample
        loss = F.mse_loss(output, target) + 0.1 * F.l1_loss(output, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49:
            psnr = 10 * torch.log10(4 / F.mse_loss(output.detach(), target))
            print(f"autoencoder step {step + 1}/{steps} PSNR {psnr:.1f} dB", flush=True)
        if step % 200 == 199:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, state_file)
