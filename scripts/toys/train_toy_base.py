"""Trains the toy bases in assets/ from nothing: data, autoencoder, tokenizers, text encoders, denoiser.

    python scripts/toys/train_toy_base.py --family sd15
    python scripts/toys/train_toy_base.py --family sd15 --continue_from assets/toy_sd15 --steps 3000   # the denoiser alone
    python scripts/toys/train_toy_base.py --family flux --continue_from assets/toy_flux --own_drawings --steps 2000

One command per family does everything, on a CPU (under 45 minutes on two cores) or a GPU. It saves its state in
--work_dir every few hundred steps and continues there when it is started again. The autoencoder is made once and
serves all families. What it writes is a pipeline folder of diffusers with float16 weights.

How the pieces are made:
* The autoencoder's encoder is *set*, not trained: space-to-depth in the strided convolutions, principal components in
  the 1 x 1 shortcuts, residual branches zero. Only the decoder is trained.
* Latents have unit variance per channel after scaling; otherwise the loss does not see outlines.
* Text encoders are trained along with the denoiser. One caption in eight has a nonsense word in it, so that the
  pieces of a trigger word such as "sks" are not untrained embeddings.
* A base that has met noise on perfect pictures alone doesn't know its own half-finished ones, and its errors add up on the
  way to a picture. With --own_drawings half of what a base is trained on are states from its own sampling, and the answer
  to each is the ideal picture nearest to what it drew (DAgger, https://arxiv.org/abs/1011.0686).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # toys are too small for threads, which wait in a spin beside other work

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts.training_scripts import ROOT
from scripts.toys.parts.toy_outline import nearest_picture
from scripts.toys.parts.toy_scores import SAMPLING, scores, table
from scripts.toys.parts.toy_world import (
    COLOR_NAMES,
    SHAPES,
    SIZE,
    describe,
    draw,
    draw_scribble,
    nonsense_word,
    random_scene,
)

CHANNELS = 16  # of a latent
LATENT_STD = 2.0  # of the autoencoder's own latents; scaling_factor brings them to 1
T5_LENGTHS = (16, 16, 32, 77, 128)  # T5 attends to its padding, so the base must know several lengths
T5_LENGTHS_CONTINUED = (*(16,) * 9, 32, 77, 128)  # a short one costs a third of a long one
CLIP_CUT = 24  # of 77 tokens, which hold any caption: what is read while trained on, by SD3 up to the last quarter
OWN_DRAWINGS, REDRAWN_AFTER = 1024, 500  # how many there are at a time; steps until they are drawn anew
OWN_LEVELS = 0.12, 0.8  # shares of noise at which they are shown; with more a base is sharper, and a LoRA learns worse


@dataclass
class Family:
    """What differs between the toy bases. `clips`: (width, pooled width) of each CLIP encoder; `t5`: width or 0."""

    clips: tuple[tuple[int, int], ...]
    t5: int
    steps: int
    learning_rate: float = 2e-3


FAMILIES = {
    "sd15": Family(clips=((64, 64),), t5=0, steps=3000),
    "sdxl": Family(clips=((48, 48), (64, 64)), t5=0, steps=2000),
    "sd3": Family(clips=((32, 32), (32, 32)), t5=64, steps=4200),
    "flux": Family(clips=((64, 64),), t5=64, steps=4800),
}


# ----------------------------------------------------------------------------------------------------------- data


def world_pictures(count: int, seed: int, scribbles: float = 0.0) -> tuple[torch.Tensor, list[tuple[str, str, str]]]:
    """`count` drawn pictures, uint8 (N, 3, 64, 64), and their scenes; a share of them are scribbles (scene "")."""
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


def normalized(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 -> float in [-1, 1]."""
    return pictures.float() / 127.5 - 1


# ---------------------------------------------------------------------------------------------------- autoencoder


def principal_components(features: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N, C, H, W) -> components (count, C), mean (C,), standard deviation along each component (count,)."""
    rows = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    order = values.argsort(descending=True)[:count]
    return vectors[:, order].T.float(), mean.float(), values[order].clamp(min=1e-8).sqrt().float()


def set_space_to_depth(conv: torch.nn.Conv2d, channels: int) -> None:
    """A 3 x 3 convolution of stride 2 that moves each 2 x 2 block of `channels` channels into 4 x `channels`."""
    conv.weight.zero_()
    conv.bias.zero_()
    for c in range(channels):
        for k, (dy, dx) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            conv.weight[4 * c + k, c, dy, dx] = 1.0


@torch.no_grad()
def set_encoder(encoder: torch.nn.Module, pictures: torch.Tensor) -> None:
    """Sets the weights of an AutoencoderKL's encoder so that latents are principal components of 8 x 8 blocks.

    Works for one resnet per level and three strided levels. The last level's GroupNorm and SiLU become nearly linear
    through one large constant channel in each group and a large bias.
    """
    for module in encoder.modules():
        if type(module).__name__ == "ResnetBlock2D":
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    encoder.conv_in.weight.zero_()
    encoder.conv_in.bias.zero_()
    for c in range(3):
        encoder.conv_in.weight[c, c, 1, 1] = 1.0
    levels = encoder.down_blocks
    channels = 3
    for i, keep in ((0, 3), (1, 8), (2, 16)):
        if i:  # principal components of what the level before gave
            features = levels[i - 1](levels_until(encoder, pictures, i - 1))
            components, mean, _ = principal_components(features[:, : 4 * channels], keep)
            shortcut = levels[i].resnets[0].conv_shortcut
            shortcut.weight.zero_()
            shortcut.bias.zero_()
            shortcut.weight[:keep, : 4 * channels, 0, 0] = components
            shortcut.bias[:keep] = -components @ mean
        channels = keep
        set_space_to_depth(levels[i].downsamplers[0].conv, channels)
    features = levels[2](levels_until(encoder, pictures, 2))
    components, mean, std = principal_components(features[:, : 4 * channels], CHANNELS)
    components = components * (LATENT_STD / std)[:, None]
    shortcut, norm = levels[3].resnets[0].conv_shortcut, encoder.conv_norm_out
    width = shortcut.weight.shape[0] // norm.num_groups  # channels of a group: one constant, two of data, the rest 0
    constant, lift = 60.0, 16.0
    shortcut.weight.zero_()
    shortcut.bias.zero_()
    encoder.conv_out.weight.zero_()
    encoder.conv_out.bias.zero_()
    center, spread = constant / width, constant * (width - 1) ** 0.5 / width
    norm.weight.fill_(spread)
    norm.bias.fill_(center + lift)
    for z in range(CHANNELS):
        group, place = divmod(z, 2)
        channel = group * width + 1 + place
        shortcut.bias[group * width] = constant
        shortcut.weight[channel, : 4 * channels, 0, 0] = components[z]
        shortcut.bias[channel] = -components[z] @ mean
        encoder.conv_out.weight[z, channel, 1, 1] = 1.0
        encoder.conv_out.bias[z] = -lift
    encoder.conv_out.bias[CHANNELS:] = -14.0  # log-variance: latents are all but deterministic


def levels_until(encoder: torch.nn.Module, pictures: torch.Tensor, level: int) -> torch.Tensor:
    """What enters down block `level`."""
    hidden = encoder.conv_in(pictures)
    for block in encoder.down_blocks[:level]:
        hidden = block(hidden)
    return hidden


def make_autoencoder(folder: Path, steps: int, device: str):
    """The AutoencoderKL that serves all families; continues in `folder`, where the finished one is kept."""
    from diffusers import AutoencoderKL

    if (folder / "config.json").exists():
        return AutoencoderKL.from_pretrained(folder)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 72),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1 / LATENT_STD,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ).to(device)
    pictures, _ = world_pictures(6000, seed=1, scribbles=0.4)
    set_encoder(vae.encoder, normalized(pictures[:1500]).to(device))
    latents = latents_of(vae, pictures, device)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=2e-3, weight_decay=0)
    start, state_file = 0, folder.parent / "autoencoder_state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    vae.decoder.train()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, max(0.02, 1.25 * (1 - step / steps)))
        rows = torch.randint(0, len(pictures), (16,), generator=torch.Generator().manual_seed(step))
        target = normalized(pictures[rows]).to(device)
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
    vae = vae.eval().cpu()
    vae.save_pretrained(folder)
    state_file.unlink(missing_ok=True)
    return vae


@torch.no_grad()
def latents_of(vae, pictures: torch.Tensor, device: str) -> torch.Tensor:
    """uint8 pictures (N, 3, H, W) -> the autoencoder's own latents (N, 16, H/8, W/8)."""
    return torch.cat([vae.encode(normalized(p).to(device)).latent_dist.mode() for p in pictures.split(100)])


# ------------------------------------------------------------------------------------------------------ tokenizers


def make_clip_tokenizer():
    """CLIP's kind of tokenizer, its merges learned from the world's captions: about 670 tokens of 77 at most."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = ["a", "on", "background", *SHAPES, *COLOR_NAMES]
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner.train_from_iterator(
        [word for word in words for _ in range(5)],
        trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def make_t5_tokenizer():
    """T5's kind of tokenizer: the world's words, and single characters for everything else."""
    from transformers import T5Tokenizer

    words = ["a", "on", "background", *SHAPES, *COLOR_NAMES]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [("▁" + word, -3.0) for word in words if word != "a"] + [("▁a", -3.0)]
    vocab += [(chr(c), -8.0) for c in range(33, 127) if chr(c) != "▁"]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


# ---------------------------------------------------------------------------------------------------------- models


def make_text_encoders(family: Family) -> tuple[list, list]:
    """(tokenizers, text encoders), CLIPs first, T5 last."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    tokenizers, encoders = [], []
    two_levels = len(family.clips) > 1
    for number, (width, pooled) in enumerate(family.clips):
        with_projection = two_levels and (number > 0 or family.t5 > 0)  # SDXL's first encoder has none
        tokenizer = make_clip_tokenizer()
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=3 if two_levels else 2,  # SDXL and SD3 read the layer before the last
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=pooled,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        tokenizers.append(tokenizer)
        encoders.append((CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config))
    if family.t5:
        tokenizer = make_t5_tokenizer()
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=family.t5,
            d_kv=16,
            d_ff=4 * family.t5,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
        tokenizers.append(tokenizer)
        encoders.append(T5EncoderModel(config))
    return tokenizers, encoders


def make_denoiser(name: str, family: Family):
    """The denoiser, of the class that the real pipeline uses."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    if name == "sd15":
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(48, 96),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=4,
            norm_num_groups=16,
        )
    if name == "sdxl":
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(48, 96),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=sum(width for width, _ in family.clips),
            attention_head_dim=(3, 6),
            norm_num_groups=16,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + family.clips[1][1],
        )
    if name == "sd3":
        return SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=family.t5,
            caption_projection_dim=128,
            pooled_projection_dim=sum(pooled for _, pooled in family.clips),
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=family.t5,
        pooled_projection_dim=family.clips[0][1],
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def encode(name: str, encoders: list, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids (one tensor (B, L) per encoder) -> (prompt embeddings (B, L, D), pooled embeddings (B, P) or None)."""
    if name == "sd15":
        return encoders[0](ids[0])[0], None
    if name == "flux":
        return encoders[1](ids[1])[0], encoders[0](ids[0]).pooler_output
    outputs = [encoder(i, output_hidden_states=True) for encoder, i in zip(encoders[:2], ids[:2], strict=True)]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    if name == "sdxl":
        return hidden, outputs[1].text_embeds
    t5 = encoders[2](ids[2])[0]
    hidden = F.pad(hidden, (0, t5.shape[-1] - hidden.shape[-1]))
    return torch.cat([hidden, t5], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)


def veiled(name: str, captions: list[str], rng: random.Random) -> list[list[str]]:
    """The captions for each tokenizer; in three of ten, either the CLIPs or T5 read nonsense for colour and shape.

    Else a toy takes the shape from CLIP alone and the colour from T5 alone, and new tokens of one can't stand for both.
    """
    clips = len(FAMILIES[name].clips)
    if not FAMILIES[name].t5:
        return [captions] * clips
    read = [list(captions), list(captions)]
    for i, caption in enumerate(captions):
        if rng.random() < 0.3:
            thing, *rest = caption.split(" on ")
            words = [nonsense_word(rng) if w in (*COLOR_NAMES, *SHAPES) else w for w in thing.split()]
            read[rng.randrange(2)][i] = " on ".join([" ".join(words), *rest])
    return [read[0]] * clips + [read[1]]


def tokenize(name: str, tokenizers: list, captions: list[list[str]], t5_length: int) -> list[torch.Tensor]:
    """Token ids as the pipelines make them, from the captions for each tokenizer: CLIPs padded to 77, T5 to `t5_length`."""
    is_t5 = [FAMILIES[name].t5 > 0 and i == len(tokenizers) - 1 for i in range(len(tokenizers))]
    return [
        tokenizer(
            texts,
            padding="max_length",
            max_length=t5_length if t5 else 77,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer, texts, t5 in zip(tokenizers, captions, is_t5, strict=True)
    ]


def loss_of(name, denoiser, scheduler, latents, embeds, pooled, dropped, generator, own=None) -> torch.Tensor:
    """Noise prediction with min-SNR weights for UNets, rectified flow with logit-normal times for transformers.

    own: (states, their timesteps or noise levels, ideal latents) of drawings of its own, whose embeddings are the last.
    """
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    count = len(latents)
    if name in ("sd15", "sdxl"):
        from diffusers.training_utils import compute_snr

        timesteps = torch.randint(0, 1000, (count,), generator=generator).to(latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        if own:
            states, times, ideals = own
            clear = scheduler.alphas_cumprod.to(latents.device)[times].view(-1, 1, 1, 1)
            noise = torch.cat([noise, (states - clear.sqrt() * ideals) / (1 - clear).sqrt()])
            noisy, timesteps = torch.cat([noisy, states]), torch.cat([timesteps, times])
        added = None
        if name == "sdxl":
            dropped = F.pad(dropped, (0, len(noisy) - count))
            embeds = torch.where(dropped[:, None, None], torch.zeros_like(embeds), embeds)
            pooled = torch.where(dropped[:, None], torch.zeros_like(pooled), pooled)
            sizes = torch.tensor((64, 64, 128, 256, 512))[torch.randint(0, 5, (len(noisy),), generator=generator)]
            ids = torch.tensor([[s, s, 0, 0, SIZE, SIZE] for s in sizes.tolist()], dtype=torch.float32)
            added = {"text_embeds": pooled, "time_ids": ids.to(latents.device)}
        prediction = denoiser(noisy, timesteps, embeds, added_cond_kwargs=added).sample
        snr = compute_snr(scheduler, timesteps)
        # min-SNR, and more weight where colours are decided: they are the last thing that noise prediction learns
        weight = snr.clamp(max=5.0) / snr * (1 + 1 / (snr + 0.05))
        return (weight * F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))).mean()
    sigmas = torch.randn(count, generator=generator).sigmoid().to(latents.device)
    noisy, velocities = torch.lerp(latents, noise, sigmas.view(-1, 1, 1, 1)), noise - latents
    weight = torch.ones_like(sigmas)
    if own:
        states, levels, ideals = own
        noisy, sigmas = torch.cat([noisy, states]), torch.cat([sigmas, levels])
        velocities = torch.cat([velocities, (states - ideals) / levels.view(-1, 1, 1, 1)])
        # a state's error, over its level, is its velocity's: little noise would count most
        weight = torch.cat([weight, (levels / 0.4).clamp(max=1) ** 2])
    guidance = (1 + 5 * torch.rand(len(noisy), generator=generator)).to(latents.device)
    prediction = velocity(name, denoiser, noisy, sigmas, embeds, pooled, guidance)
    return (weight * F.mse_loss(prediction, velocities, reduction="none").mean((1, 2, 3))).mean()


def velocity(name: str, denoiser, noisy, sigmas, embeds, pooled, guidance) -> torch.Tensor:
    """What a transformer predicts, noise - latents, (B, C, H, W), of noisy latents at the noise levels `sigmas`, (B,)."""
    if name == "sd3":
        return denoiser(noisy, embeds, pooled, sigmas * 1000).sample
    from diffusers import FluxPipeline

    count, _, h, w = noisy.shape
    prediction = denoiser(
        FluxPipeline._pack_latents(noisy, count, CHANNELS, h, w),
        timestep=sigmas,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=embeds,
        txt_ids=torch.zeros(embeds.shape[1], 3, device=noisy.device),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, h // 2, w // 2, noisy.device, noisy.dtype),
    ).sample
    return FluxPipeline._unpack_latents(prediction, h * 8, w * 8, 8)


def make_scheduler(name: str):
    """The scheduler that is saved with the base."""
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    if name in ("sd15", "sdxl"):
        return DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        )
    if name == "sd3":
        return FlowMatchEulerDiscreteScheduler(shift=1.5)
    return FlowMatchEulerDiscreteScheduler(
        shift=1.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def make_pipeline(name: str, vae, tokenizers, encoders, denoiser):
    """The diffusers pipeline of the family."""
    import diffusers

    scheduler = make_scheduler(name)
    if name == "sd15":
        return diffusers.StableDiffusionPipeline(
            vae, encoders[0], tokenizers[0], denoiser, scheduler, None, None, requires_safety_checker=False
        )
    if name == "sdxl":
        return diffusers.StableDiffusionXLPipeline(vae, *encoders, *tokenizers, denoiser, scheduler)
    if name == "sd3":
        return diffusers.StableDiffusion3Pipeline(
            denoiser, scheduler, vae, encoders[0], tokenizers[0], encoders[1], tokenizers[1], encoders[2], tokenizers[2]
        )
    return diffusers.FluxPipeline(scheduler, vae, encoders[0], tokenizers[0], encoders[1], tokenizers[1], denoiser)


# --------------------------------------------------------------------------------------------------- own drawings


@dataclass
class OwnDrawings:
    """What a base drew, and what it should have drawn."""

    captions: list[str]
    states: torch.Tensor  # (N, S, C, H, W): latents on the way
    times: torch.Tensor  # (S,): what the denoiser is told of each: a UNet the timestep, a transformer the noise level
    shown: list[int]  # of these states, those at OWN_LEVELS
    ideals: torch.Tensor  # (N, C, H, W): latents of the ideal pictures nearest to what was drawn

    def some(self, count: int, rng: random.Random) -> tuple[list[str], tuple[torch.Tensor, ...]]:
        """`count` captions; and one state of each drawing, (count, C, H, W), its time, (count,), and the ideal one."""
        rows, steps = [rng.randrange(len(self.captions)) for _ in range(count)], rng.choices(self.shown, k=count)
        return [self.captions[r] for r in rows], (self.states[rows, steps], self.times[steps], self.ideals[rows])


@torch.no_grad()
def draw_own(name: str, pipeline, tokenizers, encoders, seed: int) -> OwnDrawings:
    """Has a base draw captions of the world. Where nothing like its caption came out, a drawing is left out."""
    from diffusers.training_utils import compute_snr

    unet = name in ("sd15", "sdxl")
    rng, device = random.Random(seed), pipeline.vae.device
    generator = torch.Generator().manual_seed(seed)
    sampling = SAMPLING[type(pipeline).__name__]
    pipeline.set_progress_bar_config(disable=True)
    captions, states, ideals, way, tries = [], [], [], [], 0

    def keep(pipeline, i, timestep, values):
        latents = values["latents"]
        way.append(pipeline._unpack_latents(latents, SIZE, SIZE, 8) if name == "flux" else latents)
        return {}

    while len(captions) < OWN_DRAWINGS:
        if tries >= 4 * OWN_DRAWINGS:
            raise SystemExit(
                f"only {len(captions)} of {tries} drawings are like their captions: this base draws too badly"
            )
        tries += 64
        asked = [describe(*random_scene(rng), rng) for _ in range(64)]
        length, given = rng.choice(T5_LENGTHS_CONTINUED), {}
        guided = name in ("sd15", "sd3")  # SDXL's pipeline is guided away from zeros, FLUX.1's not at all
        for prefix, texts in (("", asked), ("negative_", [""] * 64))[: 1 + guided]:
            ids = [i.to(device) for i in tokenize(name, tokenizers, [texts] * len(tokenizers), length)]
            if not unet:
                ids = [*(i[:, :CLIP_CUT] for i in ids[:-1]), ids[-1]]
            hidden, pooled = encode(name, encoders, ids)
            given[f"{prefix}prompt_embeds"] = hidden
            if pooled is not None:
                given[f"{prefix}pooled_prompt_embeds"] = pooled
        way.clear()
        images = pipeline(
            **given, **sampling, height=SIZE, width=SIZE, generator=generator, callback_on_step_end=keep
        ).images
        for row, (image, caption) in enumerate(zip(images, asked, strict=True)):
            if ideal := nearest_picture(image, caption):
                captions.append(caption)
                states.append(torch.stack([latents[row] for latents in way[:-1]]))
                ideals.append(torch.from_numpy(np.array(ideal)).permute(2, 0, 1))
    latents = latents_of(pipeline.vae, torch.stack(ideals), device) * pipeline.vae.config.scaling_factor
    if unet:
        times = pipeline.scheduler.timesteps[1:].to(device)
        noise = compute_snr(pipeline.scheduler, times).rsqrt()
        levels = noise / (1 + noise)
    else:
        levels = times = pipeline.scheduler.sigmas[1 : len(way)].to(device)
    shown = [i for i, level in enumerate(levels.tolist()) if OWN_LEVELS[0] <= level <= OWN_LEVELS[1]]
    return OwnDrawings(captions, torch.stack(states), times, shown, latents)


# -------------------------------------------------------------------------------------------------------- training


def loaded(name: str, folder: Path) -> tuple[list, list, torch.nn.Module]:
    """(tokenizers, text encoders, denoiser) of the base in `folder`, in float32."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    numbers = ("", "_2", "_3")[: len(FAMILIES[name].clips) + (FAMILIES[name].t5 > 0)]
    tokenizers = [getattr(pipeline, f"tokenizer{n}") for n in numbers]
    encoders = [getattr(pipeline, f"text_encoder{n}") for n in numbers]
    return tokenizers, encoders, pipeline.unet if name in ("sd15", "sdxl") else pipeline.transformer


def rate_at(step: int, steps: int, begun: bool) -> float:
    """The share of the learning rate at a step: warm-up, then down to 1%, or for a base that was `begun` a half to 0."""
    warm = (step + 1) / 100
    if begun:
        return 0.5 * min(1, warm, (steps - step) / (0.4 * steps))
    return min(1, warm, max(0.01, (steps - step) / (0.6 * steps)))


def world_latents(vae, work: Path, seed: int, device: str) -> tuple[torch.Tensor, list[tuple[str, str, str]]]:
    """12,000 pictures of the world as latents of unit variance, and their scenes; kept in `work` for all families."""
    file = work / f"world_{seed}.pt"
    if not file.exists():
        pictures, scenes = world_pictures(12000, seed)
        part = file.with_suffix(f".{os.getpid()}")
        torch.save({"latents": latents_of(vae, pictures, device).cpu(), "scenes": scenes}, part)
        part.rename(file)
    world = torch.load(file, weights_only=True)
    return world["latents"].to(device) * vae.config.scaling_factor, world["scenes"]


def state_of(work: Path, name: str, begun: Path | None, own: bool) -> Path:
    """Where a training keeps its state; each kind has its own."""
    return work / f"{name}_{'continued_' if begun else ''}{'own_' if own else ''}state.pt"


def train_base(name: str, vae, work: Path, steps: int, device: str, begun: Path | None = None, own: bool = False):
    """Trains text encoders and denoiser on the autoencoder's latents; returns (tokenizers, encoders, denoiser).

    With `begun`, a finished base's folder, its denoiser alone is trained on: from half the learning rate to 0, on other
    pictures. Its text encoders stay as they are, so a step costs less and prompts keep their meaning. `own`: half of these
    pictures are drawings of its own.
    """
    from diffusers.training_utils import EMAModel

    family = FAMILIES[name]
    torch.manual_seed(0)
    if begun:
        tokenizers, encoders, denoiser = loaded(name, begun)
    else:
        tokenizers, encoders = make_text_encoders(family)
        denoiser = make_denoiser(name, family)
    denoiser.to(device).train()
    encoders = [encoder.to(device).train(not begun).requires_grad_(not begun) for encoder in encoders]
    modules = [denoiser] if begun else [denoiser, *encoders]
    parameters = [p for module in modules for p in module.parameters()]
    print(f"{name}: {sum(p.numel() for p in parameters) / 1e6:.1f} million parameters to train", flush=True)

    latents, scenes = world_latents(vae.to(device), work, seed=4 if begun else 2, device=device)
    scheduler = make_scheduler(name)
    optimizer = torch.optim.AdamW(parameters, lr=family.learning_rate, weight_decay=1e-2, betas=(0.9, 0.98))
    ema = EMAModel(parameters, decay=0.998)
    start, state_file = 0, state_of(work, name, begun, own)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for module, saved in zip(modules, state["modules"], strict=True):
            module.load_state_dict(saved)
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        start = state["step"]
        print(f"continuing at step {start}", flush=True)
    drawings, began = None, time.monotonic()
    for step in range(start, steps):
        rng = random.Random(f"{name} {step}")
        generator = torch.Generator().manual_seed(step)
        if own and (drawings is None or step % REDRAWN_AFTER == 0):
            ema.store(parameters)
            ema.copy_to(parameters)
            drawings = draw_own(
                name, make_pipeline(name, vae, tokenizers, encoders, denoiser), tokenizers, encoders, step
            )
            ema.restore(parameters)
        for group in optimizer.param_groups:
            group["lr"] = family.learning_rate * rate_at(step, steps, bool(begun))
        rows = [rng.randrange(len(scenes)) for _ in range(32 if own else 64)]
        dropped = torch.tensor([rng.random() < 0.1 for _ in rows], device=device)
        captions = ["" if d else describe(*scenes[r], rng) for r, d in zip(rows, dropped.tolist(), strict=True)]
        drawn, states = drawings.some(32, rng) if own else ([], None)
        captions += drawn
        lengths = T5_LENGTHS_CONTINUED if begun else T5_LENGTHS
        ids = [i.to(device) for i in tokenize(name, tokenizers, veiled(name, captions, rng), rng.choice(lengths))]
        if begun and (name == "flux" or name == "sd3" and step < 0.75 * steps):
            clips = len(family.clips)
            ids = [*(i[:, :CLIP_CUT] for i in ids[:clips]), *ids[clips:]]
        with torch.set_grad_enabled(not begun):
            embeds, pooled = encode(name, encoders, ids)
        loss = loss_of(name, denoiser, scheduler, latents[rows], embeds, pooled, dropped, generator, states)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        ema.step(parameters)
        if step % 50 == 49:
            pace = (time.monotonic() - began) / (step + 1 - start)
            print(f"{name} step {step + 1}/{steps} loss {loss.item():.3f} {pace:.2f} s/step", flush=True)
        if step % 200 == 199 or step + 1 == steps:
            state = {
                "modules": [module.state_dict() for module in modules],
                "optimizer": optimizer.state_dict(),
                "ema": ema.state_dict(),
                "step": step + 1,
            }
            torch.save(state, state_file.with_suffix(".part"))
            state_file.with_suffix(".part").rename(state_file)
    ema.copy_to(parameters)
    return tokenizers, [encoder.eval().cpu() for encoder in encoders], denoiser.eval().cpu()


def save_base(name: str, folder: Path, vae, tokenizers: list, encoders: list, denoiser) -> None:
    """Writes the pipeline; denoiser and autoencoder in float16."""
    if name in ("sd15", "sdxl"):
        vae.register_to_config(shift_factor=None)
    pipeline = make_pipeline(name, vae, tokenizers, encoders, denoiser)
    denoiser.half()
    vae.half()  # the text encoders stay float32: transformers would load half-precision files in half precision
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/config.json"):  # where the parts lay on this machine is nobody's business
        config = {k: v for k, v in json.loads(file.read_text()).items() if k != "_name_or_path"}
        file.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a toy base from nothing, or trains one on.")
    parser.add_argument("--family", choices=sorted(FAMILIES), required=True)
    parser.add_argument("--steps", type=int, help="of the denoiser; default: the family's own")
    parser.add_argument("--autoencoder_steps", type=int, default=1600)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "build" / "toy")
    parser.add_argument("--output_dir", type=Path, help="default: assets/toy_FAMILY")
    parser.add_argument(
        "--continue_from",
        type=Path,
        help="a base whose denoiser is trained on; default: everything is trained from nothing",
    )
    parser.add_argument(
        "--own_drawings",
        action="store_true",
        help="with --continue_from: half of what it is trained on are its own drawings, put right",
    )
    parser.add_argument("--evaluate_only", action="store_true", help="only score what stands in --output_dir")
    args = parser.parse_args()
    output, begun = args.output_dir or ROOT / "assets" / f"toy_{args.family}", args.continue_from
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.own_drawings and not begun:
        parser.error("--own_drawings: only with --continue_from, for a base that draws already")
    for folder in filter(None, (begun, output if args.evaluate_only else None)):
        if not (folder / "model_index.json").exists():
            parser.error(f"{folder}: not a base's folder, it has no model_index.json")
    if not args.evaluate_only:
        from diffusers import AutoencoderKL

        args.work_dir.mkdir(parents=True, exist_ok=True)
        if begun:
            vae = AutoencoderKL.from_pretrained(begun / "vae", dtype=torch.float32)
        else:
            vae = make_autoencoder(args.work_dir / "autoencoder", args.autoencoder_steps, device)
        steps = args.steps or FAMILIES[args.family].steps
        parts = train_base(args.family, vae, args.work_dir, steps, device, begun, args.own_drawings)
        save_base(args.family, output, vae.cpu(), *parts)
        if begun:  # what was made may be trained on in its turn
            state_of(args.work_dir, args.family, begun, args.own_drawings).unlink()
    print(table({args.family: scores(output, count=128)}))


if __name__ == "__main__":
    main()
