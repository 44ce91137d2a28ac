"""The faults that plant_faults.py puts into the training scripts, one at a time, and the tests that have to see them.

A fault is (name, where, old text, new text, what it breaks, tests). `where` is a family, whose part above the seam is
changed, or "shared", whose text is changed in all four scripts. The old text stands there exactly once, else it's an error:
short pieces of formulas, so that a change of style does not move them.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """One fault; `tests` are files of tests/, each with an expression for pytest's -k, or without."""

    name: str
    where: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]


UNIT, FORMULAS, STEP = "test_unit.py", "test_formulas.py", "test_step.py"
RESUME = "test_resume.py -k 'sdxl and (cached or ema)'"
COSINE = "test_resume.py -k 'sdxl and prodigy'"  # its learning rate falls
DAMAGED = "test_resume.py -k 'damaged_checkpoint and sdxl'"

FAULTS = tuple(
    Fault(*fields)
    for fields in (
        # loss
        ("l1 loss", "shared", "loss = (model_pred - target.float()) ** 2", "loss = (model_pred - target.float()).abs()", "loss", (UNIT,)),
        ("half a Huber", "shared", "loss = 2 * c * (torch.sqrt(", "loss = c * (torch.sqrt(", "loss", (f"{UNIT} -k loss",)),
        ("latents divided", "shared", ')) * config["scaling_factor"]', ')) / config["scaling_factor"]', "latents", (FORMULAS,)),
        ("latents unshifted", "shared", 'noise - (config.get("shift_factor")', 'noise + (config.get("shift_factor")', "latents", (FORMULAS,)),
        ("latents without spread", "shared", "mean + std * noise", "mean + 0 * noise", "latents", (FORMULAS,)),
        ("accumulated, not averaged", "shared", ".sum() / run.args.gradient_accumulation_steps", ".sum()", "loss", (FORMULAS,)),
        ("weights ignored", "shared", ' * given["weight"]).sum()', ").sum()", "loss", ("test_known_faults.py -k 'two_weighted and frozen'",)),
        ("unweighted batch", "shared", "weights[i] / len(group))", "weights[i])", "weights", (UNIT,)),
        ("prior weight per image", "shared", "self.prior_loss_weight / len(batch)", "self.prior_loss_weight", "weights", (UNIT,)),
        # plan, repeats
        ("held-out images trained on", "shared", "enumerate(examples) if not e.held_out}", "enumerate(examples)}", "plan", (FORMULAS,)),
        ("repeats ignored", "shared", "for r in self.shown(i, part)]", "for r in range(1)]", "repeats", (UNIT,)),
        ("every epoch alike", "shared", '"order", epoch,', '"order", 0,', "plan", (UNIT,)),
        ("every process alike", "shared", "[process * each : (process + 1) * each]", "[:each]", "plan", (UNIT,)),
        ("repeats drawn alike", "shared", "example.name, slot.repeat)", "example.name)", "noise", (FORMULAS,)),
        ("epochs drawn alike", "shared", "(self.args.seed, slot.epoch,", "(self.args.seed,", "noise", (FORMULAS,)),
        ("one image held out too many", "shared", "round(len(examples) * args.validation_split)", "round(len(examples) * args.validation_split) + 1", "plan", (FORMULAS,)),
        # captions
        ("dropout inverted", "shared", "rng.random() < args.caption_dropout", "rng.random() >= args.caption_dropout", "captions", (UNIT,)),
        ("first caption always", "shared", "caption = rng.choice(captions)", "caption = captions[0]", "captions", (UNIT,)),
        ("trigger word behind", "shared", 'return f"{trigger}, {caption}" if caption', 'return f"{caption}, {trigger}" if caption', "captions", (UNIT,)),
        ("class images with captions dropped", "shared", "text_rng.choice(captions) if slot.is_class else draw_caption", "draw_caption", "captions", (FORMULAS,)),
        # crops
        ("always cropped at the top", "shared", "(cover[1] - target[1]) * v)", "(cover[1] - target[1]) * 0)", "crops", (FORMULAS,)),
        ("never mirrored", "shared", "if crop.flip:\n        image", "if False:\n        image", "crops", (FORMULAS,)),
        ("contained, not covered", "shared", "scale = max(bucket[0] / size[0]", "scale = min(bucket[0] / size[0]", "crops", (UNIT,)),
        ("buckets by area", "shared", "abs(across - down), 6)", "abs(across + down), 6)", "crops", (UNIT,)),
        ("pixels from 0 to 1", "shared", ".float() / 127.5 - 1", ".float() / 255", "pixels", (FORMULAS,)),
        ("EXIF ignored", "shared", "to_srgb(ImageOps.exif_transpose(image))", "to_srgb(image)", "pixels", (FORMULAS,)),
        ("transparency on black", "shared", 'image.size, "white"), image)', 'image.size, "black"), image)', "pixels", (FORMULAS,)),
        # time ids
        ("crop coordinates swapped", "shared", "torch.tensor((crop.top, left))", "torch.tensor((left, crop.top))", "time ids", (FORMULAS,)),
        ("crop of the unmirrored", "shared", "- crop.left if crop.flip else crop.left", "- crop.left if not crop.flip else crop.left", "time ids", (f"{UNIT} -k crop",)),
        ("size as width, height", "shared", "(example.size[1], example.size[0])", "(example.size[0], example.size[1])", "time ids", (FORMULAS,)),
        # caches
        ("one latent for both flips", "shared", "crop.left, crop.top, flip)", "crop.left, crop.top)", "caches", (FORMULAS,)),
        ("texts of another base", "shared", "prompt, *self.identity[key], self", "prompt, self", "caches", (FORMULAS,)),
        ("last part of the key lost", "shared", 'self.folder / (hashlib.sha256("|".join(map(str, place))', 'self.folder / (hashlib.sha256("|".join(map(str, place[:-1]))', "caches", (UNIT,)),
        # token rows
        ("first token untrained", "shared", "inside = (place >= 0)", "inside = (place > 0)", "token rows", (UNIT,)),
        ("rows of size 1", "shared", "generator=generator) * table.std()", "generator=generator)", "token rows", (UNIT,)),
        ("a step past the pivot", "shared", "and step < p.last_step for p", "and step <= p.last_step for p", "token rows", (FORMULAS,)),
        # LoRA, optimizer, clipping, average, schedule
        ("alpha ignored", "shared", "lora_alpha=args.lora_alpha,", "lora_alpha=args.rank,", "LoRA", (FORMULAS,)),
        ("betas swapped", "shared", "(args.adam_beta1, args.adam_beta2)", "(args.adam_beta2, args.adam_beta1)", "optimizer", (STEP,)),
        ("no weight decay", "shared", '"weight_decay": part.weight_decay}', '"weight_decay": 0.0}', "optimizer", (STEP, FORMULAS)),
        ("gradients kept", "shared", "self.gradients.zero_()\n        if", "pass\n        if", "optimizer", (STEP, FORMULAS)),
        ("norm always the bound", "shared", ".clamp_(max=1.0).nan_to_num_(0.0)", ".nan_to_num_(0.0)", "clipping", (FORMULAS,)),
        ("norm per part", "shared", "torch.linalg.vector_norm(torch.stack(norms))", "norms[0]", "clipping", (STEP, FORMULAS)),
        ("average of the start", "shared", "self.ema.step([self.weights])", "pass", "average", (STEP, FORMULAS)),
        ("average not shown", "shared", "part.ema.copy_to([part.weights])", "pass", "average", (UNIT, STEP)),
        ("schedule stands", "shared", "self.schedule.step()", "pass", "schedule", (FORMULAS,)),
        ("no warm-up", "shared", "num_warmup_steps=args.lr_warmup_steps", "num_warmup_steps=0", "schedule", (FORMULAS,)),
        ("schedule twice as long", "shared", "num_training_steps=part.last_step,", "num_training_steps=2 * part.last_step,", "schedule", (FORMULAS,)),
        # checkpoints
        ("optimizer not resumed", "shared", 'self.optimizer.load_state_dict(saved["optimizer"])', "pass", "checkpoints", (RESUME,)),
        ("schedule not resumed", "shared", 'self.schedule.load_state_dict(saved["schedule"] | {"base_lrs": self.schedule.base_lrs})', "pass", "checkpoints", (COSINE,)),
        ("damage unseen", "shared", "if file_hash(folder / name) != digest", "if False", "checkpoints", (DAMAGED,)),
        ("oldest checkpoint first", "shared", "key=lambda p: int(numbers[p]), reverse=True", "key=lambda p: int(numbers[p])", "checkpoints", (f"{UNIT} -k checkpoints",)),
        # exports, metadata
        ("alpha of 1 in kohya's file", "shared", "torch.tensor(float(alpha))", "torch.tensor(1.0)", "exports", (UNIT,)),
        ("start added twice", "shared", "torch.cat([value, -start], dim=1)", "torch.cat([value, start], dim=1)", "exports", (FORMULAS,)),
        ("one alpha of three", "shared", 'sum(p["alpha"] for p in there)', 'there[0]["alpha"]', "exports", (UNIT,)),
        ("rank as alpha in metadata", "shared", '{"lora_alpha": alpha, "r": rank', '{"lora_alpha": rank, "r": rank', "metadata", (FORMULAS,)),
        ("alpha as ss_network_dim", "shared", '"ss_network_dim": rank', '"ss_network_dim": alpha', "metadata", (FORMULAS,)),
        ("resolution turned", "shared", '"{}x{}".format(*size),', '"{}x{}".format(*size[::-1]),', "metadata", (FORMULAS,)),
        # SD 1.5
        ("velocity not learned", "sd15", "timesteps) if velocity else noise", "timesteps) if False else noise", "loss", (f"{UNIT} -k loss",)),
        ("min-SNR for noise", "sd15", "/ (snr + 1) if velocity", "/ snr if velocity", "loss", (f"{UNIT} -k 'loss or snr'",)),
        ("one offset for all channels", "sd15", "torch.randn(shape[0], 1, 1", "torch.randn(1, 1, 1", "noise", (f"{FORMULAS} -k sd15",)),
        ("perturbation ignored", "sd15", "add_noise(latents, used, timesteps)", "add_noise(latents, noise, timesteps)", "noise", (f"{UNIT} -k loss",)),
        ("a layer too few skipped", "sd15", "hidden_states[-(args.clip_skip + 1)]", "hidden_states[-args.clip_skip]", "prompts", (f"{UNIT} -k encoded", f"{FORMULAS} -k sd15")),
        ("late timesteps never drawn", "sd15", "torch.randint(low, high, ()", "torch.randint(low, high // 2, ()", "noise", (f"{FORMULAS} -k sd15",)),
        # SDXL
        ("time ids turned", "sdxl", 'batch["original_size"], batch["crop_top_left"], batch', 'batch["crop_top_left"], batch["original_size"], batch', "time ids", (f"{UNIT} -k loss", FORMULAS)),
        ("SDXL's last layer", "sdxl", "hidden_states[-2 - ", "hidden_states[-1 - ", "prompts", (f"{UNIT} -k encoded",)),
        ("encoders turned", "sdxl", '[encoded["clip_l"]["hidden"], encoded["clip_g"]["hidden"]]', '[encoded["clip_g"]["hidden"], encoded["clip_l"]["hidden"]]', "prompts", (f"{UNIT} -k encoded",)),
        ("zeros for the empty prompt turned", "sdxl", "(value) if zeros else value", "(value) if not zeros else value", "prompts", (f"{FORMULAS} -k sdxl", "test_runs.py -k 'plain_pipelines and sdxl'")),
        ("SDXL's min-SNR turned", "sdxl", "(args.snr_gamma / snr)", "(snr / args.snr_gamma)", "loss", (f"{UNIT} -k 'loss or snr'",)),
        # SD3
        ("flow turned", "sd3", "(1 - sigmas) * latents + sigmas * noise", "sigmas * latents + (1 - sigmas) * noise", "loss", (f"{UNIT} -k loss",)),
        ("preconditioning's sign", "sd3", "noisy_latents - sigmas * model_pred", "noisy_latents + sigmas * model_pred", "loss", (f"{UNIT} -k loss",)),
        ("SD3's weights ignored", "sd3", "(weighting.float() * elementwise_loss(", "(elementwise_loss(", "loss", (f"{UNIT} -k loss",)),
        ("T5 first", "sd3", "(0, width - clip.shape[-1])), t5]", "(0, width - clip.shape[-1])), t5][::-1]", "prompts", (f"{UNIT} -k encoded",)),
        ("sigma as timestep", "sd3", "scheduler.timesteps[place]", "scheduler.sigmas[place]", "noise", (f"{FORMULAS} -k sd3",)),
        ("SD3's last layer", "sd3", "output.hidden_states[-2]", "output.hidden_states[-1]", "prompts", (f"{UNIT} -k encoded",)),
        # FLUX.1
        ("guidance of 1", "flux", "args.guidance_scale, device", "1.0, device", "loss", (f"{UNIT} -k 'flux and loss'",)),
        ("timesteps of 1000", "flux", 'batch["timesteps"] / scheduler.config.num_train_timesteps', 'batch["timesteps"]', "loss", (f"{UNIT} -k 'flux and loss'",)),
        ("channels first in tokens", "flux", ".permute(0, 2, 4, 1, 3, 5)", ".permute(0, 2, 4, 3, 5, 1)", "tokens", (f"{UNIT} -k flux",)),
        ("tokens counted as pixels", "flux", "calculate_shift(shape[1] * shape[2] // 4,", "calculate_shift(shape[1] * shape[2],", "noise", (f"{UNIT} -k 'flux and sigmas'",)),
        ("rows and columns turned", "flux", "(1, height // 2, width // 2))).float()", "(1, width // 2, height // 2))).float()", "tokens", (f"{UNIT} -k flux", FORMULAS)),
        ("FLUX.1's flow turned", "flux", "noise - latents  # dz_t", "latents - noise  # dz_t", "loss", (f"{UNIT} -k 'flux and loss'",)),
    )
)  # fmt: skip
