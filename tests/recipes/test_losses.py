"""Each family's loss against its formula, written down once more."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch
from conftest import FLUX, QUICKEST, SAMPLE, SD3, SDXL, load_script, losses, run_here
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import safe_open
from toy_parts import arguments, toy_base

from lora_training.base_model.vae import pack_latents, unpack_latents
from lora_training.errors import UserError

pytestmark = pytest.mark.unit


class Denoiser:
    """Predicts a linear function of its input, and remembers its arguments."""

    dtype = torch.float32

    def __init__(self, slope: float = 0.3, offset: float = 0.1) -> None:
        self.slope, self.offset = slope, offset

    def __call__(self, noisy=None, timestep=None, *rest, **inputs):
        noisy = inputs.get("hidden_states", noisy)
        self.noisy, self.timestep, self.inputs = noisy, timestep, inputs
        return argparse.Namespace(sample=noisy * self.slope + self.offset)


def ddpm_settings(**settings) -> argparse.Namespace:
    """The flags that a noise prediction loss reads."""
    usual = {"snr_gamma": None, "loss_type": "l2", "huber_c": 0.1, "input_perturbation": 0.0}
    usual |= {"noise_offset": 0.0, "min_timestep": 0, "max_timestep": 1000}
    usual |= {"huber_schedule": "constant", "debiased_estimation": False}
    return argparse.Namespace(**usual | settings)


def flow_settings(**settings) -> argparse.Namespace:
    """The flags that a flow's loss reads."""
    usual = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29, "weighting_scheme": "none"}
    usual |= {"timestep_sampling": "weighting_scheme", "min_timestep": 0, "max_timestep": 1000}
    usual |= {"precondition_outputs": False, "loss_type": "l2", "huber_c": 0.1, "guidance_scale": 2.5}
    usual |= {"huber_schedule": "constant"}
    return argparse.Namespace(**usual | settings)


def draw_batch(script, scheduler, args, shape=(4, 8, 8)) -> dict:
    """A batch of three samples."""
    draws = [script.draw_noise(torch.Generator().manual_seed(i), shape, scheduler, args) for i in range(3)]
    batch = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
    return batch | sizes_of(3)


def sizes_of(count: int) -> dict:
    """SDXL's conditions of so many samples."""
    sizes = {"original_size": torch.ones(count, 2), "crop_top_left": torch.zeros(count, 2)}
    return sizes | {"target_size": torch.ones(count, 2)}


def embeds_of(count: int) -> dict:
    return {"prompt_embeds": torch.zeros(count, 7, 5), "pooled_prompt_embeds": torch.zeros(count, 5)}


@pytest.mark.families("sd15", "sdxl")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "extra",
    [
        *({}, {"snr_gamma": 5.0}, {"debiased_estimation": True}),
        *({"loss_type": "huber"}, {"input_perturbation": 0.1}, {"noise_offset": 0.1}),
    ],
)
def test_noise_prediction_loss_against_its_formula(script, prediction, extra):
    args, denoiser, latents = ddpm_settings(**extra), Denoiser(), torch.randn(3, 4, 8, 8)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDPMScheduler(**schedule, prediction_type=prediction)
    batch = draw_batch(script, scheduler, args)
    loss = script.compute_loss(batch, latents, embeds_of(3), denoiser, scheduler, args)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    level = torch.cumprod(1 - betas, 0)[batch["timesteps"]].view(3, 1, 1, 1)
    a, s = level.sqrt(), (1 - level).sqrt()
    noise = batch["noise"].double()
    input_noise = noise + 0.1 * batch["perturbation"] if "input_perturbation" in extra else noise
    noisy = a * latents + s * input_noise
    assert torch.allclose(denoiser.noisy.double(), noisy, atol=1e-5)
    target = noise if prediction == "epsilon" else a * noise - s * latents
    error = (noisy * 0.3 + 0.1 - target) ** 2
    if "loss_type" in extra:
        error = 0.2 * ((error + 0.01).sqrt() - 0.1)
    expected = error.mean((1, 2, 3))
    if "snr_gamma" in extra:
        snr = (a**2 / s**2).flatten()
        expected *= torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
    if "debiased_estimation" in extra:
        snr = (a**2 / s**2).flatten().clamp(max=1000)
        expected *= snr**-0.5 if prediction == "epsilon" else 1 / (snr + 1)
    assert torch.allclose(loss.double(), expected, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_hubers_losses_and_where_they_turn_against_their_formulas(script, family, loss_type, schedule):
    """As https://arxiv.org/abs/2403.16728 and sd-scripts have them, for c = 0.1."""
    if (flow := script.FAMILY.predicts_flow) and schedule == "snr":
        with pytest.raises(UserError, match="--huber_schedule snr is for families that predict noise"):
            arguments(script, "--loss_type", loss_type, "--huber_schedule", schedule)
        return
    scheduler = FlowMatchEulerDiscreteScheduler() if flow else DDPMScheduler(beta_schedule="scaled_linear")
    args = argparse.Namespace(loss_type=loss_type, huber_schedule=schedule, huber_c=0.1)
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0, 400, 999])
    batch = {"timesteps": times.float() if flow else times}
    loss = script.elementwise_loss(prediction, target, batch, scheduler, args)
    c = {"constant": [0.1] * 3, "exponential": [math.exp(-t * -math.log(0.1) / 1000) for t in times.tolist()]}
    if schedule == "snr":
        levels = scheduler.alphas_cumprod.double()[times].tolist()
        c["snr"] = [0.9 / (1 + math.sqrt((1 - level) / level)) ** 2 + 0.1 for level in levels]
        assert c["snr"][0] > 0.9 and c["snr"][2] < 0.11
    c = torch.tensor(c[schedule], dtype=torch.float64).view(3, 1, 1, 1)
    root = ((prediction.double() - target.double()) ** 2 + c**2).sqrt()
    expected = 2 * (root - c) * (c if loss_type == "huber" else 1)
    assert torch.allclose(loss.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.families("sd15", "sdxl")
def test_names_of_losses_that_sd_scripts_has(script):
    assert arguments(script, "--ip_noise_gamma", 0.1).input_perturbation == 0.1
    with pytest.raises(UserError, match="--debiased_estimation and --snr_gamma both weigh"):
        arguments(script, "--debiased_estimation", "--snr_gamma", 5)


@pytest.mark.families("sd3", "flux")
def test_each_weighting_scheme_of_diffusers_draws_by_its_formula(script, family):
    """None is left out: its two functions know these four names, and uniform draws without weights."""
    import inspect
    import re

    from diffusers import training_utils as known

    functions = (known.compute_density_for_timestep_sampling, known.compute_loss_weighting_for_sd3)
    names = {n for f in functions for n in re.findall(r'weighting_scheme == "(\w+)"', inspect.getsource(f))}
    for scheme in ("none", *sorted(names)):
        args = arguments(script, "--weighting_scheme", scheme)
        draws, u = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
        level = script.draw_level(draws, args)
        if scheme == "logit_normal":
            expected = 1 / (1 + math.exp(-torch.randn(1, generator=u).item()))
        else:
            expected = torch.rand(1, generator=u).item()
        if scheme == "mode":  # https://arxiv.org/abs/2403.03206 section 3.1
            expected = 1 - expected - 1.29 * (math.cos(math.pi / 2 * expected) ** 2 - 1 + expected)
        assert level == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"])
@pytest.mark.parametrize("precondition", [True, False])
def test_flow_loss_against_its_formula(scheme, precondition):
    script = load_script(SD3.script)
    args = flow_settings(weighting_scheme=scheme, precondition_outputs=precondition)
    scheduler, denoiser, latents = (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        Denoiser(),
        torch.randn(3, 4, 8, 8),
    )
    batch = draw_batch(script, scheduler, args)
    loss = script.compute_loss(batch, latents, embeds_of(3), denoiser, scheduler, args)
    t = batch["sigmas"].double().view(3, 1, 1, 1)
    u = t / (3 - 2 * t)  # without the shift of 3
    assert torch.allclose(u.flatten() * 1000, (u.flatten() * 1000).round(), atol=1e-2)
    assert torch.allclose(denoiser.timestep.double(), t.flatten() * 1000, rtol=1e-4)
    noise = batch["noise"].double()
    noisy = (1 - t) * latents + t * noise
    assert torch.allclose(denoiser.noisy.double(), noisy, atol=1e-5)
    output = noisy * 0.3 + 0.1
    error = (noisy - t * output - latents) ** 2 if precondition else (output - (noise - latents)) ** 2
    weights = {"sigma_sqrt": t**-2, "cosmap": 2 / (math.pi * (1 - 2 * t + 2 * t**2))}
    weight = weights.get(scheme, torch.ones_like(t))
    assert torch.allclose(loss.double(), (weight * error).mean((1, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "sigma_sqrt", "cosmap"])
@pytest.mark.parametrize("guided", [True, False])
def test_flux_loss_against_its_formula(scheme, guided):
    """Velocity noise - latents on packed latents; weights by hand; guidance only where the base has it."""
    script, args = load_script(FLUX.script), flow_settings(weighting_scheme=scheme)
    generator = torch.Generator().manual_seed(0)
    latents, noise, prediction = (torch.randn(3, 16, 6, 4, generator=generator) for _ in range(3))
    sigmas, inputs = torch.tensor([0.9, 0.5, 0.1]), {}

    def denoiser(**arguments):
        inputs.update(arguments)
        return argparse.Namespace(sample=FluxPipeline._pack_latents(prediction, 3, 16, 6, 4))

    denoiser.dtype, denoiser.config = torch.float32, argparse.Namespace(guidance_embeds=guided)
    scheduler = argparse.Namespace(config=argparse.Namespace(num_train_timesteps=1000))
    batch = {"noise": noise, "sigmas": sigmas, "timesteps": sigmas * 1000}
    loss = script.compute_loss(batch, latents, embeds_of(3), denoiser, scheduler, args)
    weights = {"sigma_sqrt": sigmas**-2.0, "cosmap": 2 / (torch.pi * (1 - 2 * sigmas + 2 * sigmas**2))}
    weight = weights.get(scheme, torch.ones(3))
    expected = ((prediction - (noise - latents)) ** 2).mean((1, 2, 3)) * weight
    assert torch.allclose(loss, expected, rtol=1e-4)
    noisy = torch.stack([(1 - s) * x + s * n for s, x, n in zip(sigmas, latents, noise, strict=True)])
    packed = FluxPipeline._pack_latents(noisy, 3, 16, 6, 4)
    assert torch.allclose(inputs["hidden_states"], packed, atol=1e-6)
    assert torch.equal(inputs["timestep"], sigmas) and inputs["txt_ids"].shape == (7, 3)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, 3, 2, "cpu", torch.float32)
    assert torch.equal(inputs["img_ids"], image_ids)
    if guided:
        assert torch.equal(inputs["guidance"], torch.full((3,), 2.5))
    else:
        assert inputs["guidance"] is None


def test_a_mask_weighs_each_place(script, family):
    """Half of a picture masked: the loss is that of the other half, twice as heavy."""
    flow = script.FAMILY.predicts_flow
    args, scheduler = (
        (flow_settings(), FlowMatchEulerDiscreteScheduler()) if flow else (ddpm_settings(), DDPMScheduler())
    )
    denoiser, latents = Denoiser(), torch.randn(3, 4, 8, 8)
    denoiser.config = argparse.Namespace(guidance_embeds=False)
    batch, mask = draw_batch(script, scheduler, args), torch.zeros(3, 1, 8, 8)
    mask[..., :4] = 2

    def loss(**more):
        return script.compute_loss(batch | more, latents, embeds_of(3), denoiser, scheduler, args)

    left = loss(mask=mask)
    assert torch.allclose((left + loss(mask=2 - mask)) / 2, loss(), rtol=1e-5)
    latents[..., 4:] += 1.0  # what is masked plays no part
    assert torch.allclose(loss(mask=mask), left, rtol=1e-5) and not torch.allclose(loss(mask=2 - mask), left)


@pytest.mark.families("sd15", "sdxl")
@pytest.mark.parametrize(("prediction", "expected"), [("epsilon", 4.0), ("v_prediction", 0.0)])
def test_min_snr_at_an_snr_of_zero(script, prediction, expected):
    """Zero-terminal-SNR schedules reach it; the weight there is 1 for noise, 0 for velocity."""
    schedule = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True}
    scheduler = DDPMScheduler(**schedule, prediction_type=prediction)
    batch = {"noise": torch.ones(1, 4, 8, 8), "timesteps": torch.tensor([999])} | sizes_of(1)
    latents, args = torch.zeros(1, 4, 8, 8), ddpm_settings(snr_gamma=5.0)
    loss = script.compute_loss(batch, latents, embeds_of(1), Denoiser(0.0, 3.0), scheduler, args)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    args = ddpm_settings(debiased_estimation=True, loss_type="huber", huber_schedule="snr")
    assert script.compute_loss(batch, latents, embeds_of(1), Denoiser(), scheduler, args).isfinite().all()


def test_sdxl_is_told_sizes_in_the_pipelines_order(recipe):
    """Time ids are those of the pipeline's own function."""
    absent = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(SDXL.base, **absent)
    config = json.loads((toy_base(recipe) / "text_encoder_2" / "config.json").read_text())
    expected = pipeline._get_add_time_ids(
        (11, 12), (13, 14), (15, 16), torch.float32, text_encoder_projection_dim=config["projection_dim"]
    )
    denoiser = Denoiser()
    batch = {"original_size": (11, 12), "crop_top_left": (13, 14), "target_size": (15, 16)}
    batch = {name: torch.tensor([value]) for name, value in batch.items()}
    batch |= {"noise": torch.randn(1, 4, 8, 8), "timesteps": torch.tensor([5])}
    latents = torch.randn(1, 4, 8, 8)
    recipe.compute_loss(batch, latents, embeds_of(1), denoiser, DDPMScheduler(), arguments(recipe))
    assert torch.equal(denoiser.inputs["added_cond_kwargs"]["time_ids"], expected)


def test_flux_tokens_and_their_places_are_the_pipelines():
    latents = torch.randn(2, 16, 8, 12)
    tokens = FluxPipeline._pack_latents(latents, 2, 16, 8, 12)
    assert torch.equal(pack_latents(latents), tokens) and torch.equal(unpack_latents(tokens, 8, 12), latents)
    places = FluxPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    assert torch.equal(load_script(FLUX.script).position_ids(8, 12, "cpu"), places)


@pytest.mark.run
def test_accumulated_batches_are_averaged(tmp_path, monkeypatch):
    script, output = load_script(QUICKEST.script), tmp_path / "x"
    batch_losses, original = [], script.compute_loss

    def recorded(*arguments):
        loss = original(*arguments)
        batch_losses.append(loss.detach().mean())
        return loss

    monkeypatch.setattr(script, "compute_loss", recorded)
    flags = ("--gradient_accumulation_steps", 3, "--train_batch_size", 2, "--max_train_steps", 1)
    flags += ("--rank", 3, "--lora_alpha", 5, "--resolution", 64, 48)
    assert run_here(QUICKEST, output, "-d", SAMPLE, *flags) == 0
    assert losses(output) == pytest.approx([torch.stack(batch_losses).mean().item()], rel=1e-5)
    with safe_open(output / "x.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["ss_network_dim"], float(metadata["ss_network_alpha"])) == ("3", 5.0)
    assert metadata["modelspec.resolution"] == "64x48"
    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as file:
        adapter = json.loads(file.metadata()["lora_adapter_metadata"])
    part = script.FAMILY.denoiser
    assert (adapter[f"{part}.lora_alpha"], adapter[f"{part}.r"]) == (5, 3)
