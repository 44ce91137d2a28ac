"""Faults in the training scripts: loss, latents, captions, noise, prompts, the order of things."""

from __future__ import annotations

from scripts.dev.planted_faults.fault import Fault

RECIPES = "train_*.py"
SD15, SDXL, SD3 = "train_lora_sd15.py", "train_lora_sdxl.py", "train_lora_sd3.py"
FLUX = "train_dreambooth_lora_flux_advanced.py"
NOISE_LOSS = "test_noise_prediction_loss_against_its_formula"
FLOW_LOSS = "test_flow_loss_against_its_formula"
FLUX_LOSS = "test_flux_loss_against_its_formula"
LATENTS = "test_latents_are_those_that_the_pipeline_decodes"
PROMPTS = "test_prompts_are_encoded_as_the_pipeline_does"

# fmt: off
IN_ALL_RECIPES = (
    ("l1 loss", "loss",
     "loss = (model_pred - target.float()) ** 2",
     "loss = (model_pred - target.float()).abs()", NOISE_LOSS),
    ("half a Huber", "loss",
     "scale = 2 * c if",
     "scale = c if", NOISE_LOSS),
    ("a threshold that grows with the noise", "loss",
     "threshold = c ** (timesteps",
     "threshold = c ** (1 - timesteps", "test_hubers_losses_and_where_they_turn_against_their_formulas"),
    ("latents divided", "latents",
     ')) * vae_config["scaling_factor"]',
     ')) / vae_config["scaling_factor"]', LATENTS),
    ("latents unshifted", "latents",
     'noise - (vae_config.get("shift_factor")',
     'noise + (vae_config.get("shift_factor")', LATENTS),
    ("latents without spread", "latents",
     "mean + std * noise",
     "mean + 0 * noise", LATENTS),
    ("accumulated, not averaged", "loss",
     "(losses * weight).sum() / args.gradient_accumulation_steps",
     "(losses * weight).sum()", "test_accumulated_batches_are_averaged"),
    ("weights ignored", "loss",
     "(losses * weight).sum()",
     "losses.sum()", "test_prior_preservation_sums_two_weighted_means -k frozen"),
    ("dropout inverted", "captions",
     "rng.random() < args.caption_dropout",
     "rng.random() >= args.caption_dropout", "test_caption_draws"),
    ("first caption always", "captions",
     "caption = rng.choice(captions)",
     "caption = captions[0]", "test_caption_draws"),
)
IN_ONE_RECIPE = (
    # SD 1.5
    ("velocity not learned", SD15, "loss",
     "timesteps) if is_velocity else noise",
     "timesteps) if False else noise", f"{NOISE_LOSS} -k sd15"),
    ("min-SNR for noise", SD15, "loss",
     "(max=args.snr_gamma) / (snr + 1)",
     "(max=args.snr_gamma) / snr", f"{NOISE_LOSS} -k sd15"),
    ("debiased by the SNR itself", SD15, "loss",
     "1 / snr.clamp(min=1e-6).sqrt()",
     "1 / snr.clamp(min=1e-6)", f"{NOISE_LOSS} -k sd15"),
    ("one offset for all channels", SD15, "noise",
     "torch.randn(shape[0], 1, 1",
     "torch.randn(1, 1, 1", "test_offset_noise_has_an_offset_for_each_channel -k sd15"),
    ("perturbation ignored", SD15, "noise",
     "add_noise(latents, input_noise, timesteps)",
     "add_noise(latents, noise, timesteps)", f"{NOISE_LOSS} -k sd15"),
    ("a layer too few skipped", SD15, "prompts",
     "hidden_states[-(args.clip_skip + 1)]",
     "hidden_states[-args.clip_skip]", "test_skipped_layers_are_as_good_as_absent -k sd15"),
    ("late timesteps never drawn", SD15, "noise",
     "torch.randint(low, high, ()",
     "torch.randint(low, high // 2, ()", "test_noise_is_drawn_over_all_levels -k sd15"),
    # SDXL
    ("time ids turned", SDXL, "time ids",
     'batch["original_size"], batch["crop_top_left"], batch',
     'batch["crop_top_left"], batch["original_size"], batch',
     "test_sdxl_is_told_sizes_in_the_pipelines_order"),
    ("SDXL's last layer", SDXL, "prompts",
     "hidden_states[-2 - ",
     "hidden_states[-1 - ", f"{PROMPTS} -k sdxl"),
    ("encoders turned", SDXL, "prompts",
     '[encoded["clip_l"]["hidden"], encoded["clip_g"]["hidden"]]',
     '[encoded["clip_g"]["hidden"], encoded["clip_l"]["hidden"]]', f"{PROMPTS} -k sdxl"),
    ("zeros for the empty prompt turned", SDXL, "prompts",
     "(value) if zeros else value",
     "(value) if not zeros else value", "test_the_empty_prompt_is_the_pipelines -k sdxl"),
    ("SDXL's min-SNR turned", SDXL, "loss",
     "(args.snr_gamma / snr)",
     "(snr / args.snr_gamma)", f"{NOISE_LOSS} -k sdxl"),
    # SD3
    ("flow turned", SD3, "loss",
     "(1 - sigmas) * latents + sigmas * noise",
     "sigmas * latents + (1 - sigmas) * noise", FLOW_LOSS),
    ("preconditioning's sign", SD3, "loss",
     "noisy_latents - sigmas * model_pred",
     "noisy_latents + sigmas * model_pred", FLOW_LOSS),
    ("SD3's weights ignored", SD3, "loss",
     "(weighting.float() * loss)",
     "loss", FLOW_LOSS),
    ("T5 first", SD3, "prompts",
     "torch.cat([padded, t5], dim=1)",
     "torch.cat([t5, padded], dim=1)", f"{PROMPTS} -k sd3"),
    ("sigma as timestep", SD3, "noise",
     "scheduler.timesteps[index]",
     "scheduler.sigmas[index]", "test_noise_is_drawn_over_all_levels -k sd3"),
    ("SD3's last layer", SD3, "prompts",
     "output.hidden_states[-2]",
     "output.hidden_states[-1]", f"{PROMPTS} -k sd3"),
    # FLUX.1
    ("guidance of 1", FLUX, "loss",
     "args.guidance_scale, device",
     "1.0, device", FLUX_LOSS),
    ("timesteps of 1000", FLUX, "loss",
     'batch["timesteps"] / scheduler.config.num_train_timesteps',
     'batch["timesteps"]', FLUX_LOSS),
    ("tokens counted as pixels", FLUX, "noise",
     "calculate_shift(shape[1] * shape[2] // 4,",
     "calculate_shift(shape[1] * shape[2],", "test_flux_sigmas_are_shifted_as_the_pipeline_shifts_them"),
    ("rows and columns turned", FLUX, "tokens",
     "(1, height // 2, width // 2)",
     "(1, width // 2, height // 2)", FLUX_LOSS),
    ("FLUX.1's flow turned", FLUX, "loss",
     "noise - latents  # dz_t",
     "latents - noise  # dz_t", FLUX_LOSS),
)
# fmt: on

RECIPE_FAULTS = (
    *(Fault(name, RECIPES, part, old, new, (test,)) for name, part, old, new, test in IN_ALL_RECIPES),
    *(Fault(name, file, part, old, new, (test,)) for name, file, part, old, new, test in IN_ONE_RECIPE),
)
