"""Noise, timesteps and latents of each family."""

from __future__ import annotations

import argparse

import pytest
import torch
from conftest import FLUX, SAMPLE, load_script, to_pixels
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from toy_parts import arguments, components_of

from lora_training.base_model.reading import import_class
from lora_training.base_model.vae import encode_pixels, unscale_latents
from lora_training.data.images import decode_image

pytestmark = pytest.mark.unit


def test_latents_are_those_that_the_pipeline_decodes(script, family):
    """(z - shift) x scale, and about as large as noise: what the pipeline undoes before its VAE."""
    base = components_of(script)
    vae, config = base.vae(), base.config("vae")
    pixels = to_pixels(decode_image((SAMPLE / "smiley_00.png").read_bytes()).resize((64, 64)))[None]
    moments = encode_pixels(pixels, vae)
    mean, std = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    latents = script.sample_latents(moments, noise, config)
    shifted = {"scaling_factor": 0.3611, "shift_factor": 0.1159}  # FLUX.1's
    expected = (mean + std * noise - 0.1159) * 0.3611
    assert torch.allclose(script.sample_latents(moments, noise, shifted), expected, atol=1e-5)
    assert torch.allclose(unscale_latents(mean, shifted), mean / 0.3611 + 0.1159, atol=1e-5)
    unscaled = latents / config["scaling_factor"] + (config.get("shift_factor") or 0)  # as the pipelines do
    assert torch.allclose(unscaled, mean + std * noise, atol=1e-4)
    assert (std * noise).abs().max() > 1e-4
    assert torch.allclose(unscale_latents(latents, config), unscaled, atol=1e-4)
    with torch.no_grad():
        decoded = vae.decode(unscaled.float()).sample
    assert (decoded - (pixels / 127.5 - 1)).abs().mean() < 0.15


def test_noise_is_drawn_over_all_levels(script, family):
    """Timesteps over the whole schedule, and the denoiser's timestep belongs to the noise."""
    scheduler, args = components_of(script).training_scheduler(), arguments(script)
    generator = torch.Generator().manual_seed(0)
    draws = [script.draw_noise(generator, (4, 8, 8), scheduler, args) for _ in range(400)]
    steps = torch.stack([draw["timesteps"] for draw in draws]).double()
    assert steps.min() < 200 and steps.max() > 900 and 350 < steps.mean() < 750
    if script.FAMILY.predicts_flow:
        sigmas = torch.stack([draw["sigmas"] for draw in draws]).double()
        assert torch.allclose(sigmas * 1000, steps, atol=0.1)
    assert abs(torch.stack([draw["noise"] for draw in draws]).std().item() - 1) < 0.02


@pytest.mark.families("sd15", "sdxl")
def test_offset_noise_has_an_offset_for_each_channel(script, family):
    args, generator = arguments(script, "--noise_offset", 50), torch.Generator().manual_seed(0)
    noise = script.draw_noise(generator, (4, 16, 16), DDPMScheduler(), args)["noise"]
    means = noise.mean((1, 2))
    assert (means[:, None] - means).abs().fill_diagonal_(99).min() > 1 and noise.std((1, 2)).max() < 1.5


def test_timesteps_stay_in_their_range(script, family):
    args, generator = arguments(script, "--min_timestep", 200, "--max_timestep", 600), torch.Generator()
    scheduler = import_class("diffusers", script.FAMILY.training_scheduler)(num_train_timesteps=1000)
    generator.manual_seed(0)
    draws = [script.draw_noise(generator, (4, 8, 8), scheduler, args) for _ in range(300)]
    steps = [draw["timesteps"].item() for draw in draws]
    assert min(steps) >= 199 and max(steps) <= 601
    assert min(steps) < 250 and max(steps) > 550


@pytest.mark.families("sd3", "flux")
@pytest.mark.parametrize(
    ("flags", "mean", "variance"),
    [
        (("uniform",), 0.5, 1 / 12),
        (("sigmoid",), 0.5, 0.0434),
        (("shift", "--timestep_shift", 3), 0.716, None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_how_a_flow_draws_its_timesteps(script, family, flags, mean, variance):
    """Means of 4,000 sigmas against those of the distributions."""
    args, generator = arguments(script, "--timestep_sampling", *flags), torch.Generator().manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    draws = [script.draw_noise(generator, (1, 2, 2), scheduler, args) for _ in range(4000)]
    sigmas = torch.stack([draw["sigmas"] for draw in draws])
    assert sigmas.mean().item() == pytest.approx(mean, abs=0.02)
    assert variance is None or sigmas.var().item() == pytest.approx(variance, abs=0.006)


@pytest.mark.parametrize("side", [32, 128])
def test_flux_sigmas_are_shifted_as_the_pipeline_shifts_them(side):
    """Quantile by quantile: sigmas at a size are those that the pipeline's scheduler steps through."""
    flux = load_script(FLUX.script)
    shift = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shift)
    args = argparse.Namespace(weighting_scheme="none", logit_mean=0.0, logit_std=1.0, mode_scale=1.29)
    vars(args).update(timestep_sampling="weighting_scheme", min_timestep=0, max_timestep=1000)
    pipelines = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    pipelines.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=calculate_shift(side * side // 4))
    for number, quantile in enumerate((0.0, 0.25, 0.5, 0.75)):
        draw = flux.draw_noise(torch.Generator(), (16, side, side), scheduler, args, quantile=quantile)
        assert draw["sigmas"].item() == pytest.approx(pipelines.sigmas[number].item(), abs=1e-3)
        assert draw["timesteps"].item() == pytest.approx(pipelines.timesteps[number].item(), abs=1)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)  # schnell
    draw = flux.draw_noise(torch.Generator(), (16, side, side), plain, args, quantile=0.5)
    assert draw["sigmas"].item() == pytest.approx(0.5)
