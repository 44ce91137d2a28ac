#!/usr/bin/env python
"""Trains a LoRA for Stable Diffusion 1.x/2.x on your own pictures.

From a folder with pictures and captions (`metadata.jsonl`, `metadata.csv`, or a `.txt` beside each picture):

    accelerate launch train_lora_sd15.py -m stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir my_pictures --trigger_word sks --mixed_precision bf16 --cache_latents \\
        --max_train_steps 1000 --validation_prompt "sks, a portrait in a garden" -o output/my_lora

DreamBooth with prior preservation, from pictures without captions:

    accelerate launch train_lora_sd15.py -m stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_prompt "a photo of a dog" -o output/dog

What features cost and bring (docs/step.md; a step at 512 px, batch 1, bf16, rank 4: 2.3 GiB, 1.8 TFLOP):

    --gradient_checkpointing  1.8 GiB, 2.4 TFLOP
    --optimizer adamw8bit     2 bytes of state a weight, not 8
    --train_text_encoder      CLIP is held and run
    --with_prior_preservation twice the pictures a step
    --use_ema                 4 bytes a trained weight
    --quantize_base nf4       base 1.2 GiB, not 1.6

Files written to the output folder (-o):

    pytorch_lora_weights.safetensors   the LoRA, for diffusers: `pipeline.load_lora_weights(folder)`
    NAME.safetensors                   the LoRA with the keys of ComfyUI, AUTOMATIC1111 and kohya's scripts
    NAME_emb.safetensors               trained token embeddings, if any (key clip_l)
    comparison.png                     the same prompts and seeds without and with the LoRA
    samples/  checkpoint-N/  config.yaml  verdict.json  metrics.jsonl  logs/  README.md

Read it from the top: what is learned, from what, when and in which order stands here, how it is done in
lora_training/. What all four scripts have in common is the same to the letter. Exit codes: 0 done, 1 failed,
2 wrong arguments or input, 128 + the number of a signal (Ctrl-C: 130).
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run answers signals, Ctrl-C just ends it

import sys
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from lora_training import require_interface

    require_interface(1)
    from lora_training.libraries import import_libraries, load_lazily
except ImportError as error:
    way_out = "`pip install` the project's folder, or copy lora_training from it along"
    sys.exit(f"{Path(__file__).name}: error: {error}: {way_out}")

from lora_training import base_model, cli, data, exits, lora, optim, report, text, training, validation
from lora_training.console import print_status, progress
from lora_training.errors import UserError
from lora_training.families import SD15 as FAMILY
from lora_training.seeds import stable_seed
from lora_training.signals import StopSignal

if TYPE_CHECKING:
    import argparse
    import random

    from lora_training.base_model import Components
    from lora_training.optim import TrainedPart
    from lora_training.training import MetricsLogger, Run

torch = load_lazily("torch")

LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
TEXT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_LORA_ENCODERS = ("clip_l",)  # those that --train_text_encoder gives a LoRA
TI_ENCODERS = ("clip_l",)  # those that learn new tokens by default
USUAL_INFERENCE_STEPS = 50
USUAL_GUIDANCE = 7.5
FOREIGN_FLAGS = {  # of other families: accepted while they are off, else an error with this reason
    "weighting_scheme": "noise prediction has no such thing; --snr_gamma weighs its loss",
    "enable_t5_ti": "this family has no T5",
}
FAMILY_RULES = ()


def add_family_args(add) -> None:
    """Flags that only this family has."""
    # fmt: off
    add("--clip_skip", type=cli.count_or_off,
        help="use the text encoder's output so many layers before the last (default: 0)")
    add("--max_token_length", type=int, choices=[75, 150, 225], default=75,
        help="tokens read of a caption (75)")
    add("--prompt_weighting", action="store_true",
        help="read (word), (word:1.3), [word] and BREAK in captions and prompts as the WebUIs do")
    add("--snr_gamma", type=cli.amount, help="min-SNR weighting, 5 is usual (default: off)")
    add("--prediction_type", choices=["epsilon", "v_prediction"],
        help="what the base predicts: noise or velocity (default: the scheduler's)")
    add("--rescale_betas_zero_snr", action="store_true",
        help="noise that ends without signal (default: the base's)")
    add("--noise_offset", type=cli.amount, default=0.0,
        help="noise added per channel and image, 0.05 is usual (0: off)")
    add("--debiased_estimation", action="store_true",
        help="weigh the loss by 1 / sqrt(SNR): high noise counts more, low noise hardly")
    add("--input_perturbation", "--ip_noise_gamma", type=cli.amount, default=0.0,
        help="extra noise on the input, 0.1 is usual (0: off)")
    # fmt: on


# ---- noise, timesteps, loss --------------------------------------------------------------------------------


def draw_noise(
    generator, shape: tuple, scheduler, args: argparse.Namespace, quantile: float | None = None
) -> dict:
    """What the loss needs at random for one sample: noise (C, H, W) and a timestep.

    quantile: of the timesteps, fixes the timestep.
    """
    draws = {"noise": torch.randn(shape, generator=generator)}
    low, high = args.min_timestep, min(args.max_timestep, scheduler.config.num_train_timesteps)
    draws["timesteps"] = torch.randint(low, high, (), generator=generator)
    if quantile is not None:
        draws["timesteps"] = torch.tensor(low + int(quantile * (high - low)))
    if args.noise_offset:  # https://www.crosslabs.org/blog/diffusion-with-offset-noise
        draws["noise"] = draws["noise"] + args.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
    if args.input_perturbation:  # https://arxiv.org/abs/2301.11706
        draws["perturbation"] = torch.randn(shape, generator=generator)
    return draws


def compute_loss(
    batch: dict, latents: torch.Tensor, embeds: dict, denoiser, scheduler, args: argparse.Namespace
) -> torch.Tensor:
    """Loss of each sample, (B,), float32. latents (B, C, H, W); batch: noise (B, C, H, W), timesteps (B,)."""
    noise, timesteps = batch["noise"], batch["timesteps"]
    # x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, https://arxiv.org/abs/2006.11239 eq. 4
    input_noise = noise
    if args.input_perturbation:
        input_noise = noise + args.input_perturbation * batch["perturbation"]
    noisy_latents = scheduler.add_noise(latents, input_noise, timesteps)
    model_pred = denoiser(noisy_latents.to(denoiser.dtype), timesteps, embeds["prompt_embeds"]).sample.float()
    # v = sqrt(a_t) eps - sqrt(1 - a_t) x_0, https://arxiv.org/abs/2202.00512
    is_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if is_velocity else noise
    loss = elementwise_loss(model_pred, target, batch, scheduler, args).mean(dim=(1, 2, 3))
    if args.snr_gamma or args.debiased_estimation:
        from diffusers.training_utils import compute_snr

        loss = loss * snr_weight(compute_snr(scheduler, timesteps), is_velocity, args)
    return loss


def snr_weight(snr: torch.Tensor, is_velocity: bool, args: argparse.Namespace) -> torch.Tensor:
    """min-SNR, https://arxiv.org/abs/2303.09556, or debiased estimation, https://arxiv.org/abs/2310.08442.

    Weights (B,). At an SNR of 0, as zero-terminal-SNR schedules have it, the first's is 1, the second's 1000.
    """
    if args.debiased_estimation:
        snr = snr.clamp(max=1000)
        return 1 / (snr + 1) if is_velocity else 1 / snr.clamp(min=1e-6).sqrt()
    if is_velocity:
        return snr.clamp(max=args.snr_gamma) / (snr + 1)
    return (args.snr_gamma / snr).clamp(max=1)


# ---- prompts and their embeddings --------------------------------------------------------------------------


def encode_prompts(key: str, prompts: list[str], tokenizer, text_encoder, args: argparse.Namespace) -> dict:
    """Prompts -> {"hidden": (B, L, D)}, as the pipeline encodes them.

    L is --max_token_length + 2. The hidden states are those of CLIP's last layer, or --clip_skip before it.
    Differentiable in the text encoder.
    """
    chunks = args.max_token_length // 75
    ids, weights = text.chunk_ids(tokenizer, prompts, chunks, args.prompt_weighting)
    output = text_encoder(ids.to(text_encoder.device), output_hidden_states=True)
    hidden = output.last_hidden_state
    if args.clip_skip is not None:
        hidden = text_encoder.final_layer_norm(output.hidden_states[-(args.clip_skip + 1)])
    return {"hidden": text.join_chunks(text.weigh(hidden, weights), chunks)}


def join_embeds(encoded: dict[str, dict], args: argparse.Namespace, config: dict) -> dict:
    """Each encoder's output, by key -> {"prompt_embeds": (B, L, D)}. config: the denoiser's."""
    return {"prompt_embeds": encoded["clip_l"]["hidden"]}


def negative_embeds(empty: dict, components: Components) -> dict:
    """The pipeline's arguments for the unconditional half of guidance, from the empty prompt's embeddings."""
    return {"negative_prompt_embeds": empty["prompt_embeds"]}


# ---- what a base of this family must have, and what of it is trained ---------------------------------------


def check_base(components: Components) -> None:
    """Refuses bases that this script can't train."""
    base, kind = "--pretrained_model_name_or_path", components.index.get("_class_name")
    unet = components.config(FAMILY.denoiser) if components.has(FAMILY.denoiser) else {}
    if not unet or unet.get("addition_embed_type"):
        raise UserError(f"{base} is a {kind}, not {FAMILY.title}")
    if unet["in_channels"] != components.config("vae")["latent_channels"]:
        raise UserError(
            f"{base}: a UNet with {unet['in_channels']} input channels (inpainting, editing) can't be trained"
        )
    layers = components.config("text_encoder")["num_hidden_layers"]
    if (components.args.clip_skip or 0) >= layers:
        raise UserError(f"--clip_skip {components.args.clip_skip}: the text encoder has {layers} layers")
    schedule = components.config("scheduler")
    predicts = components.args.prediction_type or schedule.get("prediction_type", "epsilon")
    if predicts not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{base}: a UNet that predicts {predicts!r} can't be trained here, only noise or velocity"
        )


def idle_layers(part: str, config, args: argparse.Namespace) -> tuple[str, ...]:
    """How names of layers begin whose output nothing reads, so that no gradient reaches them.

    part: a key of FAMILY.text_encoders, or the denoiser's name; config: its configuration.
    """
    if part != "clip_l" or args.clip_skip is None:
        return ()
    return tuple(f"encoder.layers.{config.num_hidden_layers - 1 - k}." for k in range(args.clip_skip))


def token_encoders(args: argparse.Namespace) -> list[str]:
    """The text encoders that learn the new tokens."""
    return [*TI_ENCODERS]


# ---- latents and loss, as in all four scripts --------------------------------------------------------------


def sample_latents(moments: torch.Tensor, noise: torch.Tensor, vae_config: dict) -> torch.Tensor:
    """VAE moments (B, 2C, H, W) and noise (B, C, H, W) -> scaled latents (B, C, H, W)."""
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * noise - (vae_config.get("shift_factor") or 0.0)) * vae_config["scaling_factor"]


def elementwise_loss(
    model_pred: torch.Tensor, target: torch.Tensor, batch: dict, scheduler, args: argparse.Namespace
) -> torch.Tensor:
    """l2, or pseudo-Huber 2c(sqrt((p - t)^2 + c^2) - c), https://arxiv.org/abs/2403.16728, or smooth l1, that
    divided by c; (B, C, H, W) as its inputs.

    batch: timesteps (B,); with --masked_loss, "mask" (B, 1, H, W), whose mean over each picture is 1.
    """
    loss = (model_pred - target.float()) ** 2
    if args.loss_type != "l2":
        c = huber_threshold(batch["timesteps"], scheduler, args)
        scale = 2 * c if args.loss_type == "huber" else 2
        loss = scale * (torch.sqrt(loss + c**2) - c)
    return loss * batch["mask"] if "mask" in batch else loss


def huber_threshold(timesteps: torch.Tensor, scheduler, args: argparse.Namespace):
    """Where the loss turns from square to linear: --huber_c, or as --huber_schedule has it, (B, 1, 1, 1)."""
    c = args.huber_c
    if args.huber_schedule == "constant":
        return c
    if args.huber_schedule == "exponential":  # 1 without noise, c where there is noise alone
        threshold = c ** (timesteps / scheduler.config.num_train_timesteps)
    else:  # by sqrt(1 / SNR)
        level = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        threshold = (1 - c) / (1 + ((1 - level) / level).sqrt()) ** 2 + c
    return threshold.view(-1, 1, 1, 1)


def batch_loss(run: Run, batch: dict, embeds: dict) -> torch.Tensor:
    """Loss of each sample of a batch, (B,): latents from moments or pixels, then the family's loss."""
    if "moments" not in batch:
        batch["moments"] = base_model.encode_pixels(batch["pixels"], run.components.vae())
    latents = sample_latents(batch["moments"], batch["posterior_noise"], run.components.config("vae"))
    embeds = {name: value.to(run.denoiser.dtype) for name, value in embeds.items()}
    with run.autocast():
        return compute_loss(batch, latents, embeds, run.denoiser, run.scheduler, run.args)


# ---- captions ----------------------------------------------------------------------------------------------


def draw_caption(captions: list[str], rng: random.Random, args: argparse.Namespace) -> str:
    """One caption as it is trained: picked, tags shuffled, trigger word in front, or dropped."""
    caption = rng.choice(captions)
    if args.captions_vary:
        front, tags, behind = data.split_tags(caption, args)
        tags = [tag for tag in tags if not args.tag_dropout or rng.random() >= args.tag_dropout]
        if args.shuffle_tags:
            rng.shuffle(tags)
        caption = args.tag_separator.join(front + tags + behind)
    caption = data.prepend_trigger(caption, args.trigger_word)
    return "" if rng.random() < args.caption_dropout else caption


# ---- new tokens, text encoders, and the pivot after which they stay ----------------------------------------


def load_text(run: Run) -> None:
    """New tokens, the text encoders' LoRA, and the embeddings that can't change."""
    args, examples = run.args, run.data.examples
    run.abstractions = text.abstraction_tokens(args, next(iter(run.prompts.tokenizers.values())))
    sample_prompts = validation.sample_prompts(args, examples)
    run.sample_prompts = [text.insert_tokens(prompt, run.abstractions) for prompt in sample_prompts]
    if args.num_validation_images or args.validation_split:
        run.control_prompts = validation.control_prompts(args, examples, run.abstractions)
    if run.abstractions:
        add_tokens(run)
    if args.train_text_encoder:
        add_text_lora(run)
    text.fill_text_cache(run.prompts, run.data, run.abstractions, run.drawn_prompts)


def add_tokens(run: Run) -> None:
    """Adds the new tokens' rows to the embedding tables of the encoders that learn them."""
    args, prompts = run.args, run.prompts
    captions = [caption for example in run.data.examples for caption in example.captions] + args.triggers
    if all(text.insert_tokens(caption, run.abstractions) == caption for caption in captions):
        raise UserError(f"--token_abstraction {args.token_abstraction}: no caption contains it to learn from")
    tokens = [token for group in run.abstractions.values() for token in group]
    keys = token_encoders(args)
    prompts.trained |= set(keys)
    prompts.known.clear()  # a new token may stand for a word that a prompt already had
    for key in keys:
        tokenizer = prompts.tokenizers[key]
        initial = run.initial_lora.get("embeddings", {}).get(key)
        if args.initializer_concept:
            text.report_split(key, tokenizer, args.initializer_concept, len(tokens) // len(run.abstractions))
        encoder = prompts.text_encoder(key)
        run.token_rows[key] = text.TokenRows(
            tokenizer, encoder, tokens, args.initializer_concept, args.seed, initial
        )
        prompts.altered.add(key)


def add_text_lora(run: Run) -> None:
    """Adds a LoRA to the text encoders that --train_text_encoder trains."""
    args, prompts = run.args, run.prompts
    prompts.trained |= set(TEXT_LORA_ENCODERS)
    for key in TEXT_LORA_ENCODERS:
        encoder, part = prompts.text_encoder(key), FAMILY.text_encoders[key][1]
        idle = idle_layers(key, encoder.config, args)
        names = [name for name, module in encoder.named_modules() if isinstance(module, torch.nn.Linear)]
        names = [name for name in names if name.endswith(TEXT_LORA_TARGETS)]
        targets = [name for name in names if not name.removeprefix("text_model.").startswith(idle)]
        lora.add_lora(encoder, targets, args, run.initial_lora.get(part))
        prompts.altered.add(key)
        run.lora_modules[part] = encoder
        encoder.train()
        if args.gradient_checkpointing:
            encoder.gradient_checkpointing_enable()


def active_parts(run: Run, step: int) -> list[TrainedPart]:
    """The parts that step `step` trains; those whose time is over are frozen, once.

    Compared with the global step, so that a resumed run can't miss the pivot.
    """
    for part in run.parts:
        if step >= part.last_step and part.optimizer is not None:
            part.freeze()
            print_status(f"step {step}: {part.name} is trained; from here on it stays as it is")
            if not run.trains_text_at(step):
                freeze_text(run)
    return [part for part in run.parts if step < part.last_step]


def freeze_text(run: Run) -> None:
    """After the pivot: embeddings no longer change, so all are computed once more, and encoders without LoRA
    freed.
    """
    run.prompts.forget()
    run.prompts.trained.clear()
    for name, module in run.lora_modules.items():
        if name != FAMILY.denoiser:
            module.eval()  # no dropout in embeddings that stay
    if not run.args.train_text_encoder:
        text.fill_text_cache(run.prompts, run.data, run.abstractions, run.drawn_prompts)


# ---- --preserve_class --------------------------------------------------------------------------------------


def preservation_loss(run: Run, batch: dict) -> torch.Tensor:
    """--preserve_class: mean square distance, (B,), of the predictions for the batch's pictures called by
    their class from those of the base, the LoRA left out; with the same noise and timesteps.
    """
    args = run.args
    learned = (*args.triggers, *run.abstractions)
    captions = [text.class_caption(caption, args.preserve_class, learned) for caption in batch["captions"]]
    embeds = run.prompts.lookup_captions(captions)
    run.denoiser.disable_adapters()
    with torch.no_grad():
        _, base_pred = predict(run, batch, embeds)
    run.denoiser.enable_adapters()
    _, model_pred = predict(run, batch, embeds)
    return (model_pred - base_pred).square().flatten(1).mean(dim=1)


def predict(run: Run, batch: dict, embeds: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of each sample (B,), the denoiser's prediction) of a batch, both in float32."""
    predictions = []
    hook = run.denoiser.register_forward_hook(
        lambda module, inputs, output: predictions.append(output[0].float())
    )
    loss = batch_loss(run, batch, embeds)
    hook.remove()
    return loss, predictions[0]


# ---- the run: what happens, in which order -----------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Trains as the command line says; returns the exit code."""
    with exits.exit_code() as outcome:
        args = parse_args(argv)
        outcome.output_dir = Path(args.output_dir)
        with training.open_output_folder(args):
            if not training.is_finished(args):
                import_libraries(FAMILY.title)
                execute(args)
    return outcome.code


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings, checked; nothing heavy has been imported yet."""
    usual = {
        "lora_targets": LORA_TARGETS,
        "inference_steps": USUAL_INFERENCE_STEPS,
        "guidance": USUAL_GUIDANCE,
    }
    return cli.parse_args(argv, FAMILY, __file__, add_family_args, FAMILY_RULES, FOREIGN_FLAGS, **usual)


def execute(args: argparse.Namespace) -> None:
    """A whole run, in the order in which it happens."""
    from peft.helpers import disable_input_dtype_casting

    run, checkpoint = prepare_run(args)
    first_step = training.load_checkpoint(run, *checkpoint) if checkpoint else 0
    run.pictures = validation.PictureBudget(run, first_step)
    if run.control_prompts and not args.dry_run:
        run.probe = validation.Probe(run, draw_noise, predict)
    active_parts(run, first_step)
    training.start_trackers(run, first_step)
    training.report_plan(run)
    with disable_input_dtype_casting(run.denoiser, active=run.accelerator.mixed_precision != "no"):
        if run.pictures.draws_start:
            # before the training, so that too little memory shows at once
            training.on_main_process(run, validation.draw_samples, run, 0, uses_denoiser=True)
        if args.dry_run:
            training.perform_dry_run(run, train)
        else:
            train(run, first_step)
    if run.control_prompts and run.draws_comparison:
        training.on_main_process(run, validation.draw_control_images, run, run.max_steps, uses_denoiser=True)
    report.finish(run)


def prepare_run(args: argparse.Namespace) -> tuple[Run, tuple[Path, dict] | None]:
    """Everything up to the first step: base, data, text, what is trained.

    Returns (run, the checkpoint to go on from).
    """
    stop = StopSignal()  # first, so that a signal during the preparations is answered too
    with progress("looking at the machine"):
        run = training.Run(args, training.start_accelerator(args), stop)
    checkpoint = training.find_checkpoint(args)
    training.choose_seed(args, checkpoint)
    run.components = training.open_base(run, check_base, draw_noise)
    run.initial_lora = lora.read_initial_lora(args, run.components.folder) if args.init_lora else {}
    load_data(run)
    load_text(run)
    add_trained_parts(run)
    if not checkpoint and run.accelerator.is_main_process:
        training.clear_output_folder(Path(args.output_dir))
    training.on_main_process(run, report.write_run_files, run)
    return run, checkpoint


def load_data(run: Run) -> None:
    """Examples, class images, which of them stand in which batch, and their latents, if these are cached."""
    args, components = run.args, run.components
    examples, class_examples, buckets = data.load_sets(args)
    store = data.prepare_examples(examples, buckets, args)
    data.hold_out_sets(store.examples, args)
    data.print_buckets(store.examples, buckets)
    run.prompts = text.Prompts(args, components, encode_prompts, join_embeds, negative_embeds)
    run.findings = data.report_findings(store.examples, buckets, run.prompts.tokenizers, args)
    if args.with_prior_preservation:
        validation.generate_class_images(args, components, run.prompts, run.accelerator)
        class_examples = class_examples + validation.load_class_examples(args)
    class_store = data.prepare_examples(class_examples, buckets, args) if class_examples else None
    run.scheduler = components.training_scheduler()
    vae_config = components.config("vae")
    run.data = data.TrainingData(
        store, class_store, args, vae_config, run.scheduler, draw_noise, draw_caption
    )
    class_images = len(run.data.class_examples)
    run.plan = data.BatchPlan(store.examples, args, run.accelerator.num_processes, class_images)
    training.plan_steps(run)
    if args.cache_latents:
        data.cache_latents(run.data, run.plan, components, args)


def add_trained_parts(run: Run) -> None:
    """Loads the denoiser, adds its LoRA, and makes the parts that are trained, each with its share of the
    steps.
    """
    args = run.args
    print_status(f"loading the {FAMILY.denoiser}")
    run.denoiser = run.components.denoiser()
    run.denoiser.train()
    factor = run.plan.size * args.gradient_accumulation_steps if args.scale_lr else 1
    text_lr = (args.learning_rate if args.text_encoder_lr is None else args.text_encoder_lr) * factor
    text_decay = args.adam_weight_decay_text_encoder

    def add_part(name: str, parameters: dict, learning_rate: float, decay: float, share: float) -> None:
        last_step = max(1, round(share * run.max_steps))
        run.parts.append(optim.TrainedPart(name, parameters, learning_rate, decay, last_step))

    if run.token_rows:
        share = 1.0 if args.train_transformer_frac == 0 else args.train_text_encoder_ti_frac
        weights = {key: rows.weight for key, rows in run.token_rows.items()}
        add_part("embeddings", weights, text_lr, text_decay, share)
    if run.lora_modules:
        parameters = {
            f"{part}.{name}": parameter
            for part, module in run.lora_modules.items()
            for name, parameter in lora.lora_parameters(module).items()
        }
        add_part("text_encoder", parameters, text_lr, text_decay, args.train_text_encoder_frac)
    if args.train_transformer_frac > 0:
        idle = idle_layers(FAMILY.denoiser, run.denoiser.config, args)
        initial = run.initial_lora.get(FAMILY.denoiser)
        lora.add_denoiser_lora(run.denoiser, args, LORA_TARGETS, idle, initial)
        run.lora_modules = {FAMILY.denoiser: run.denoiser} | run.lora_modules
        parameters = lora.lora_parameters(run.denoiser)
        decay, share = args.adam_weight_decay, args.train_transformer_frac
        add_part("denoiser", parameters, args.learning_rate * factor, decay, share)
    training.prepare_denoiser(run)
    run.initial_states = {part: lora.lora_state(module) for part, module in run.lora_modules.items()}
    optim.prepare_parts(run.parts, args, run.components.dtype)
    training.fuse_layers(run)
    training.report_parts(run)
    run.guard = optim.NonFiniteGuard(run.accelerator.device, run.accelerator.mixed_precision == "fp16")


# ---- the loop, and one step of it --------------------------------------------------------------------------


def train(run: Run, first_step: int) -> None:
    """The loop: batches, loss, backward, step, log, save, validate.

    Between two logs it never waits for the GPU.
    """
    args, metrics = run.args, training.MetricsLogger(run, first_step)
    gradient_check = training.GradientCheck(run, first_step, active_parts(run, first_step))
    run.stop.in_loop = True
    run.accelerator.wait_for_everyone()  # metrics.jsonl is as it was at the first step
    accumulation, workers = args.gradient_accumulation_steps, args.dataloader_num_workers
    numbers = range(first_step * accumulation, run.max_steps * accumulation)
    with (
        progress("training", run.max_steps, initial=first_step, leave=True, delay=0) as bar,
        data.batches_ahead(run.data, run.plan, numbers, run.accelerator, workers) as batches,
    ):
        is_due = training.validation_is_due(run, first_step)
        if is_due and first_step < run.max_steps:  # killed between checkpoint and pictures
            validate(run, first_step, metrics)
        for step in range(first_step, run.max_steps):
            active = active_parts(run, step)
            for micro_step in range(accumulation):
                metrics.add(backward(run, next(batches), step, micro_step))
            grad_norm = run.guard.apply(active, run.accelerator, args.max_grad_norm)
            gradient_check.observe(step, active)
            if run.guard.allows_step():
                for part in active:
                    part.step()
            done = step + 1
            bar.update()
            if done % args.logging_steps == 0 or done == run.max_steps:
                metrics.log(done, grad_norm, active, bar)
                run.pictures.observe(metrics, done)
            requests = training.received_requests(run, done)
            validating = done in run.validation_steps
            saving = requests.save or requests.stop or (run.probe and validating)
            if done % args.checkpointing_steps == 0 or saving:
                metrics.write_pending()  # and a validated step is kept, so that the advised one can be taken
                training.on_main_process(run, training.save_checkpoint, run, done)
            if requests.stop:
                training.stop_run(run, requests.stop, done)
            if validating and done < run.max_steps:
                metrics.write_pending()
                validate(run, done, metrics)
    run.stop.in_loop = False
    metrics.close()
    training.check_weights_changed(run)
    # before the last pictures: whatever befalls them, the LoRA is there
    training.on_main_process(run, training.save_weights, run)
    if training.validation_is_due(run, run.max_steps):
        validate(run, run.max_steps, metrics)


def backward(run: Run, batch: dict, step: int, micro_step: int) -> torch.Tensor:
    """Loss of one batch, its gradients added to the parts' buffers; returns the loss, a tensor."""
    args = run.args
    captions = [text.insert_tokens(caption, run.abstractions) for caption in batch["captions"]]
    process = run.accelerator.process_index
    torch.manual_seed(stable_seed(args.seed, "dropout", step, micro_step, process))
    with run.autocast():
        trained = run.prompts.trained if run.trains_text_at(step) else ()
        embeds = run.prompts.lookup_captions(captions, live=trained)

    def accumulate(losses: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        loss = (losses * weight).sum() / args.gradient_accumulation_steps
        (loss * run.guard.scale if run.guard.half else loss).backward()
        return loss.detach()

    def forward_and_backward(inputs: dict) -> torch.Tensor:
        losses = batch_loss(run, inputs, {name: inputs[name] for name in embeds})
        loss = accumulate(losses, inputs["weight"])
        if args.preserve_class and run.parts[-1].optimizer:  # the denoiser's part, while it is trained
            accumulate(args.preserve_weight * preservation_loss(run, inputs), inputs["weight"])
        for part in run.parts:
            part.accumulate_gradients()
        return loss

    inputs = batch | embeds
    if run.cuda_graphs:
        return run.cuda_graphs.run(forward_and_backward, inputs)
    return forward_and_backward(inputs)


def validate(run: Run, step: int, metrics: MetricsLogger) -> None:
    """Held-out loss and validation images, on the main process."""
    run.accelerator.wait_for_everyone()
    if step in run.pictures.steps and run.sample_prompts:
        training.on_main_process(run, validation.draw_and_log_samples, run, step, uses_denoiser=True)
    if run.probe:  # its row comes last: it says that the pictures are there
        values = run.probe.measure()
        metrics.write({"step": step} | values)
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
        print_status(f"step {step}: {shown}")
    training.on_main_process(run, report.write_report, run)
    metrics.restart_timer()


if __name__ == "__main__":
    sys.exit(main())
