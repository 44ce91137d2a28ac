#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "peft==0.21.2",
#   "accelerate==1.15.0", "datasets==5.2.0", "bitsandbytes==0.50.2", "prodigyopt==1.1.2",
#   "schedulefree==1.4.1", "safetensors==0.8.0", "pillow==13.0.0", "pyyaml==6.0.3",
#   "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///
"""Trains a LoRA for Stable Diffusion 1.x/2.x on your own pictures.

From a folder with pictures and captions (`metadata.jsonl`, `metadata.csv`, or a `.txt` beside each picture):

    accelerate launch train_lora_sd15.py -m stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir my_pictures --trigger_word sks --mixed_precision bf16 --cache_latents \\
        --max_train_steps 1000 --validation_prompt "sks, a portrait in a garden" -o output/my_lora

DreamBooth with prior preservation, from pictures without captions:

    accelerate launch train_lora_sd15.py -m stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_prompt "a photo of a dog" -o output/dog

What features cost and bring (a step at 512 px, batch 1, bf16, rank 4, cached latents: 2.4 GiB, 1.8 TFLOP; docs/step.md):

    --gradient_checkpointing   1.8 GiB, 2.3 TFLOP          --optimizer adamw8bit   2 bytes of state a weight, not 8
    --train_text_encoder       CLIP is held and run        --with_prior_preservation   twice the pictures a step
    --use_ema                  4 bytes a trained weight    --quantize_base nf4     base 1.2 GiB, not 1.6

Files written to the output folder (-o):

    pytorch_lora_weights.safetensors   the LoRA, for diffusers: `pipeline.load_lora_weights(folder)`
    NAME.safetensors                   the same LoRA with the keys of ComfyUI, AUTOMATIC1111 and kohya's scripts
    NAME_emb.safetensors               trained token embeddings, if any (key clip_l)
    comparison.png                     the same prompts and seeds without and with the LoRA
    samples/  checkpoint-N/  config.yaml  verdict.json  metrics.jsonl  logs/  README.md

Read it from the top: the family's own comes first (noise, loss, prompts, layers), below the line what all four share, the
run first. Exit codes: 0 done, 1 failed, 2 wrong arguments or input, 128 + the number of a signal (Ctrl-C: 130).
"""

from __future__ import annotations

import argparse
import ast
import bisect
import contextlib
import csv
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

FAMILY = "sd15"
FAMILY_TITLE = "Stable Diffusion 1.x/2.x"
HUB_TAGS = ["stable-diffusion", "stable-diffusion-diffusers"]
PIPELINE_CLASS = "StableDiffusionPipeline"
PIPELINE_OPTIONS = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
TRAINING_SCHEDULER = "DDPMScheduler"  # noise or velocity of a DDPM with the base's betas
DENOISER = "unet"  # the denoiser's name in the pipeline
BLOCKS = ("down_blocks", "mid_block", "up_blocks")
LAST_PRODUCTS: tuple[str, ...] = ()  # of a block: only gated and added
TEXT_ENCODERS = {"clip_l": ("tokenizer", "text_encoder")}  # key in embedding files: names in the pipeline
DROPPED_PARTS: dict[str, tuple[str, ...]] = {}  # flag: parts of the base that the run then does without
TEXT_LORA_ENCODERS = ("clip_l",)  # those that --train_text_encoder gives a LoRA
TI_ENCODERS = ("clip_l",)  # those that learn new tokens by default
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0")
TEXT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
DIFFUSERS_SPELLING = ((".lora_A.", ".lora.down."), (".lora_B.", ".lora.up."))
KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
DEFAULT_RESOLUTION = 512
PIXEL_DIVISOR = 8  # image sides must be divisible by this
VAE_FLOAT32 = False  # whether the base's own VAE overflows in half precision
LOADS_EMBEDDINGS = True  # whether the pipeline has load_textual_inversion
PREDICTS_FLOW = False  # rectified flow (True) or noise/velocity of a DDPM (False)
DEFAULT_INFERENCE_STEPS = 50
DEFAULT_INFERENCE_GUIDANCE = 7.5
FOREIGN_FLAGS = {  # of other families: taken while they are off, else refused with this reason
    "weighting_scheme": "noise prediction has no such thing; --snr_gamma weighs its loss",
    "enable_t5_ti": "this family has no T5",
}
FAMILY_RULES: tuple[tuple, ...] = ()  # as RULES


def add_family_args(add) -> None:
    """Flags that only this family has."""
    add("--clip_skip", type=count, help="use the text encoder's output so many layers before the last (default: 0)")
    add("--max_token_length", type=int, choices=[75, 150, 225], default=75, help="tokens read of a caption (75)")
    add("--snr_gamma", type=amount, help="min-SNR weighting, 5 is usual (default: off)")
    add("--prediction_type", choices=["epsilon", "v_prediction"], help="(default: the scheduler's)")
    add("--rescale_betas_zero_snr", action="store_true", help="noise that ends without signal (default: the base's)")
    add("--noise_offset", type=amount, default=0.0, help="noise added per channel and image, 0.05 is usual (0: off)")
    add("--input_perturbation", type=amount, default=0.0, help="extra noise on the input, 0.1 is usual (0: off)")


def draw_noise(generator, shape: tuple, scheduler, args: argparse.Namespace, quantile: float | None = None) -> dict:
    """What the loss needs at random for one sample: noise (C, H, W) and a timestep; `quantile` fixes the timestep."""
    draws = {"noise": torch.randn(shape, generator=generator)}
    low, high = args.min_timestep, min(args.max_timestep, scheduler.config.num_train_timesteps)
    drawn = torch.randint(low, high, (), generator=generator)
    draws["timesteps"] = drawn if quantile is None else torch.tensor(low + int(quantile * (high - low)))
    if args.noise_offset:  # https://www.crosslabs.org/blog/diffusion-with-offset-noise
        draws["noise"] = draws["noise"] + args.noise_offset * torch.randn(shape[0], 1, 1, generator=generator)
    if args.input_perturbation:  # https://arxiv.org/abs/2301.11706
        draws["perturbation"] = torch.randn(shape, generator=generator)
    return draws


def compute_loss(batch: dict, latents, embeds: dict, denoiser, scheduler, args: argparse.Namespace):
    """Loss of each sample, (B,), float32. latents (B, C, H, W); batch: noise (B, C, H, W), timesteps (B,)."""
    noise, timesteps = batch["noise"], batch["timesteps"]
    # x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, https://arxiv.org/abs/2006.11239 eq. 4
    used = noise + args.input_perturbation * batch["perturbation"] if args.input_perturbation else noise
    noisy_latents = scheduler.add_noise(latents, used, timesteps)
    model_pred = denoiser(noisy_latents.to(denoiser.dtype), timesteps, embeds["prompt_embeds"]).sample.float()
    # v = sqrt(a_t) eps - sqrt(1 - a_t) x_0, https://arxiv.org/abs/2202.00512
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    loss = elementwise_loss(model_pred, target, batch, args).mean(dim=(1, 2, 3))
    if args.snr_gamma:  # min-SNR, https://arxiv.org/abs/2303.09556
        from diffusers.training_utils import compute_snr

        snr = compute_snr(scheduler, timesteps)
        # at an SNR of 0, as zero-terminal-SNR schedules have it, min(snr, gamma) / snr is 1
        weight = snr.clamp(max=args.snr_gamma) / (snr + 1) if velocity else (args.snr_gamma / snr).clamp(max=1)
        loss = loss * weight
    return loss


def encode_prompts(key: str, prompts: list[str], tokenizer, text_encoder, args: argparse.Namespace) -> dict:
    """Prompts -> {"hidden": (B, L, D)}, L = --max_token_length + 2, as the pipeline encodes them (CLIP's last layer, or
    --clip_skip before). Differentiable in the text encoder.
    """
    chunks = args.max_token_length // 75
    output = text_encoder(chunk_ids(tokenizer, prompts, chunks).to(text_encoder.device), output_hidden_states=True)
    hidden = output.last_hidden_state
    if args.clip_skip is not None:
        hidden = text_encoder.final_layer_norm(output.hidden_states[-(args.clip_skip + 1)])
    return {"hidden": join_chunks(hidden, chunks)}


def join_embeds(encoded: dict[str, dict], args: argparse.Namespace, config: dict) -> dict:
    """What each encoder gave, by key -> the denoiser's {"prompt_embeds": (B, L, D)}. config: the denoiser's."""
    return {"prompt_embeds": encoded["clip_l"]["hidden"]}


def negative_embeds(empty: dict, components: Components) -> dict:
    """The pipeline's arguments for the unconditional half of guidance, from the empty prompt's embeddings."""
    return {"negative_prompt_embeds": empty["prompt_embeds"]}


def check_base(components: Components) -> None:
    """Refuses bases that this script can't train."""
    base, kind = "--pretrained_model_name_or_path", components.index.get("_class_name")
    unet = components.config(DENOISER) if components.has(DENOISER) else {}
    if not unet or unet.get("addition_embed_type"):
        raise UserError(f"{base} is a {kind}, not {FAMILY_TITLE}")
    if unet["in_channels"] != components.config("vae")["latent_channels"]:
        raise UserError(
            f"{base}: a UNet with {unet['in_channels']} input channels (inpainting, editing) can't be trained"
        )
    layers = components.config("text_encoder")["num_hidden_layers"]
    if (components.args.clip_skip or 0) >= layers:
        raise UserError(f"--clip_skip {components.args.clip_skip}: the text encoder has {layers} layers")
    predicts = components.args.prediction_type or components.config("scheduler").get("prediction_type", "epsilon")
    if predicts not in ("epsilon", "v_prediction"):
        raise UserError(f"{base}: a UNet that predicts {predicts!r} can't be trained here, only noise or velocity")


def unpack_output(latents, size: tuple[int, int]):
    """What the pipeline gives as latents -> (B, C, H, W)."""
    return latents


def lighten(denoiser) -> None:
    """Has the gated gelus keep nothing but their input for the backward pass."""
    for layer in denoiser.modules():
        if type(layer).__name__ == "GEGLU":
            layer.forward = functools.partial(lambda layer, x: GatedGelu.apply(layer.proj(x)), layer)


def idle_layers(part: str, config, args: argparse.Namespace) -> tuple[str, ...]:
    """Beginnings of names of layers whose output nothing reads, so that no gradient reaches them; `part` as in TEXT_ENCODERS."""
    if part != "clip_l" or args.clip_skip is None:
        return ()
    return tuple(f"encoder.layers.{config.num_hidden_layers - 1 - k}." for k in range(args.clip_skip))


def base_version(config: dict, schedule: dict) -> tuple[str, str, str]:
    """(version, architecture, implementation) as kohya's files name this base, from its denoiser's and scheduler's config."""
    if config["cross_attention_dim"] != 1024:
        return "sd_v1", "stable-diffusion-v1", "diffusers"
    if schedule.get("prediction_type") == "v_prediction":
        return "sd_v2_v", "stable-diffusion-v2-768-v", "diffusers"
    return "sd_v2", "stable-diffusion-v2-512", "diffusers"


def kohya_layout(modules: dict[str, dict], config: dict) -> dict[str, dict]:
    """The UNet's modules under the names of kohya's files: for Stable Diffusion 1.x and 2.x those of diffusers."""
    return modules


# By line: 236 the run: what happens, in which order · 565 the loop, and one step of it · 894 what is logged, and the
# guard against learning nothing · 1020 data: images and captions · 1393 images: decoding, buckets, crops, batches ·
# 1932 text: embeddings and new tokens · 2203 LoRA and optimizer · 2789 the step's layers: LoRA products, frozen
# weights in 8 and 4 bits · 3272 checkpoints and signals · 3493 pictures: validation, class images, comparison · 3714
# probes: what was learned, what was forgotten · 3891 files that a run leaves · 4435 command line · 5115 base model:
# loading, quantising, splitting · 5395 the machine · 5483 errors, lines, seeds, libraries

# ==== From here on, the four training scripts are the same, line for line ====


# ---- the run: what happens, in which order ---------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Trains as the command line says; returns the exit code. What a person can mend ends as one line on stderr, and so does
    a fault of ours, which names the file that has its traceback.
    """
    args = None
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # in a notebook, or where it is another file by now
            stream.reconfigure(errors="replace")  # for captions that a console (Windows: cp1252) can't show
    try:
        args = parse_args(argv)
        with signals_given_back(), temporary_output(args) if args.dry_run else locked_output(args):
            if args.dry_run or not finished_before(args):
                say(f"{FAMILY_TITLE}: importing torch and diffusers")
                with waiting("importing"):
                    import_libraries()
                execute(args)
        return 0
    except UserError as error:
        # one that a loader's process has raised comes with its stack
        return fail(" ".join(str(error).split("UserError: ")[-1].split()), 2)
    except Interrupted as stop:
        StopSignal.raised, (code, *lines) = 0, stop.args
        latest = checkpoints_in(Path(args.output_dir))[:1] if lines else []
        for line in (*lines, *(f"{folder} is there: --resume_from_checkpoint latest goes on" for folder in latest)):
            say(line)
        return code
    except KeyboardInterrupt:  # before the signals were answered
        say("stopped before anything was done")
        return 130
    except Exception as error:
        if type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error):
            advice = "--gradient_checkpointing, --cache_latents, --mixed_precision bf16, --optimizer adamw8bit,"
            advice += " --quantize_base nf4, a lower --train_batch_size or --resolution"
            return fail(f"out of memory; try, in this order, {advice}", 1)
        if type(error).__name__.startswith("Dist") or "/gloo/" in str(error):
            return fail("another process of this run has ended, which this one was waiting for", 1)
        if isinstance(error, OSError) and error.errno:  # a full disk, a folder that is no more, missing rights
            where = error.filename or (args.output_dir if args else "")
            return fail(f"{where}: {error.strerror}{last_good(Path(args.output_dir)) if args else ''}", 1)
        for folder in ([args.output_dir] if args else []) + [tempfile.gettempdir()]:
            with contextlib.suppress(OSError):
                log = Path(folder) / "crash.log"
                log.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
                break
        return fail(f"a fault of this script ({brief(error)}); {log} has the traceback", 1)


def execute(args: argparse.Namespace) -> None:
    """A whole run, in the order in which it happens."""
    from peft.helpers import disable_input_dtype_casting

    run, resume = prepare_run(args)
    first_step = load_checkpoint(run, *resume) if resume else 0
    if run.control_prompts:
        run.probe = Probe(run, first_step)
    active_parts(run, first_step)
    with waiting("starting the trackers"):
        start_trackers(run)
    batch = f"{args.train_batch_size} x {run.accelerator.num_processes} processes x {args.gradient_accumulation_steps}"
    say(
        f"{len(run.plan.buckets)} images, {run.plan.per_epoch} batches per epoch, {run.max_steps} steps,"
        f" batch {batch} accumulated"
    )
    with disable_input_dtype_casting(run.denoiser, active=run.accelerator.mixed_precision != "no"):
        if run.compares and first_step == 0:
            on_main(run, draw_samples, run, 0)  # the base's own pictures; memory that doesn't suffice shows now
        if args.dry_run:
            rehearse(run)
        else:
            train(run, first_step)
    if run.control_prompts and run.compares:
        on_main(run, draw_control, run, run.max_steps)
    with waiting("writing the results"):
        on_main(run, save_results, run)
        on_main(run, write_report, run)
        run.accelerator.end_training()
    summarise(args)
    if run.accelerator.is_main_process:
        if args.push_to_hub:
            with waiting("uploading"):
                push_to_hub(args)
        with Path(args.output_dir, "config.yaml").open("a", encoding="utf-8") as file:
            file.write(f"{FINISHED}{run.max_steps}\n")


def prepare_run(args: argparse.Namespace) -> tuple[Run, tuple[Path, dict] | None]:
    """Everything up to the first step: base, data, text, what is trained. Returns (run, the checkpoint to go on from)."""
    stop = StopSignal()  # first, so that a signal during the preparations is answered too
    with waiting("looking at the machine"):
        run = Run(args, start_accelerator(args), stop)
    resume = find_checkpoint(args)
    settle_seed(args, resume)
    run.components = open_base(run)
    run.start = read_initial_lora(run) if args.init_lora else {}
    load_data(run)
    load_text(run)
    add_trained_parts(run)
    if not resume and run.accelerator.is_main_process:
        clear_output(Path(args.output_dir))
    on_main(run, write_run_files, run)
    return run, resume


REPORT = Path(__file__).resolve().parent / "scripts" / "reports" / "report.py"
CONVERT = REPORT.parents[1] / "lora" / "convert_lora.py"
RESULTS = {  # what a finished run has to show, in the order in which a person wants it
    "LoRA": "pytorch_lora_weights.safetensors",
    "for others": "{name}.safetensors",
    "new tokens": "{name}_emb.safetensors",
    "pictures": "comparison.png",
    "report": "report.html",
}
FINISHED = "# finished: step "


@dataclass
class Run:
    """Everything that the loop uses; `prepare_run` fills it from top to bottom."""

    args: argparse.Namespace
    accelerator: object
    stop: StopSignal
    components: Components = None
    findings: list[str] = field(default_factory=list)  # what will hurt in the data
    data: TrainingData = None
    plan: BatchPlan = None
    max_steps: int = 0
    plan_size: tuple[int, int] = (0, 0)  # width and height of validation images
    validation_steps: set[int] = field(default_factory=set)
    scheduler: object = None
    prompts: Prompts = None
    abstractions: dict[str, list[str]] = field(default_factory=dict)
    sample_prompts: list[str] = field(default_factory=list)
    control_prompts: list[str] = field(default_factory=list)
    rows: dict[str, TokenRows] = field(default_factory=dict)  # by encoder key
    lora_modules: dict[str, object] = field(default_factory=dict)  # pipeline name -> module
    start: dict[str, dict] = field(default_factory=dict)  # --init_lora: weights by pipeline name and peft's key
    initial_states: dict = field(default_factory=dict)
    norms: dict | None = None  # --use_dora: what `neighbours_norms` found
    denoiser: object = None
    parts: list[Part] = field(default_factory=list)
    guard: StepGuard = None
    graphs: Graphs | None = None
    probe: Probe | None = None

    @property
    def compares(self) -> bool:
        """Whether the run draws pictures before and after, for comparison.png."""
        return bool(self.sample_prompts) and not self.args.skip_final_inference

    def autocast(self):
        """For DoRA, whose magnitudes stay in float32; everything else computes in its modules' own precision."""
        return self.accelerator.autocast() if self.args.use_dora else contextlib.nullcontext()

    def text_moves(self, step: int) -> bool:
        """Whether step `step` trains something that text embeddings depend on."""
        return any(p.name != "denoiser" and step < p.last_step for p in self.parts)


def start_accelerator(args: argparse.Namespace):
    """accelerate's view of the machine: device, precision, processes, trackers."""
    import accelerate

    logs = str(Path(args.output_dir) / args.logging_dir)
    project = accelerate.utils.ProjectConfiguration(project_dir=args.output_dir, logging_dir=logs)
    trackers = None if args.report_to == "none" else args.report_to.split(",")
    processes = heed_launcher(args)
    try:
        device = accelerate.PartialState(cpu=accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU")).device
    except RuntimeError as error:
        raise UserError(f"the {processes} processes can't be connected: {brief(error)}") from None
    args.mixed_precision = choose_precision(args, device)
    try_kernels(args, device)
    precision = {"mixed_precision": args.mixed_precision}
    accelerator = accelerate.Accelerator(**precision, log_with=trackers, project_config=project)
    if accelerator.num_processes != processes:
        raise UserError(f"{processes} processes can't train together on {accelerator.device.type}: start one")
    if args.cuda_graphs and (accelerator.device.type != "cuda" or accelerator.mixed_precision == "fp16"):
        raise UserError("--cuda_graphs needs an NVIDIA GPU, and --mixed_precision bf16 or no")
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def heed_launcher(args: argparse.Namespace) -> int:
    """Reads what accelerate would read otherwise in the launcher's environment; returns the number of processes."""
    processes, told = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("ACCELERATE_USE_CPU", "").lower()
    args.deepspeed = os.environ.pop("ACCELERATE_USE_DEEPSPEED", "false") == "true"  # its launcher, not its engine
    if args.deepspeed and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2") not in ("1", "2"):
        raise UserError("DeepSpeed: use zero_stage 1 or 2; config/accelerate_config_fsdp2.yaml splits the base itself")
    if os.environ.pop("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no" and not args.compile:
        say("the launcher's dynamo_backend means --compile")
        args.compile = True
    if processes > 1 and told != "true" and not torch.accelerator.is_available():
        if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate's launcher, not torchrun
            raise UserError("the launcher's configuration is for GPUs, and there is none here: start it without one")
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else each process would train alone, into one folder
    return processes


def settle_seed(args: argparse.Namespace, resume: tuple[Path, dict] | None) -> None:
    """Without --seed: the checkpoint's, or one that is drawn, the same on every process."""
    from accelerate.utils import broadcast_object_list

    if args.seed is None:
        args.seed = broadcast_object_list([resume[1]["seed"] if resume else random.SystemRandom().randrange(2**31)])[0]
        say(f"seed {args.seed}")


def open_base(run: Run) -> Components:
    """The base's parts, none of them loaded yet."""
    args, accelerator = run.args, run.accelerator
    dtype = torch_dtype(accelerator.mixed_precision)
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1
    if sharded and (args.quantize_base or args.compile or args.blocks_to_swap or args.cuda_graphs):
        flags = "--quantize_base, --compile, --blocks_to_swap and --cuda_graphs"
        raise UserError(f"{flags} don't work with FSDP: use a configuration for several GPUs")
    components = Components(resolve_base(args), args, dtype, accelerator.device, sharded)
    with reading_base("a configuration"):
        check_base(components)
        shape = latent_shape((64, 64), components.config("vae"))
        draw_noise(torch.Generator(), shape, components.training_scheduler(), args)
    size = sum(file.stat().st_size for file in components.folder_of(DENOISER).glob("*.safetensors"))
    if accelerator.device.type == "cpu" and size < 100 << 20 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # for small matrices threads wait for each other, and for ever beside other work
    return components


def load_data(run: Run) -> None:
    """Examples, class images, which of them stand in which batch, and their latents, if these are cached."""
    args, components, processes = run.args, run.components, run.accelerator.num_processes
    sets = args.sets or [args]
    buckets = list(dict.fromkeys(size for own in sets for size in bucket_sizes(own)))
    for own in sets:
        own.seed = args.seed  # settled since the sets were read
    learned, classes = (
        [e for own in sets if own.is_class == kind for e in load_examples(own, buckets, several=len(sets) > 1)]
        for kind in (False, True)
    )
    if not learned:
        raise UserError(
            f"--dataset_config {args.dataset_config}: every set is one of the class: what is to be learned?"
        )
    store = prepare_examples(learned, buckets, args)
    examples = store.examples
    for own in (own for own in sets if not own.is_class):
        hold_out([e for e in examples if e.own is own], own)
    print_buckets(examples, buckets)
    run.prompts = Prompts(args, components)
    run.findings = report_findings(examples, buckets, run.prompts.tokenizers, args)
    if args.with_prior_preservation:
        generate_class_images(args, components, run.prompts, run.accelerator)
        classes = classes + load_class_examples(args)
    class_store = prepare_examples(classes, buckets, args) if classes else None
    run.data = TrainingData(store, class_store, args, components.config("vae"), components.training_scheduler())
    run.plan = BatchPlan(examples, args, processes, len(run.data.class_examples))
    steps_per_epoch = run.plan.per_epoch / args.gradient_accumulation_steps
    run.max_steps = args.max_train_steps or math.ceil(args.num_train_epochs * steps_per_epoch)
    if args.num_validation_images or args.validation_split:
        run.validation_steps = validation_schedule(args, run.max_steps, steps_per_epoch)
    run.plan_size = buckets[Counter(e.bucket for e in examples).most_common(1)[0][0]]
    run.scheduler = run.data.scheduler
    if args.cache_latents:
        cache_latents(run.data, run.plan, components, args)


def load_text(run: Run) -> None:
    """New tokens, the text encoders' LoRA, and the embeddings that can't change."""
    examples = run.data.examples
    run.abstractions = abstraction_tokens(run.args, next(iter(run.prompts.tokenizers.values())))
    run.sample_prompts = [insert_tokens(p, run.abstractions) for p in default_prompts(run.args, examples)]
    if run.args.num_validation_images or run.args.validation_split:
        run.control_prompts = control_prompts(run.args, examples, run.abstractions)
    if run.abstractions:
        add_tokens(run)
    if run.args.train_text_encoder:
        add_text_lora(run)
    fill_text_cache(run)


def start_trackers(run: Run) -> None:
    """Starts the trackers with the settings as their configuration; the hub token is not among them."""
    args = run.args
    if not run.accelerator.log_with:
        return
    inner = ("hub_token", "settings", "defaults", "sets", "ordered")
    public = {k: v for k, v in vars(args).items() if k not in inner}
    config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in public.items()}
    own = {"wandb": {"name": args.run_name or Path(args.output_dir).resolve().name, "dir": args.output_dir}}
    run.accelerator.init_trackers(f"lora-{FAMILY}", config=config, init_kwargs=own)


def check_results(run: Run) -> None:
    """Errors if what was trained is no different from where it began."""
    for part in run.parts:
        if torch.equal(part.weights.detach().cpu(), part.initial):
            raise UserError(f"the {part.name} did not change in {run.max_steps} steps: nothing was learned")


@contextlib.contextmanager
def temporary_output(args: argparse.Namespace):
    """--dry_run: while inside, everything is written to a folder that goes afterwards, and nothing is uploaded."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        args.output_dir, args.cache_folder, args.push_to_hub, args.report_to = folder, None, False, "none"
        if args.with_prior_preservation:
            args.class_data_dir, args.num_class_images = tempfile.mkdtemp(dir=folder), 2
        yield


def rehearse(run: Run) -> None:
    """--dry_run: two steps at the largest bucket (the second is timed), a checkpoint; prints time and memory."""
    args, planned = run.args, run.max_steps
    batches, buckets = run.plan.epoch(0), run.data.buckets
    largest = max(batches, key=lambda batch: math.prod(buckets[batch[0].bucket]))
    batches[:] = [largest] * len(batches)
    run.plan_size = buckets[largest[0].bucket]
    run.max_steps = args.checkpointing_steps = min(2, planned)
    args.logging_steps, run.validation_steps = 1, {run.max_steps}
    train(run, 0)
    rows = [json.loads(line) for line in (Path(args.output_dir) / "metrics.jsonl").read_text("utf-8").splitlines()]
    seconds = [row["seconds_per_step"] for row in rows if "seconds_per_step" in row][-1]
    memory, size = peak_memory(run.accelerator.device) / 2**30, "{} x {}".format(*run.plan_size)
    say(f"dry run: largest bucket {size}, {seconds:.3f} s per step, peak memory {memory:.2f} GiB,")
    say(f"dry run: {planned} steps would take about {seconds * planned / 60:.1f} minutes; nothing was kept")


# ---- the loop, and one step of it ------------------------------------------------------------------------------------


def train(run: Run, first_step: int) -> None:
    """The loop: batches, loss, backward, step, log, save, validate. Between two logs it never waits for the GPU."""
    args, meter, witness = run.args, Meter(run, first_step), GradientWitness(run, first_step)
    run.stop.in_loop = True
    run.accelerator.wait_for_everyone()  # metrics.jsonl is as it was at the first step
    with (
        waiting("training", run.max_steps, initial=first_step, leave=True, delay=0) as bar,
        batches_ahead(run, first_step) as batches,
    ):
        if is_due(run, first_step) and first_step < run.max_steps:  # killed between a checkpoint and its pictures
            validate(run, first_step, meter)
        for step in range(first_step, run.max_steps):
            active = active_parts(run, step)
            for micro in range(args.gradient_accumulation_steps):
                meter.add(backward(run, next(batches), step, micro))
            norm = run.guard.apply(active, run.accelerator, args.max_grad_norm)
            witness.look(step, active)
            if run.guard.allows_step():
                for part in active:
                    part.step()
            done = step + 1
            bar.update()
            if done % args.logging_steps == 0 or done == run.max_steps:
                meter.log(done, norm, active, bar)
            stopping = stop_requested(run, done)
            probed = run.probe and done in run.validation_steps  # so that the step that is advised can be taken
            if done % args.checkpointing_steps == 0 or stopping or probed:
                meter.write_pending()
                on_main(run, save_checkpoint, run, done)
            if stopping:
                name = signal.Signals(stopping).name
                say(f"stopped by signal {stopping} ({name}) after step {done}; checkpoint-{done} is written")
                summarise(args, run.accelerator.num_processes, done)
                raise Interrupted(128 + stopping)
            if done in run.validation_steps and done < run.max_steps:
                meter.write_pending()
                validate(run, done, meter)
    run.stop.in_loop = False
    meter.close()
    check_results(run)
    on_main(run, save_weights, run)  # first: whatever befalls the pictures, the LoRA is there
    if is_due(run, run.max_steps):
        validate(run, run.max_steps, meter)


def backward(run: Run, batch: dict, step: int, micro: int):
    """Loss of one batch, its gradients added to the parts' buffers; returns the loss, a tensor."""
    captions = [insert_tokens(c, run.abstractions) for c in batch["captions"]]
    torch.manual_seed(stable_seed(run.args.seed, "dropout", step, micro, run.accelerator.process_index))
    with run.autocast():
        embeds = run.prompts.lookup(captions, live=run.prompts.trained if run.text_moves(step) else ())

    def descend(losses, given: dict):
        loss = (losses * given["weight"]).sum() / run.args.gradient_accumulation_steps
        (loss * run.guard.scale if run.guard.half else loss).backward()
        return loss.detach()

    def work(given: dict):
        loss = descend(batch_loss(run, given, {name: given[name] for name in embeds}), given)
        if run.args.preserve_class and run.parts[-1].optimizer:  # the denoiser's part, while it is trained
            descend(run.args.preserve_weight * preservation_loss(run, given), given)
        for part in run.parts:
            part.collect()
        return loss

    return run.graphs.run(work, batch | embeds) if run.graphs else work(batch | embeds)


class Graphs:
    """CUDA graphs of forward and backward pass, one for each shape of batch: hundreds of launches become one.

    By torch's rules, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: inputs and gradients stay where they are,
    the first passes run on a stream of their own, and the graphs share their memory. Not yet tried on a GPU.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts, self.recorded, self.pool = parts, {}, None

    def run(self, work, given: dict):
        """What work(given) returns, a tensor; its launches are recorded at the first batch of this shape."""
        given = {name: value for name, value in given.items() if torch.is_tensor(value)}
        shapes = tuple((name, value.shape) for name, value in given.items())
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record(work, {name: value.clone() for name, value in given.items()})
        graph, inputs, result = self.recorded[shapes]
        for name, value in given.items():
            inputs[name].copy_(value)
        graph.replay()
        return result.clone()

    def record(self, work, inputs: dict) -> tuple:
        """(the graph, its inputs, its result)."""
        stream, kept = torch.cuda.Stream(), [part.gradients.clone() for part in self.parts]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        for part, gradients in zip(self.parts, kept, strict=True):
            part.gradients.copy_(gradients)  # without what the first passes have added
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = work(inputs)
        self.pool = graph.pool()
        return graph, inputs, result


def batch_loss(run: Run, batch: dict, embeds: dict):
    """Loss of each sample of a batch, (B,): latents from moments or pixels, then the family's loss."""
    if "moments" not in batch:
        batch["moments"] = encode_image(batch["pixels"], run.components.vae())
    latents = sample_latents(batch["moments"], batch["posterior_noise"], run.components.config("vae"))
    embeds = {name: value.to(run.denoiser.dtype) for name, value in embeds.items()}
    with run.autocast():
        return compute_loss(batch, latents, embeds, run.denoiser, run.scheduler, run.args)


def preservation_loss(run: Run, batch: dict):
    """--preserve_class: mean square distance, (B,), of the predictions for the batch's pictures called by their class from
    those of the base, the LoRA left out; with the same noise and timesteps.
    """
    embeds = run.prompts.lookup([class_caption(caption, run) for caption in batch["captions"]])
    run.denoiser.disable_adapters()
    with torch.no_grad():
        _, wanted = predict(run, batch, embeds)
    run.denoiser.enable_adapters()
    _, found = predict(run, batch, embeds)
    return (found - wanted).square().flatten(1).mean(dim=1)


def predict(run: Run, batch: dict, embeds: dict) -> tuple:
    """(loss of each sample (B,), the denoiser's prediction) of a batch, both in float32."""
    seen = []
    hook = run.denoiser.register_forward_hook(lambda module, given, result: seen.append(result[0].float()))
    loss = batch_loss(run, batch, embeds)
    hook.remove()
    return loss, seen[0]


def sample_latents(moments, noise, config: dict):
    """VAE moments (B, 2C, H, W) and noise (B, C, H, W) -> scaled latents (B, C, H, W)."""
    mean, std = moments.float().chunk(2, dim=1)
    return (mean + std * noise - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]


def unscaled(latents, config: dict):
    """Latents as the denoiser works on them -> as the VAE does, (B, C, H, W) both."""
    return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)


def elementwise_loss(model_pred, target, batch: dict, args: argparse.Namespace):
    """l2, or pseudo-Huber 2c(sqrt((p - t)^2 + c^2) - c), https://arxiv.org/abs/2403.16728; same shape as its inputs (B, C, H, W).

    batch: with --masked_loss, "mask" (B, 1, H, W), whose mean over each picture is 1.
    """
    loss = (model_pred - target.float()) ** 2
    if args.loss_type == "huber":
        c = args.huber_c
        loss = 2 * c * (torch.sqrt(loss + c**2) - c)
    return loss * batch["mask"] if "mask" in batch else loss


TIMESTEP_SAMPLING = ["weighting_scheme", "uniform", "sigmoid", "shift"]


def draw_level(generator, args: argparse.Namespace, quantile: float | None = None) -> float:
    """Where in a flow's table of noise levels one sample stands: from 0, all noise, to 1; `quantile` fixes it.

    --min_timestep and --max_timestep bound it, in thousandths of the table, before a shift that the base has of its own.
    """
    from diffusers.training_utils import compute_density_for_timestep_sampling

    if quantile is not None:
        level = quantile
    elif args.timestep_sampling == "weighting_scheme":
        settings = (args.logit_mean, args.logit_std, args.mode_scale)
        level = compute_density_for_timestep_sampling(args.weighting_scheme, 1, *settings, generator=generator).item()
    elif args.timestep_sampling == "uniform":
        level = torch.rand((), generator=generator).item()
    else:
        level = torch.randn((), generator=generator).sigmoid().item()
    if args.timestep_sampling == "shift" and quantile is None:  # s' = S s / (1 + (S - 1) s) of the sigma s = 1 - level
        level /= level + args.timestep_shift * (1 - level)
    low, high = 1 - args.max_timestep / 1000, 1 - args.min_timestep / 1000
    return low + level * (high - low)


def active_parts(run: Run, step: int) -> list[Part]:
    """The parts that step `step` trains; those whose time is over are frozen, once."""
    for part in run.parts:
        if step >= part.last_step and part.optimizer is not None:
            part.freeze()
            say(f"step {step}: {part.name} is trained; from here on it stays as it is")
            if not run.text_moves(step):
                settle_text(run)
    return [p for p in run.parts if step < p.last_step]


@contextlib.contextmanager
def batches_ahead(run: Run, first_step: int):
    """Batches from step `first_step` on, on the device; a thread prepares the next one while this one is trained on."""
    accumulation = run.args.gradient_accumulation_steps
    start, stop = first_step * accumulation, run.max_steps * accumulation
    loader = torch.utils.data.DataLoader(
        run.data,
        batch_sampler=(run.plan.share(number, run.accelerator.process_index) for number in range(start, stop)),
        collate_fn=pack_batch,
        num_workers=run.args.dataloader_num_workers,
        worker_init_fn=ready_worker,
        pin_memory=run.accelerator.device.type == "cuda",
        generator=torch.Generator(),  # one of its own keeps the global one untouched
    )
    batches, device = iter(loader), run.accelerator.device

    def upcoming(pool):
        prepared = pool.submit(next, batches)
        for number in range(start, stop):
            try:
                batch = unpack_batch(prepared.result(), device)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise UserError(
                    "a process that prepares images has died (out of memory?): fewer --dataloader_num_workers"
                ) from None
            if number + 1 < stop:
                prepared = pool.submit(next, batches)
            yield batch

    try:
        with ThreadPoolExecutor(1) as pool:
            yield upcoming(pool)
    finally:
        if run.args.dataloader_num_workers:  # else Python waits at its end for them, who answer no signal
            batches._shutdown_workers()


def ready_worker(number: int) -> None:
    """Readies a process that prepares images: the libraries, where it doesn't have them from the main process (Windows, macOS),
    which alone answers signals.
    """
    import_libraries(models=False)
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def to_device(batch: dict, device) -> dict:
    """Moves the tensors of a batch."""
    free = device.type == "cuda"  # elsewhere a copy that isn't waited for may be read before it is there
    return {k: v.to(device, non_blocking=free) if torch.is_tensor(v) else v for k, v in batch.items()}


def pack_batch(items: list[dict]) -> dict:
    """Items of one bucket -> a batch that takes one copy to the device for each type of tensor: {captions, buffers, layout}."""
    batch = collate(items)
    layout = {name: (str(v.dtype), v.shape) for name, v in batch.items() if name != "captions"}
    kinds = {kind: [n for n, (own, _) in layout.items() if own == kind] for kind, _ in layout.values()}
    buffers = {kind: torch.cat([batch[name].flatten() for name in names]) for kind, names in kinds.items()}
    return {"captions": batch["captions"], "buffers": buffers, "layout": layout}


def unpack_batch(packed: dict, device) -> dict:
    """What `pack_batch` made -> the batch, as `collate` gives it, on the device."""
    buffers, batch = to_device(packed["buffers"], device), {"captions": packed["captions"]}
    for name, (kind, shape) in packed["layout"].items():
        batch[name], buffers[kind] = buffers[kind].split([math.prod(shape), len(buffers[kind]) - math.prod(shape)])
        batch[name] = batch[name].view(shape)
    return batch


def validate(run: Run, step: int, meter: Meter) -> None:
    """Held-out loss and validation images, on the main process."""
    run.accelerator.wait_for_everyone()
    draws = run.compares if step == run.max_steps else run.args.validation_prompt
    if draws and run.sample_prompts:
        on_main(run, log_samples, run, step)
    if run.probe:  # its row comes last: it says that the pictures are there
        found = run.probe.measure()
        meter.write({"step": step} | found)
        say(f"step {step}: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in found.items()))
    on_main(run, write_report, run)
    meter.pause()


def is_due(run: Run, step: int) -> bool:
    """Whether a step's validation is still to be done, or to be finished: its row in metrics.jsonl is the last that it writes."""
    if step not in run.validation_steps:
        return False
    return not any(row["step"] == step and "learned" in row for row in read_metrics(run.args.output_dir))


def validation_schedule(args: argparse.Namespace, max_steps: int, steps_per_epoch: float) -> set[int]:
    """The steps after which validation runs: as the flags say, else about five times; always at the end."""
    every = args.validation_steps or (
        max(1, round(args.validation_epochs * steps_per_epoch)) if args.validation_epochs else max(1, max_steps // 5)
    )
    return set(range(every, max_steps, every)) | {max_steps}


def default_prompts(args: argparse.Namespace, examples: list[Example]) -> list[str]:
    """What pictures show: the validation prompts, else two captions."""
    if args.num_validation_images == 0 or (args.skip_final_inference and not args.validation_prompt):
        return []
    captions = [with_trigger(e.captions[0], e.own.trigger_word) for e in examples if not e.held_out]
    return list(args.validation_prompt or dict.fromkeys(captions))[: None if args.validation_prompt else 2]


def stop_requested(run: Run, step: int) -> int:
    """The number of the signal that any process has received, or 0; agreed between processes, every ten steps."""
    if run.accelerator.num_processes == 1:
        return run.stop.number
    if step % 10:
        return 0
    numbers = run.accelerator.gather(torch.tensor([run.stop.number], device=run.accelerator.device))
    return int(numbers.max())


def on_main(run: Run, work, *arguments) -> None:
    """Runs something on the main process while the others wait; drawing with a sharded base takes them all."""
    if run.accelerator.is_main_process or (
        run.components.sharded and work in (draw_samples, log_samples, draw_control)
    ):
        work(*arguments)
    run.accelerator.wait_for_everyone()


# ---- what is logged, and the guard against learning nothing ----------------------------------------------------------


class Meter:
    """Collects losses on the device, and writes metrics.jsonl and trackers: a step late, so that the GPU is never waited for."""

    def __init__(self, run: Run, first_step: int) -> None:
        self.run, self.loss, self.since, self.began = run, None, first_step, time.perf_counter()
        self.pending: list[tuple] = []  # rows whose numbers are on their way
        self.seconds, self.unwritten = [], []  # of each log's steps; lines for metrics.jsonl
        self.file = Path(run.args.output_dir) / "metrics.jsonl"
        if run.accelerator.is_main_process:
            kept = [row for row in read_metrics(run.args.output_dir) if first_step and row["step"] <= first_step]
            with written(self.file) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def add(self, loss) -> None:
        """Takes one batch's share of the loss, without waiting for it."""
        self.loss = loss if self.loss is None else self.loss + loss

    def log(self, step: int, norm, active: list[Part], bar) -> None:
        """Writes the row of the log before, and sends the mean loss since then on its way to the host."""
        run, steps = self.run, step - self.since
        found = [d for p in active if (d := p.group().get("d")) is not None]  # Prodigy's estimates, on the device
        numbers = torch.stack([self.loss / steps, norm, run.guard.bad_run, run.guard.bad_total, *found])
        if run.accelerator.num_processes > 1:
            numbers[0] = run.accelerator.reduce(numbers[0], reduction="sum")
        arriving = numbers.to("cpu", non_blocking=numbers.is_cuda)
        event = torch.Event(numbers.device) if numbers.is_cuda else None
        if event:
            event.record()
        row = {"step": step, "epoch": step * run.args.gradient_accumulation_steps / run.plan.per_epoch}
        self.write_arrived()
        self.seconds.append((time.perf_counter() - self.began) / steps)
        rates = {f"lr_{p.name}": p.rate for p in active}
        self.pending.append((row, rates | {"seconds_per_step": self.seconds[-1]}, arriving, event, bar))
        if event is None:  # not on a GPU: nothing to wait for
            self.write_arrived()
        self.loss, self.since, self.began = None, step, time.perf_counter()

    def write_pending(self) -> None:
        """Waits for all rows that are on their way, and writes them."""
        if any(event for *_, event, _ in self.pending):
            torch.cuda.synchronize()
        self.write_arrived()

    def write_arrived(self) -> None:
        """Writes the rows whose numbers have arrived. Errors: UserError after ten losses that aren't finite."""
        while self.pending and (self.pending[0][3] is None or self.pending[0][3].query()):
            self.write_row(*self.pending.pop(0))

    def write_row(self, row: dict, rates: dict, arrived, event, bar) -> None:
        """Writes the row of one log."""
        loss, norm, bad_run, bad_total, *found = arrived.tolist()
        for name, d in zip(rates, found, strict=False):  # the rates come first
            rates[name] *= d
        skipped = {"skipped_steps": int(bad_total)} if bad_total else {}
        self.write(row | {"loss": loss, "grad_norm": norm} | rates | skipped)
        bar.set_postfix({"loss": f"{loss:.4f}"}, refresh=False)
        if bad_run:
            say(f"warning: step {row['step']}: the loss is {loss}; the step is left out")
        if bad_run >= 10:
            advice = "try --mixed_precision bf16 or a lower --learning_rate"
            kept = last_good(Path(self.run.args.output_dir))
            raise UserError(f"the loss has not been finite for {int(bad_run)} steps: {advice}{kept}")

    def write(self, row: dict) -> None:
        """Appends a row to metrics.jsonl and sends it to the trackers. Windows' spreadsheets lock the file: then later."""
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
        if self.run.accelerator.is_main_process:
            self.unwritten.append(json.dumps(finite) + "\n")
            with contextlib.suppress(PermissionError), self.file.open("a", encoding="utf-8") as stream:
                stream.writelines(self.unwritten)
                self.unwritten.clear()
        self.run.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def pause(self) -> None:
        """Leaves the time since the last log out of the step times."""
        self.began = time.perf_counter()

    def close(self) -> None:
        """Writes what is pending, and prints the median step time."""
        self.write_pending()
        if self.seconds:
            say(f"median {sorted(self.seconds)[len(self.seconds) // 2]:.3f} s per step")


class GradientWitness:
    """Sees in the first steps which parameters get a gradient; errors if a part, warns if a layer, gets none.

    It looks for an epoch (2 to 50 steps): a LoRA's second matrix has none in the first step, and a token's captions may come late.
    """

    def __init__(self, run: Run, first_step: int) -> None:
        self.run = run
        epoch = math.ceil(run.plan.per_epoch / run.args.gradient_accumulation_steps)
        self.last = min(first_step + min(max(2, epoch), 50), run.max_steps) - 1
        parts = active_parts(run, first_step) if self.last > first_step else []
        self.seen = {p.name: torch.zeros_like(p.gradients, dtype=torch.bool) for p in parts}

    def look(self, step: int, active: list[Part]) -> None:
        """Notes the gradients of a step, and judges after the last of the first steps."""
        if not self.seen:
            return
        for part in active:
            self.seen[part.name] |= part.gradients != 0
        if step == self.last:
            for part in active:
                if not self.run.guard.bad_total:  # a loss that isn't finite has a message of its own
                    self.judge(part)
            self.seen.clear()

    def judge(self, part: Part) -> None:
        """The verdict on one part."""
        if not self.seen[part.name].any():
            tokens = "do the captions contain --token_abstraction?"
            advice = tokens if part.name == "embeddings" else "is the loss constant?"
            raise UserError(f"no gradient reaches the {part.name}, so nothing would be learned: {advice}")
        layers: dict[str, bool] = {}
        for name, seen in part.split(self.seen[part.name]).items():
            layer = ADAPTER.split(name)[0]
            layers[layer] = bool(seen.any()) | layers.get(layer, False)
        if idle := [layer for layer, works in layers.items() if not works]:
            say(f"warning: {len(idle)} of {len(layers)} layers of the {part.name} get no gradient, such as {idle[0]}")


# ---- data: images and captions ---------------------------------------------------------------------------------------

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif", ".avif"}
CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass
class Example:
    """One training image. `read()` gives the file's bytes; sizes are (width, height) in pixels, upright."""

    name: str
    captions: list[str]
    read: object
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    bucket: int = 0
    held_out: bool = False
    read_mask: object = None  # as `read`, of the picture that is its mask
    own: argparse.Namespace = None  # the flags of its set
    places: list[int] | None = None  # of the buckets that are its set's; None: all


def load_examples(args: argparse.Namespace, buckets: list[tuple] = (), several: bool = False) -> list[Example]:
    """The images of a set and their captions, as its flags say. Captions are still without trigger word.

    several: there are other sets, so that names begin with the folder's.
    """
    examples, source = source_examples(args), args.dataset_name or args.train_data_dir or args.instance_data_dir
    places = [buckets.index(size) for size in bucket_sizes(args)] if buckets else None
    for example in examples:
        example.own, example.places = args, places
        example.name = f"{Path(source).name}/{example.name}" if several else example.name
    if args.max_train_samples is not None and args.max_train_samples < len(examples):
        rng = random.Random(stable_seed(args.seed, "max_train_samples"))
        examples = [examples[i] for i in sorted(rng.sample(range(len(examples)), args.max_train_samples))]
    fallback = clean_caption(args.instance_prompt or args.default_caption)
    bare = [e for e in examples if not e.captions]
    for example in bare:
        example.captions = [fallback]
    if bare and not fallback:
        if len(bare) == len(examples) and not args.trigger_word:
            raise UserError("no image has a caption: write .txt files, or give --instance_prompt or --default_caption")
        names = listed([e.name for e in bare])
        instead = "the trigger word alone" if args.trigger_word else "the empty one"
        say(f"warning: {len(bare)} of {len(examples)} images have no caption and train on {instead} ({names})")
    return examples


def source_examples(args: argparse.Namespace, missing: list[str] | None = None) -> list[Example]:
    """All images of the folder or data set that the flags name, with the captions that they have."""
    folder = Path(args.dataset_name or args.train_data_dir or args.instance_data_dir)
    tables = (".arrow", ".parquet", "dataset_dict.json", "state.json", "dataset_infos.json")
    if args.dataset_name and not (folder.is_dir() and not any(f.name.endswith(tables) for f in folder.rglob("*"))):
        return dataset_examples(args)
    examples = folder_examples(folder, args.caption_column, missing, args.caption_per_line)
    if not examples:
        raise UserError(f"no images in {folder} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return with_masks(examples, folder, args.masked_loss)


def with_masks(examples: list[Example], folder: Path, where: str | None) -> list[Example]:
    """--masked_loss: the examples but those that are masks, each with its own: the alpha channel, the picture of the same
    name in another folder, or the one beside it whose name ends with "-…" or "_…".
    """
    if where is None:
        return examples
    ending, place = (where, folder) if where[0] in "-_" else ("", Path(where))
    if where == "alpha":
        masks = {e.name: e.read for e in examples}
    else:
        files = [
            f for f in place.resolve().rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.stem.endswith(ending)
        ]
        names = {f.relative_to(place.resolve()).with_suffix("").as_posix(): f for f in files}
        examples = [e for e in examples if Path(folder, e.name).resolve() not in set(files)]
        found = {e.name: names.get(Path(e.name).with_suffix("").as_posix() + ending) for e in examples}
        masks = {name: file.read_bytes for name, file in found.items() if file}
    for example in examples:
        example.read_mask = masks.get(example.name)
    if not masks:
        raise UserError(f"--masked_loss {where}: no mask for any of {len(examples)} images")
    if bare := [e.name for e in examples if e.name not in masks]:
        say(f"warning: {len(bare)} images have no mask, and count as a whole ({listed(bare)})")
    return examples


def folder_examples(folder: Path, caption_column: str | None, missing: list[str] | None = None, per_line: bool = False):
    """Images below a folder with captions from metadata files, or from a .txt or .caption beside each image.

    per_line: each line of a text file is a caption, else the whole is one. Where both are there and differ, the text file
    is taken, for it's what people edit; a named column wins over it. Files that the metadata name and that are not there
    are an error, or are noted in `missing`, if it's given. A picture that is a link is read wherever it leads; a folder
    that is one is not entered, which is said.
    """
    folder = folder.resolve()
    paths = [f for f in sorted(folder.rglob("*")) if "/." not in f"/{f.relative_to(folder).as_posix()}"]
    if lost := [printable(f.name) for f in paths if f.is_symlink() and not f.is_file()]:
        say(f"warning: {listed(lost)}: a link to a folder, which is not entered, or to nothing")
    files = [f for f in paths if f.is_file()]
    described: dict[Path, list[str]] = {}
    metas, again = [f for f in files if f.name in ("metadata.jsonl", "metadata.csv")], []
    for meta in metas:
        for line, row in read_metadata(meta):
            image = Path(os.path.normpath(meta.parent / row["file_name"].replace("\\", "/")))  # as Windows writes it
            if not image.is_relative_to(folder):
                raise UserError(f"{meta} line {line}: file_name {row['file_name']!r} leads out of the data folder")
            captions = caption_of_row(row, caption_column, f"{meta} line {line}")
            if os.path.isfile(image):  # which takes names that are too long, too
                if described.get(image, captions) != captions:
                    again.append(f"{meta.name} line {line}: {row['file_name']}")
                described[image] = captions
            elif missing is not None:
                missing.append(row["file_name"])
            else:
                raise UserError(f"{meta} line {line}: file_name {row['file_name']!r}: there is no such file")
    if again:
        say(f"warning: described before, with another caption; the later one is taken: {listed(again)}")
    if caption_column and not metas:
        raise UserError(f"--caption_column {caption_column} has no effect: {folder} has no metadata.jsonl or .csv")
    examples, strays, edited = [], Counter(), []
    for file in files:
        suffix = file.suffix.lower()
        if suffix not in IMAGE_SUFFIXES and file not in described:
            if suffix not in (".txt", ".caption", ".jsonl", ".csv", ".json", ".md", ".html"):
                strays[printable(file.suffix or file.name)] += 1
            continue
        name, captions = printable(file.relative_to(folder).as_posix()), described.get(file, [])
        if not captions or caption_column is None:
            beside = [b for b in (file.with_suffix(".txt"), file.with_suffix(".caption")) if b.is_file()][:1]
            texts = [decode_text(b.read_bytes(), b) for b in beside]
            written = [c for text in texts for c in as_captions(text.splitlines() if per_line else text)]
            if written and written[0] not in captions:
                edited += [name] if captions else []
                captions = written
        examples.append(Example(name, captions, file.read_bytes))
    if edited:
        say(f"{listed(edited)}: the text file and the metadata differ; the text file's caption is taken")
    if strays:
        say("not images, left alone: " + ", ".join(f"{n} x {what}" for what, n in strays.items()))
    return examples


def read_metadata(file: Path) -> list[tuple[int, dict]]:
    """(line, row) of a metadata.jsonl or metadata.csv; each row has a file_name that can be one. Errors: UserError."""
    rows, number, is_csv = [], 0, file.suffix == ".csv"
    stream = io.StringIO(decode_text(file.read_bytes(), file), newline=None)  # U+2028 ends no line of JSON
    csv.field_size_limit(2**31 - 1)  # its own limit is 131,072 characters
    try:
        for number, line in enumerate(reader := csv.DictReader(stream) if is_csv else stream, 1):
            number = reader.line_num if is_csv else number
            if is_csv or line.strip():
                rows.append((number, line if is_csv else json.loads(line)))
    except (ValueError, RecursionError, csv.Error) as error:
        kind, number = ("CSV", number + 1) if is_csv else ("JSON", number)
        raise UserError(f"{file} line {number}: not {kind}: {brief(error)}") from None
    for number, row in rows:
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name.strip() or "\0" in name or printable(name) != name:
            raise UserError(f"{file} line {number}: no file_name" + (f" can be {name!r}" if name else ""))
    return rows


def caption_of_row(row: dict, column: str | None, where: str) -> list[str]:
    """The captions in a row: of the given column, or of the one of text, caption, prompt that exists."""
    if column is not None and column not in row:
        raise UserError(f"--caption_column {column}: {where} has the columns {', '.join(map(str, row))}")
    value = row[column] if column else next((row[c] for c in CAPTION_COLUMNS if row.get(c)), None)
    if not all(isinstance(v, str | int | float | None) for v in (value if isinstance(value, list) else [value])):
        raise UserError(f"{where}: a caption is text, or a list of texts, and not {brief(value)}")
    return as_captions(value)


def as_captions(value: object) -> list[str]:
    """A caption or a list of captions, one of which is picked at random each time."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [c for c in (clean_caption(v) for v in values) if c]


def clean_caption(text: object) -> str:
    """One line without needless spaces; None becomes the empty caption."""
    return " ".join(unicodedata.normalize("NFC", printable(str(text))).split()) if text is not None else ""


def printable(text: str) -> str:
    """Text that any file and terminal takes: what is no character, as in a file name that isn't UTF-8, is spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def decode_text(raw: bytes, file: Path) -> str:
    """Text in UTF-8 or UTF-16 with a mark, else in Windows-1252, which is said; as far as it goes where it is cut."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        if len(raw) % 2:
            say(f"warning: {file} ends in the middle of a character")
        return raw[: len(raw) // 2 * 2].decode("utf-16", errors="replace")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        say(f"warning: {file} is not UTF-8; read as Windows-1252")
        return raw.decode("cp1252", errors="replace")


def dataset_examples(args: argparse.Namespace) -> list[Example]:
    """Images and captions of a `datasets` data set: from the hub, a local folder, or a Python builder."""
    import datasets

    datasets.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    name, split = args.dataset_name, args.dataset_split
    try:
        if name.endswith(".py"):
            table = builder_dataset(args)
        elif any((Path(name) / file).exists() for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(name)
            table = saved[split] if isinstance(saved, dict) else saved
        else:
            table = datasets.load_dataset(name, args.dataset_config_name, split=split, cache_dir=args.cache_dir)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"--dataset_name {name}: {brief(error)}") from None
    for flag in ("image_column", "caption_column"):
        if vars(args)[flag] not in (None, *table.column_names):
            columns = ", ".join(table.column_names)
            raise UserError(f"--{flag} {vars(args)[flag]}: the data set has the columns {columns}")
    column = args.caption_column or next((c for c in CAPTION_COLUMNS if c in table.column_names), None)
    table = table.cast_column(args.image_column, datasets.Image(decode=False))

    captions = map(as_captions, table[column] if column else [None] * len(table))
    reader = functools.partial(read_cell, table, args.image_column)  # a spawned worker can take it along
    examples = [Example(f"row {i}", own, functools.partial(reader, i)) for i, own in enumerate(captions)]
    if args.masked_loss not in (None, "alpha"):
        raise UserError(f"--masked_loss {args.masked_loss}: a data set's masks are its pictures' alpha channels: alpha")
    for example in examples if args.masked_loss else ():
        example.read_mask = example.read
    return examples


def read_cell(table, column: str, row: int) -> bytes:
    """The bytes of an image in a data set."""
    cell = table[row][column]
    return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()


def builder_dataset(args: argparse.Namespace):
    """The split of a data set whose builder class stands in a local Python file.

    The `datasets` package no longer runs such files, so the file that the user names is imported here.
    """
    import datasets

    path = Path(args.dataset_name)
    if not path.is_file():
        raise UserError(f"--dataset_name {path}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    builders = [c for c in own if issubclass(c, datasets.DatasetBuilder)]
    if len(builders) != 1:
        raise UserError(f"--dataset_name {path}: expected one datasets builder class, found {len(builders)}")
    data_dir = str(Path(args.train_data_dir).resolve()) if args.train_data_dir else None
    with tempfile.TemporaryDirectory() as work:
        builder = builders[0](cache_dir=work, config_name=args.dataset_config_name, data_dir=data_dir)
        builder.download_and_prepare()
        return builder.as_dataset(split=args.dataset_split, in_memory=True)


def hold_out(examples: list[Example], args: argparse.Namespace) -> None:
    """Marks the share of images that --validation_split keeps from training."""
    if not args.validation_split:
        return
    number = max(1, round(len(examples) * args.validation_split))
    if number >= len(examples):
        raise UserError(f"--validation_split {args.validation_split} leaves none of {len(examples)} images to train on")
    for i in random.Random(stable_seed(args.seed, "held-out")).sample(range(len(examples)), number):
        examples[i].held_out = True


def draw_caption(captions: list[str], rng: random.Random, args: argparse.Namespace) -> str:
    """One caption as it is trained: picked, tags shuffled, trigger word in front, or dropped."""
    caption = rng.choice(captions)
    if args.captions_vary:
        tags = caption.split(args.tag_separator)
        first = bool(args.trigger_word) and with_trigger(tags[0], args.trigger_word) == tags[0]  # it stays in front
        kept = max(args.keep_tokens, first)
        rest = [tag for tag in tags[kept:] if not args.tag_dropout or rng.random() >= args.tag_dropout]
        if args.shuffle_tags:
            rng.shuffle(rest)
        caption = args.tag_separator.join(tags[:kept] + rest)
    caption = with_trigger(caption, args.trigger_word)
    return "" if rng.random() < args.caption_dropout else caption


def with_trigger(caption: str, trigger: str | None) -> str:
    """The caption with the trigger word in front, unless it has it already."""
    if not trigger or f" {trigger.lower()} " in f" {''.join(c if c.isalnum() else ' ' for c in caption.lower())} ":
        return caption
    if trigger.lower() in caption.lower().replace(",", " ").split():
        return caption
    return f"{trigger}, {caption}" if caption else trigger


@dataclass
class Finding:
    """What is wrong with the data, and the way out. One that `hurts` costs the result something."""

    what: str
    advice: str
    hurts: bool = True


def found(what: str, names: list[str], total: int | None, advice: str, hurts: bool = True) -> list[Finding]:
    """[a finding with how many, of how many, and the first few names], or [] if there are none."""
    of = "" if total is None else f" of {total}"
    return [Finding(f"{what}: {len(names)}{of} ({listed(names)})", advice, hurts)] if names else []


def listed(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def report_findings(examples: list[Example], buckets: list[tuple[int, int]], tokenizers: dict, args) -> list[str]:
    """Says, and returns, what will hurt in the data, as far as it costs nothing to see; the doctor looks closer."""
    findings = examine(examples, buckets)
    if not args.instance_prompt and not args.default_caption:
        findings += unvaried_captions(examples)
    captions = [with_trigger(c, e.own.trigger_word) for e in examples for c in e.captions]
    findings += truncated_captions(captions, tokenizers, vars(args).get("max_token_length", 75))
    sizes = ["{} x {}".format(*size) for size in sorted((e.size for e in examples), key=math.prod)]
    say(f"{len(examples)} images from {sizes[0]} to {sizes[-1]} pixels")
    lines = [f"{finding.what}; {finding.advice}" for finding in findings]
    for line in lines:
        say(f"warning: {line}")
    if findings:
        say("prepare_dataset.py --doctor looks closer: copies, blur, lonely buckets")
    return lines


def examine(examples: list[Example], buckets: list[tuple[int, int]]) -> list[Finding]:
    """What will hurt in pictures that have been looked at: those that are enlarged, or lose much to the crop."""
    soft, narrow = [], []
    for e in examples:
        (width, height), bucket = e.size, buckets[e.bucket]
        scale, lost = max(bucket[0] / width, bucket[1] / height), lost_to_crop(e.size, bucket)
        soft += [f"{e.name}: {width} x {height}, {scale:.1f} times"] if scale > 1.25 else []
        narrow += [f"{e.name}: {lost:.0%}"] if lost > 0.25 else []
    advice = "the LoRA learns their blur; use larger ones or a lower resolution"
    findings = found("images enlarged to fill their bucket", soft, len(examples), advice)
    advice = "crop them by hand" if len(buckets) > 1 else "use --aspect_ratio_buckets auto"
    return findings + found("images that lose more than a quarter to the crop", narrow, len(examples), advice)


def unvaried_captions(examples: list[Example]) -> list[Finding]:
    """A finding if every image of several has the same caption."""
    captions = {tuple(e.captions) for e in examples}
    if len(examples) < 2 or len(captions) > 1 or not any(*captions):
        return []
    advice = "what else the pictures share is learned with it; say in each what differs, or give --instance_prompt"
    return [Finding(f"all captions are the same ({examples[0].captions[0][:60]!r})", advice)]


def truncated_captions(captions: list[str], tokenizers: dict, read: int = 75) -> list[Finding]:
    """Captions of more tokens than are read of CLIP's. tokenizers: {"clip_l": tokenizer, ...}, others are skipped."""
    findings = []
    for key, tokenizer in tokenizers.items():
        if key.startswith("clip"):
            limit, ids = read + 2, tokenizer(captions, truncation=False).input_ids
            long = [f"{len(i)} tokens: {c[:60]}…" for c, i in zip(captions, ids, strict=True) if len(i) > limit]
            what = f"captions longer than the {limit} tokens that {key} reads"
            findings += found(what, long, len(captions), "their ends are not seen; shorten them")
    return findings


# ---- images: decoding, buckets, crops, batches -----------------------------------------------------------------------

COVER_BUDGET = 2 << 30  # bytes of decoded images kept in memory


def decode_image(raw: bytes):
    """Bytes of an image file -> upright RGB image. Errors: ValueError with the reason in plain words."""
    try:
        return to_rgb(Image.open(io.BytesIO(raw)))
    except Image.DecompressionBombError:
        raise ValueError(f"more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
        text = str(error)
        raise ValueError("not an image" if "cannot identify" in text else f"damaged ({text})") from None


def to_rgb(image):
    """An upright sRGB image: EXIF rotation and colour profile applied, transparency laid on white, 16 bit brought to 8."""
    image = to_srgb(ImageOps.exif_transpose(image))
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_srgb(image):
    """An RGB or CMYK image with the colours that its profile means (phones: Display P3), in sRGB; others as they are."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one for another mode
        return image


def bucket_sizes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """The (width, height) that images are cropped to."""
    width, height = (args.resolution * 2)[:2]
    if args.aspect_ratio_buckets is None:
        return [(width, height)]
    from diffusers.training_utils import generate_aspect_ratio_buckets, parse_buckets_string

    if args.aspect_ratio_buckets == "auto":
        side = round(math.sqrt(width * height))
        pairs = generate_aspect_ratio_buckets(side, divisibility=max(16, PIXEL_DIVISOR))
    else:
        pairs = parse_buckets_string(args.aspect_ratio_buckets)
    return [(w, h) for h, w in pairs]


def nearest_bucket(size: tuple[int, int], buckets: list[tuple[int, int]]) -> int:
    """The bucket whose aspect ratio is nearest on a logarithmic scale; among equals, the one of the nearest area."""

    def distance(i: int) -> tuple[float, float]:
        across, down = (math.log(buckets[i][k] / size[k]) for k in (0, 1))
        return round(abs(across - down), 6), abs(across + down)

    return min(range(len(buckets)), key=distance)


def print_buckets(examples: list[Example], buckets: list[tuple[int, int]]) -> None:
    """Prints how many images each bucket has and how much of them is cropped away."""
    if len(buckets) == 1:
        return
    say("bucket (width x height)   images   mean share cropped away")
    for i, bucket in enumerate(buckets):
        shares = [lost_to_crop(e.size, bucket) for e in examples if e.bucket == i]
        if shares:
            say(f"{'{} x {}'.format(*bucket):>23}   {len(shares):6}   {sum(shares) / len(shares):.0%}")


def lost_to_crop(size: tuple[int, int], bucket: tuple[int, int]) -> float:
    """The share of a picture that is cropped away when it covers a bucket."""
    a, b = size[0] * bucket[1], size[1] * bucket[0]
    return 1 - min(a, b) / max(a, b)


def cover_size(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """The size at which a picture just covers a bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


def prepare_examples(examples: list[Example], buckets: list[tuple[int, int]], args: argparse.Namespace) -> ImageStore:
    """Decodes every image once: finds broken ones, sizes, buckets and content hashes. Returns the good ones.

    A broken image is left out with a line that names it; with none left, it's an error.
    """
    store = ImageStore(examples, buckets, args.image_interpolation_mode, COVER_BUDGET)

    def problem_of(index: int) -> str | None:
        try:
            image = look_at(examples[index], buckets)
        except (ValueError, OSError) as error:
            return str(error)
        if not store.is_long(index, examples[index].bucket):
            store.cover(index, examples[index].bucket, image)
        return None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, waiting("images", len(examples)) as bar:
        problems = [(problem, bar.update())[0] for problem in pool.map(problem_of, range(len(examples)))]
    for example, problem in zip(examples, problems, strict=True):
        if problem is not None:
            say(f"warning: {example.name} is left out: {problem}")
    store.examples = [e for e, problem in zip(examples, problems, strict=True) if problem is None]
    if not store.examples:
        raise UserError("none of the images can be read; see the lines above")
    return store


def look_at(example: Example, buckets: list[tuple[int, int]]):
    """Decodes an image and notes its hash, size and bucket. Errors: ValueError or OSError with the reason."""
    raw = example.read()
    image = decode_image(raw)
    example.digest, example.size = hashlib.sha256(raw).hexdigest(), image.size
    places = example.places or range(len(buckets))
    example.bucket = places[nearest_bucket(image.size, [buckets[place] for place in places])]
    return image


class ImageStore:
    """Decoded images scaled to cover a bucket, as uint8 arrays; as many as fit into the budget stay in memory.

    Of a picture so long that its cover were over 16 times the bucket (1 x 4000 pixels: 3 GB) only a window is scaled.
    """

    def __init__(self, examples: list[Example], buckets: list[tuple], interpolation: str, budget: int) -> None:
        self.examples, self.buckets = examples, buckets
        self.resample = getattr(Image.Resampling, interpolation.upper())
        self.left, self.kept = budget, {}  # bytes; by name and bucket

    def __getstate__(self) -> dict:  # a spawned worker decodes anew: all pixels would be too much to send
        return vars(self) | {"left": 0, "kept": {}}

    def is_long(self, index: int, bucket: int) -> bool:
        """Whether only a window of the image is scaled."""
        size, target = self.examples[index].size, self.buckets[bucket]
        return math.prod(cover_size(size, target)) > 16 * math.prod(target)

    def window(self, index: int, bucket: int, crop: Crop) -> tuple[object, Crop]:
        """(what surrounds a crop, half the bucket on each side as turned pictures need it; the crop's place in it)."""
        if not self.is_long(index, bucket):
            return self.cover(index, bucket), crop
        image, target = self.decoded(index), self.buckets[bucket]
        cover, begin = cover_size(image.size, target), (crop.left, crop.top)
        spans = [(max(0, b - t // 2), min(c, b + t + t // 2)) for b, t, c in zip(begin, target, cover, strict=True)]
        (left, right), (top, bottom) = spans
        box = [side / c * s for side, c, s in zip((left, top, right, bottom), cover * 2, image.size * 2, strict=True)]
        part = image.resize((right - left, bottom - top), self.resample, box)
        return part, Crop(crop.left - left, crop.top - top, crop.flip)

    def decoded(self, index: int):
        """Image `index` in its own size. Errors: UserError if it's no longer there, or has changed to what is none."""
        try:
            return decode_image(self.examples[index].read())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.examples[index].name} could be read when the run began, and can't now: {error}"
            ) from None

    def cover(self, index: int, bucket: int, image=None):
        """Image `index` scaled so that it just covers `bucket`, as an RGB image."""
        example = self.examples[index]
        if (example.name, bucket) in self.kept:
            return Image.fromarray(self.kept[example.name, bucket])
        image = image or self.decoded(index)
        size = cover_size(image.size, self.buckets[bucket])
        image = image if image.size == size else image.resize(size, self.resample)
        array = np.asarray(image)
        if array.nbytes <= self.left:
            self.left -= array.nbytes
            self.kept[example.name, bucket] = array
        return image


class MaskStore(ImageStore):
    """The masks of an ImageStore's images, (H, W) from 0, hardly trained, to 255; scaled and cropped as the images are."""

    def decoded(self, index: int):
        """A mask in its image's size. Errors: UserError if it can't be read, or is of another shape."""
        example = self.examples[index]
        if example.read_mask is None:
            return Image.new("L", example.size, 255)
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(example.read_mask())))
            own = example.read_mask == example.read
            mask = image.convert("RGBA").getchannel("A") if own else image.convert("L")
        except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
            raise UserError(f"--masked_loss: the mask of {example.name} can't be read: {brief(error)}") from None
        if abs(mask.width / mask.height * example.size[1] / example.size[0] - 1) > 0.02:
            raise UserError(f"--masked_loss: the mask of {example.name} has another shape: {mask.size}, {example.size}")
        if not mask.getbbox():
            raise UserError(f"--masked_loss: the mask of {example.name} is black (or the picture clear) all over")
        return mask.resize(example.size)


@dataclass(frozen=True)
class Slot:
    """One place in a batch: which image, in which repeat of which epoch, with which weight in the loss."""

    index: int
    bucket: int
    epoch: int
    repeat: int
    weight: float
    is_class: bool = False


class BatchPlan:
    """Which images stand in which batch: a pure function of seed and position, the same on every process.

    A global batch holds images of one bucket, batch size x processes of them or what is left of the bucket, so no
    image is dropped. Loss weights sum to 1 over a global batch (class images: to the prior loss weight), so gradients
    are summed over processes. Missing places are filled with copies of weight 0: up to a multiple of the processes, or
    up to the full batch where shapes must be fixed. Repeats beyond `at_once` images are shuffled in rounds.
    """

    at_once = 65536

    def __init__(self, examples: list[Example], args: argparse.Namespace, processes: int, class_images: int) -> None:
        self.buckets = {i: e.bucket for i, e in enumerate(examples) if not e.held_out}
        self.sets = {i: examples[i].own or args for i in self.buckets}
        self.seed, self.processes, most = args.seed, processes, max(own.repeats for own in self.sets.values())
        self.size, self.fixed_shapes = args.train_batch_size * processes, args.compile or args.cuda_graphs
        self.class_images, self.prior_loss_weight = class_images, args.prior_loss_weight
        self.round, self.starts = max(1, min(most, self.at_once // len(self.buckets))), [0]  # starts: of each round
        for part in range(-(-most // self.round)):
            counts = Counter()
            for i, bucket in self.buckets.items():
                counts[bucket] += len(self.shown(i, part))
            self.starts.append(self.starts[-1] + sum(-(-n // self.size) for n in counts.values()))
        self.per_epoch = self.starts[-1]
        self.cached: tuple[tuple, list[list[Slot]]] = ((), [])

    def shown(self, index: int, part: int) -> range:
        """The repeats of an image in round `part`."""
        return range(part * self.round, min((part + 1) * self.round, self.sets[index].repeats))

    def epoch(self, epoch: int, part: int = 0) -> list[list[Slot]]:
        """The global batches of an epoch, in order; of its round `part`, if its repeats are many thousands."""
        if self.cached[0] == (epoch, part):
            return self.cached[1]
        rng = random.Random(stable_seed(self.seed, "order", epoch, *([part] if part else [])))
        order = [(i, r) for i in self.buckets for r in self.shown(i, part)]
        rng.shuffle(order)
        full, waiting = [], {}
        for index, repeat in order:
            group = waiting.setdefault(self.buckets[index], [])
            group.append((index, repeat))
            if len(group) == self.size:
                full.append(waiting.pop(self.buckets[index]))
        groups = full + list(waiting.values())
        rng.shuffle(groups)
        weights = {i: own.weight for i, own in self.sets.items()}
        batches = [[Slot(i, self.buckets[i], epoch, r, weights[i] / len(group)) for i, r in group] for group in groups]
        if self.class_images:
            rounds, numbers = -(-len(order) // self.class_images), range(self.class_images)
            classes = [i for _ in range(rounds) for i in rng.sample(numbers, len(numbers))]
            shown = part * (self.round * len(self.buckets) + self.class_images)  # before this round, at most
            for batch in batches:
                weight = self.prior_loss_weight / len(batch)
                for _ in range(len(batch)):
                    batch.append(Slot(classes.pop(), batch[0].bucket, epoch, shown + len(classes), weight, True))
        self.cached = ((epoch, part), batches)
        return batches

    def share(self, number: int, process: int) -> list[Slot]:
        """What `process` computes of the global batch `number`, counted over all epochs; instance images first."""
        epoch, place = divmod(number, self.per_epoch)
        part = bisect.bisect_right(self.starts, place) - 1
        batch = self.epoch(epoch, part)[place - self.starts[part]]
        out = []
        for kind in (False, True):
            slots = [s for s in batch if s.is_class == kind]
            if not slots:
                continue
            each = -(-(self.size if self.fixed_shapes else len(slots)) // self.processes)
            spare = [slots[k % len(slots)] for k in range(each * self.processes - len(slots))]
            filler = [Slot(s.index, s.bucket, s.epoch, s.repeat, 0.0, kind) for s in spare]
            out += (slots + filler)[process * each : (process + 1) * each]
        return out


@dataclass
class Crop:
    """How an image covers its bucket: offsets in the scaled image, and whether it is mirrored."""

    left: int
    top: int
    flip: bool


def draw_crop(cover: tuple[int, int], target: tuple[int, int], rng: random.Random, args: argparse.Namespace) -> Crop:
    """Where an image of size `cover` is cropped (anywhere, or in the middle) and whether it is mirrored."""
    u, v, flip = rng.random(), rng.random(), args.random_flip and rng.random() < 0.5
    if args.center_crop:
        u = v = 0.5
    return Crop(round((cover[0] - target[0]) * u), round((cover[1] - target[1]) * v), flip)


def cropped(cover, target: tuple[int, int], crop: Crop, rng: random.Random, args: argparse.Namespace):
    """The bucket's view of a covering image, with the augmentations that are on; a mask's has no colours to change."""
    width, height = target
    turned = args.random_rotation and rng.random() < args.random_rotation_prob
    if turned:
        angle = math.radians(rng.uniform(-args.random_rotation, args.random_rotation))
        zoom = abs(math.cos(angle)) + max(width / height, height / width) * abs(math.sin(angle))  # no empty corners
        a, b = math.cos(angle) / zoom, math.sin(angle) / zoom
        cx, cy = crop.left + width / 2, crop.top + height / 2
        matrix = (a, -b, cx - a * width / 2 + b * height / 2, b, a, cy - b * width / 2 - a * height / 2)
        image = cover.transform(target, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    else:
        image = cover.crop((crop.left, crop.top, crop.left + width, crop.top + height))
    if crop.flip:
        image = ImageOps.mirror(image)
    if args.color_jitter is not None and image.mode == "RGB":
        brightness, contrast, saturation, hue = args.color_jitter
        for kind, strength in (("Brightness", brightness), ("Contrast", contrast), ("Color", saturation)):
            factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
            image = getattr(ImageEnhance, kind)(image).enhance(factor)
        if hue:
            hsv = np.array(image.convert("HSV"))
            hsv[..., 0] += np.uint8(round(rng.uniform(-hue, hue) * 255) % 256)
            image = Image.fromarray(hsv, "HSV").convert("RGB")
    return image


def to_pixels(image):
    """RGB image -> tensor (3, H, W), uint8: a fourth of what it is in float32 on its way to the device."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class TrainingData:
    """Turns a `Slot` into tensors. Everything random in it is drawn from (seed, epoch, image, repeat)."""

    def __init__(self, store: ImageStore, class_store: ImageStore | None, args, vae_config: dict, scheduler) -> None:
        self.stores = (store, class_store)  # by Slot.is_class
        masked = any(example.read_mask for example in store.examples)
        self.masks = MaskStore(store.examples, store.buckets, "bilinear", COVER_BUDGET) if masked else None
        self.examples, self.buckets, self.args = store.examples, store.buckets, args
        self.class_examples = class_store.examples if class_store else []
        self.vae_config, self.scheduler = vae_config, scheduler
        # by (is_class, index, bucket, flip): (2C, H, W) and (1, H, W), if cached
        self.moments: dict[tuple, object] = {}
        self.kept_masks: dict[tuple, object] = {}

    def crop_of(self, slot: Slot, rng: random.Random) -> Crop:
        """The slot's crop. With cached latents only the flip is drawn anew."""
        example, target = self.stores[slot.is_class].examples[slot.index], self.buckets[slot.bucket]
        size = cover_size(example.size, target)
        crop = draw_crop(size, target, rng, self.args)
        if self.args.cache_latents:
            fixed = random.Random(stable_seed(self.args.seed, "crop", slot.is_class, example.name))
            still = draw_crop(size, target, fixed, self.args)
            crop = Crop(still.left, still.top, crop.flip)
        return crop

    def view(self, slot: Slot, crop: Crop, rng: random.Random):
        """The slot's pixels (3, H, W), uint8."""
        around, crop = self.stores[slot.is_class].window(slot.index, slot.bucket, crop)
        return to_pixels(cropped(around, self.buckets[slot.bucket], crop, rng, self.args))

    def mask(self, slot: Slot, crop: Crop, rng: random.Random):
        """The weights of the slot's latents in the loss, (1, h, w), with mean 1. rng: as it was for the picture."""
        target = self.buckets[slot.bucket]
        _, height, width = latent_shape(target, self.vae_config)
        if slot.is_class:
            return torch.ones(1, height, width)
        around, crop = self.masks.window(slot.index, slot.bucket, crop)
        small = cropped(around, target, crop, rng, self.args).resize((width, height), Image.Resampling.BOX)
        shares = torch.from_numpy(np.array(small))[None].float() / 255
        low = self.examples[slot.index].own.unmasked_weight
        weights = (low + (1 - low) * shares).clamp_(min=1e-3)  # a crop beside the mask: all of it counts
        return weights / weights.mean()

    def __getitem__(self, slot: Slot) -> dict:
        example, target = self.stores[slot.is_class].examples[slot.index], self.buckets[slot.bucket]
        place = (self.args.seed, slot.epoch, slot.is_class, example.name, slot.repeat)
        rng = random.Random(stable_seed("image", *place))
        crop = self.crop_of(slot, rng)
        left = cover_size(example.size, target)[0] - target[0] - crop.left if crop.flip else crop.left
        item = {
            "weight": torch.tensor(slot.weight),
            "original_size": torch.tensor((example.size[1], example.size[0])),
            "crop_top_left": torch.tensor((crop.top, left)),  # in the picture as it is seen, mirrored or not
            "target_size": torch.tensor((target[1], target[0])),
        }
        key = (slot.is_class, slot.index, slot.bucket, crop.flip)
        if self.masks:
            twin = random.Random()
            twin.setstate(rng.getstate())  # so that a mask is turned as its picture is
            item["mask"] = self.kept_masks[key] if key in self.kept_masks else self.mask(slot, crop, twin)
        if key in self.moments:
            item["moments"] = self.moments[key]
        else:
            item["pixels"] = self.view(slot, crop, rng)
        text_rng, own = random.Random(stable_seed("caption", *place)), example.own or self.args
        captions = example.captions
        item["caption"] = text_rng.choice(captions) if slot.is_class else draw_caption(captions, text_rng, own)
        generator = torch.Generator().manual_seed(stable_seed("noise", *place))
        shape = latent_shape(target, self.vae_config)
        item["posterior_noise"] = torch.randn(shape, generator=generator)
        return item | draw_noise(generator, shape, self.scheduler, self.args)


def collate(items: list[dict]) -> dict:
    """Items of one bucket -> batch: tensors stacked along a first dimension, captions as a list."""
    batch = {key: torch.stack([i[key] for i in items]) for key in items[0] if key != "caption"}
    return batch | {"captions": [i["caption"] for i in items]}


def latent_shape(size: tuple[int, int], vae_config: dict) -> tuple[int, int, int]:
    """(width, height) in pixels -> (channels, height, width) of the latents."""
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    return vae_config["latent_channels"], size[1] // factor, size[0] // factor


def encode_image(pixels, vae):
    """Pixels (B, 3, H, W), uint8 -> moments (B, 2C, h, w): mean and standard deviation of the latents."""
    with torch.no_grad(), reading_base("the vae"):
        distribution = vae.encode((pixels.to(vae.device).float() / 127.5 - 1).to(vae.dtype)).latent_dist
    return torch.cat([distribution.mean, distribution.std], dim=1).float()


def cache_latents(data: TrainingData, plan: BatchPlan, components: Components, args: argparse.Namespace) -> None:
    """Encodes what the plan can ask for: every image in its bucket, mirrored too with --random_flip; class images in
    every bucket in use. The VAE is loaded only if something is missing, and freed afterwards.
    """
    disk = DiskCache(args.cache_folder, "latents")
    identity = (FAMILY, components.identity("vae"), components.dtype, VAE_FLOAT32, args.image_interpolation_mode)
    stores = [store for store in data.stores if store]
    slots = [Slot(i, e.bucket, 0, 0, 1.0) for i, e in enumerate(data.examples)]
    for store in stores[1:]:
        used = sorted(set(plan.buckets.values()))
        slots += [Slot(i, b, 0, 0, 1.0, True) for i in range(len(store.examples)) for b in used]

    def moments(place: tuple[int, bool]):
        slot, flip = slots[place[0]], place[1]
        example, crop = stores[slot.is_class].examples[slot.index], data.crop_of(slot, random.Random(0))
        crop.flip = flip
        key = (*identity, example.digest, data.buckets[slot.bucket], crop.left, crop.top, flip)
        found = disk.load(*key)
        if found is None:
            pixels = data.view(slot, crop, random.Random(0))
            found = {"moments": encode_image(pixels[None], components.vae())[0].cpu()}
            if not torch.isfinite(found["moments"]).all():
                advice = "use --mixed_precision bf16, or another --pretrained_vae_model_name_or_path"
                raise UserError(f"{example.name}: the VAE's values aren't finite in {components.dtype}; {advice}")
            disk.store(found, *key)
        return found["moments"]

    flips = (False, True)[: 1 + args.random_flip]
    places = [(number, flip) for number in range(len(slots)) for flip in flips]
    for (number, flip), found in divided("latents", places, lambda share: map(moments, share)).items():
        data.moments[slots[number].is_class, slots[number].index, slots[number].bucket, flip] = found
        if data.masks:
            slot, crop = slots[number], data.crop_of(slots[number], random.Random(0))
            crop.flip = flip
            data.kept_masks[slot.is_class, slot.index, slot.bucket, flip] = data.mask(slot, crop, random.Random(0))
    components.free("vae")
    for store in (*stores, data.masks) if data.masks else stores:
        store.kept.clear()


def divided(what: str, places: list, compute) -> dict:
    """{place: what `compute`, given a list of places, has for it}; each is computed by one process, and given to all."""
    many = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if many else (0, 1)
    out = {}
    with waiting(what, len(places)) as bar:
        for begin in range(0, len(places), 16 * world):
            share = places[begin + rank : begin + 16 * world : world]
            everyone = [dict(zip(share, compute(share), strict=True))] * world
            if many:
                torch.distributed.all_gather_object(everyone, everyone[rank])
            out.update(pair for found in everyone for pair in found.items())
            bar.update(min(16 * world, len(places) - begin))
    return out


class DiskCache:
    """safetensors files in a folder, named by a hash of what they were computed from; without a folder, nothing.

    Each has a hash of its key and its tensors in its metadata: one that is damaged, or another's, is computed anew.
    """

    def __init__(self, folder: str | None, kind: str) -> None:
        self.folder, self.damaged, self.full = Path(folder) / kind if folder else None, 0, False

    def load(self, *place: object) -> dict | None:
        """The tensors stored under this key, or None; a damaged file counts as missing."""
        if self.folder is None or not (file := self.file(place)).is_file():
            return None
        try:
            tensors, metadata = read_safetensors(file)
            if metadata.get("sha256") == tensors_hash(tensors, place):
                return tensors
        except Exception:  # safetensors has no public base class for damage
            pass
        self.damaged += 1
        if self.damaged <= 3:
            more = "; further ones are not named" if self.damaged == 3 else ""
            say(f"warning: cache file {file.name} is damaged and made anew{more}")
        return None

    def store(self, tensors: dict, *place: object) -> None:
        """Writes tensors under this key, so that a reader never sees half a file; what can't be written is done without."""
        if self.folder is None or self.full:
            return
        tensors = {k: v.contiguous().cpu() for k, v in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with written(self.file(place)) as part:
                save_file(tensors, part, metadata={"sha256": tensors_hash(tensors, place)})
        except (OSError, SafetensorError) as error:
            self.full = True
            say(f"warning: {self.folder} can't be written to ({brief(error)}): the rest is kept in memory alone")

    def file(self, place: tuple) -> Path:
        return self.folder / (hashlib.sha256("|".join(map(str, place)).encode()).hexdigest() + ".safetensors")


def tensors_hash(tensors: dict, place: tuple) -> str:
    """SHA-256 of tensors, their names, types and shapes, and of the key that they belong to."""
    digest = hashlib.sha256("|".join(map(str, place)).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"|{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- text: embeddings and new tokens ---------------------------------------------------------------------------------


UNSKIPPED = "\0"  # before a negative prompt, for which pipelines skip no layers


class Prompts:
    """Text embeddings by prompt. What an encoder that isn't trained gives is computed once, alone, and kept in memory and
    on disk, also while another encoder is trained: pivotal tuning of CLIP doesn't run, or hold, T5.

    Encoders are loaded when a prompt has to be encoded, and freed by `release()`.
    """

    def __init__(self, args: argparse.Namespace, components: Components) -> None:
        self.args, self.components = args, components
        self.known: dict[tuple[str, str], dict] = {}  # by encoder key and prompt
        self.disk = DiskCache(args.cache_folder, "text")
        names = {key: tokenizer for key, (tokenizer, _) in TEXT_ENCODERS.items() if components.has(tokenizer)}
        self.tokenizers = {key: components.get(name) for key, name in names.items()}
        self.unskipped = UNSKIPPED if vars(args).get("clip_skip") else ""
        self.trained: set[str] = set()  # keys of the encoders whose embeddings change from step to step
        self.altered: set[str] = set()  # keys of those that are no longer the base's: not for the disk
        self.streamed: set[str] = set()  # keys of those whose weights come to the device anew for each group of prompts
        on_disk = self.tokenizers if self.disk.folder else ()
        self.identity = {key: [components.identity(part) for part in TEXT_ENCODERS[key]] for key in on_disk}

    def text_encoder(self, key: str):
        """One encoder, loaded; where it isn't trained and the GPU's free memory doesn't hold it, its blocks are swapped."""
        name = TEXT_ENCODERS[key][1]
        if name not in self.components.loaded:
            if key in self.altered:
                raise RuntimeError(f"{key} was freed with what it had learned, and is asked for another prompt")
            encoder = self.components.get(name, device="cpu")
            if self.components.device.type == "cuda":
                needed = sum(p.numel() * p.element_size() for p in encoder.parameters())
                if key not in self.trained and torch.cuda.mem_get_info()[0] < 1.1 * needed:
                    say(f"note: {key} ({needed / 2**30:.1f} GiB) doesn't fit on the GPU: its blocks come in one by one")
                    swap_blocks(encoder, None, self.components.device)
                    self.streamed.add(key)
            encoder.to(self.components.device)
        return self.components.loaded[name]

    def key(self, key: str, prompt: str) -> tuple:
        """What an embedding depends on."""
        settings = [vars(self.args).get(name) for name in ("clip_skip", "max_sequence_length", "max_token_length")]
        return (FAMILY, key, prompt, *self.identity[key], self.components.dtype, *settings)

    def compute(self, key: str, prompts: list[str]) -> dict:
        """What one encoder gives for prompts, computed now; differentiable in whatever is trained."""
        args = self.args
        if prompts[0].startswith(UNSKIPPED):
            prompts, args = [p[1:] for p in prompts], argparse.Namespace(**vars(args) | {"clip_skip": None})
        return encode_prompts(key, prompts, self.tokenizers[key], self.text_encoder(key), args)

    def kept(self, key: str, prompts: list[str]) -> list[dict]:
        """What one encoder gives for each prompt: from memory, from disk, or computed; no gradient.

        Each is computed alone, so that it depends on no other; with a streamed encoder, all that are missing together.
        """
        on_disk = self.disk.folder is not None and key not in self.altered
        asked = dict.fromkeys(p for p in prompts if (key, p) not in self.known)
        found = {p: self.disk.load(*self.key(key, p)) if on_disk else None for p in asked}
        if missing := [p for p in found if found[p] is None]:
            self.text_encoder(key)  # whether it is streamed shows now
        kinds = [[p for p in missing if p.startswith(UNSKIPPED) == kind] for kind in (False, True)]
        for group in filter(None, kinds) if key in self.streamed else [[p] for p in missing]:
            with torch.no_grad():
                rows = {k: v.split(1) for k, v in self.compute(key, group).items()}
            for number, prompt in enumerate(group):
                found[prompt] = {k: v[number] for k, v in rows.items()}
                if on_disk:
                    self.disk.store(found[prompt], *self.key(key, prompt))
        if self.args.captions_vary:  # hardly a caption would come twice
            return [found.get(prompt) or self.known[key, prompt] for prompt in prompts]
        self.remember(key, found)
        return [self.known[key, prompt] for prompt in prompts]

    def remember(self, key: str, found: dict[str, dict]) -> None:
        """Keeps what one encoder gives for prompts: on the CPU, for FLUX.1 has 4 MiB for each."""
        self.known |= {(key, p): {k: pinned(v.cpu()) for k, v in rows.items()} for p, rows in found.items()}

    def lookup(self, prompts: list[str], live: set[str] | tuple = ()) -> dict:
        """Prompts -> embeddings (B, ...), each computed once; no gradient but through the `live` encoders, computed now."""
        encoded = {}
        for key in self.tokenizers:
            if key in live:
                encoded[key] = self.compute(key, prompts)
            else:
                rows = [to_device(row, self.components.device) for row in self.kept(key, prompts)]
                encoded[key] = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
        return join_embeds(encoded, self.args, self.components.config(DENOISER))

    def for_pipeline(self, prompt: str, negative: str = "") -> dict:
        """The embeddings that a pipeline takes for one prompt, and for the one that guidance leads away from."""
        return self.lookup([prompt]) | negative_embeds(self.lookup([self.unskipped + negative]), self.components)

    def forget(self) -> None:
        """Drops embeddings that a training step has made untrue."""
        self.known = {place: value for place, value in self.known.items() if place[0] not in self.trained}

    def release(self, *keys: str) -> None:
        """Frees encoders: these, or all of them."""
        self.streamed -= set(keys or self.tokenizers)
        self.components.free(*(TEXT_ENCODERS[key][1] for key in keys or self.tokenizers))


def chunk_ids(tokenizer, prompts: list[str], chunks: int):
    """Prompts -> ids (B * chunks, 77): up to 75 tokens each between start and end, as kohya's scripts and the WebUIs cut them."""
    size, out = tokenizer.model_max_length - 2, []
    for ids in tokenizer(prompts, add_special_tokens=False, truncation=False).input_ids:
        for piece in (ids[k * size : (k + 1) * size] for k in range(chunks)):
            padding = [tokenizer.pad_token_id] * (size - len(piece))
            out.append([tokenizer.bos_token_id, *piece, tokenizer.eos_token_id, *padding])
    return torch.tensor(out)


def join_chunks(hidden, chunks: int):
    """(B * chunks, 77, D) -> (B, 75 * chunks + 2, D): the first chunk's start, all tokens, the last chunk's end."""
    hidden = hidden.unflatten(0, (-1, chunks))
    return torch.cat([hidden[:, 0, :1], hidden[:, :, 1:-1].flatten(1, 2), hidden[:, -1, -1:]], dim=1)


def fill_text_cache(run: Run) -> None:
    """Encodes every prompt that can come up with the encoders that aren't trained, and frees these."""
    args, prompts = run.args, run.prompts
    if args.captions_vary:
        if args.offload:
            say("note: the text encoders stay on the GPU: shuffled or dropped tags make new captions all the time")
        return
    captions = [with_trigger(c, e.own.trigger_word) for e in run.data.examples for c in e.captions]
    captions += [class_caption(c, run) for c in captions] if args.preserve_class else []
    captions += [c for e in run.data.class_examples for c in e.captions]
    captions = [insert_tokens(c, run.abstractions) for c in captions]
    for key in prompts.tokenizers:
        if key not in prompts.trained:
            negatives = [prompts.unskipped + own.get("negative_prompt", "") for own in (*args.prompt_settings, {})]
            wanted = list(dict.fromkeys([*captions, *run.sample_prompts, *run.control_prompts, *negatives, ""]))
            prompts.remember(key, divided(f"captions for {key}", wanted, functools.partial(prompts.kept, key)))
            prompts.release(key)


def settle_text(run: Run) -> None:
    """After the pivot: embeddings no longer change, so all are computed once more, and encoders without LoRA freed."""
    run.prompts.forget()
    run.prompts.trained.clear()
    for name, module in run.lora_modules.items():
        if name != DENOISER:
            module.eval()  # no dropout in embeddings that stay
    if not run.args.train_text_encoder:
        fill_text_cache(run)


def add_text_lora(run: Run) -> None:
    """Adds a LoRA to the text encoders that --train_text_encoder trains."""
    args, prompts = run.args, run.prompts
    prompts.trained |= set(TEXT_LORA_ENCODERS)
    for key in TEXT_LORA_ENCODERS:
        encoder = prompts.text_encoder(key)
        idle = idle_layers(key, encoder.config, args)
        names = [n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)]
        names = [n for n in names if n.endswith(TEXT_LORA_TARGETS)]
        targets = [n for n in names if not n.removeprefix("text_model.").startswith(idle)]
        add_lora(encoder, targets, args, run.start.get(TEXT_ENCODERS[key][1]))
        prompts.altered.add(key)
        run.lora_modules[TEXT_ENCODERS[key][1]] = encoder
        encoder.train()
        if args.gradient_checkpointing:
            encoder.gradient_checkpointing_enable()


def abstraction_tokens(args: argparse.Namespace, tokenizer) -> dict[str, list[str]]:
    """{word in prompts: its new tokens}, numbered through: {"TOK": ["<s0>", "<s1>"]}."""
    if not args.train_text_encoder_ti:
        return {}
    each = args.num_new_tokens_per_abstraction
    if args.initializer_concept:
        each = len(TokenRows.concept_ids(tokenizer, args.initializer_concept))
        if not each:
            raise UserError(f"--initializer_concept {args.initializer_concept!r}: the tokenizer finds no token in it")
    words = [w.strip() for w in args.token_abstraction.split(",") if w.strip()]
    if not words:
        raise UserError("--token_abstraction is empty")
    return {word: [f"<s{i * each + k}>" for k in range(each)] for i, word in enumerate(words)}


def class_caption(caption: str, run: Run) -> str:
    """The caption with trigger word and new tokens replaced by --preserve_class, its class: "a sks dog" -> "a dog"."""
    name = run.args.preserve_class
    for word in (*run.args.triggers, *run.abstractions):
        caption = caption.replace(f"{word} {name}", name).replace(word, name)
    return caption


def insert_tokens(text: str, abstractions: dict[str, list[str]]) -> str:
    """The text with each abstraction replaced by its tokens: "a TOK" -> "a <s0><s1>"."""
    words = "|".join(re.escape(word) for word in sorted(abstractions, key=len, reverse=True))
    return re.sub(words, lambda found: "".join(abstractions[found[0]]), text) if words else text


def add_tokens(run: Run) -> None:
    """Adds the new tokens' rows to the tables of the encoders that learn them."""
    args, prompts = run.args, run.prompts
    texts = [c for e in run.data.examples for c in e.captions] + args.triggers
    if not any(word in text for text in texts for word in run.abstractions):
        raise UserError(f"--token_abstraction {args.token_abstraction}: no caption contains it to learn from")
    keys = [k for k in prompts.tokenizers if k in TI_ENCODERS or (vars(args).get("enable_t5_ti") and k == "t5")]
    tokens = [t for group in run.abstractions.values() for t in group]
    prompts.trained |= set(keys)
    prompts.known.clear()  # a new token may stand for a word that a prompt already had
    for key in keys:
        tokenizer = prompts.tokenizers[key]
        if args.initializer_concept:
            width = len(TokenRows.concept_ids(tokenizer, args.initializer_concept))
            each = len(tokens) // len(run.abstractions)
            if width != each:  # another tokenizer splits the text otherwise: take as many of its pieces as fit
                what = f"splits {args.initializer_concept!r} into {width} tokens, not {each}"
                say(f"note: {key} {what}: cut or repeated to fit")
        place = tokenizer, prompts.text_encoder(key), tokens
        run.rows[key] = TokenRows(*place, args.initializer_concept, args.seed, run.start.get("embeddings", {}).get(key))
        prompts.altered.add(key)


class TokenRows:
    """New tokens of one text encoder: their embeddings are the only rows of the table that are trained.

    The rows are a float32 parameter (n, D) of their own. A hook on the embedding layer puts them where their ids stand, so
    the table itself, and with it every other token, can't change.
    """

    def __init__(self, tokenizer, text_encoder, tokens: list[str], concept: str | None, seed: int, start=None) -> None:
        """concept, start: what the rows are at first, a text's embeddings or a table (n, D); without both they are drawn."""
        self.tokens = tokens
        if tokenizer.add_tokens(tokens) != len(tokens):
            raise UserError(f"--train_text_encoder_ti: the base's tokenizer already has one of {tokens}")
        self.first = tokenizer.convert_tokens_to_ids(tokens[0])
        if len(tokenizer) > text_encoder.get_input_embeddings().num_embeddings:
            text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            text_encoder.requires_grad_(False)
        table = text_encoder.get_input_embeddings().weight.detach().float().cpu()[: self.first]
        if start is not None:
            if start.shape != (len(tokens), table.shape[1]):
                raise UserError(
                    f"--init_lora: {tuple(start.shape)} embeddings for {len(tokens)} tokens of {table.shape[1]}"
                )
            rows = start.float()
        elif concept:
            ids = self.concept_ids(tokenizer, concept)
            rows = table[ids].repeat(len(tokens) // len(ids), 1)
        else:
            generator = torch.Generator().manual_seed(stable_seed(seed, "tokens", len(table)) % 2**63)
            rows = torch.randn(len(tokens), table.shape[1], generator=generator) * table.std()
        self.initial = rows.clone()
        self.weight = torch.nn.Parameter(rows.to(text_encoder.device))
        table = text_encoder.get_input_embeddings().weight
        for module in text_encoder.modules():  # T5 has its table in two layers, and calls the other one
            if isinstance(module, torch.nn.Embedding) and module.weight is table:
                module.register_forward_hook(self.replace)

    @staticmethod
    def concept_ids(tokenizer, concept: str) -> list[int]:
        """The token ids of --initializer_concept, without start and end."""
        return tokenizer(concept, add_special_tokens=False).input_ids

    def replace(self, module, inputs, output):
        """Embeddings (B, L, D) with the trained rows in the places of the new tokens."""
        place = inputs[0] - self.first
        inside = (place >= 0) & (place < len(self.tokens))
        rows = F.embedding(place.clamp(0, len(self.tokens) - 1), self.weight).to(output.dtype)
        return torch.where(inside[..., None], rows, output)


# ---- LoRA and optimizer ----------------------------------------------------------------------------------------------


def add_trained_parts(run: Run) -> None:
    """Loads the denoiser, adds its LoRA, and makes the parts that are trained, each with its share of the steps."""
    args, steps = run.args, run.max_steps
    say(f"loading the {DENOISER}")
    run.denoiser = run.components.denoiser()
    run.denoiser.train()
    factor = run.plan.size * args.gradient_accumulation_steps if args.scale_lr else 1
    text_lr = (args.text_encoder_lr if args.text_encoder_lr is not None else args.learning_rate) * factor

    def add_part(name: str, parameters: dict, rate: float, decay: float, share: float) -> None:
        run.parts.append(Part(name, parameters, rate, decay, max(1, round(share * steps))))

    if run.rows:
        until = 1.0 if args.train_transformer_frac == 0 else args.train_text_encoder_ti_frac
        rows = {key: row.weight for key, row in run.rows.items()}
        add_part("embeddings", rows, text_lr, args.adam_weight_decay_text_encoder, until)
    if run.lora_modules:
        values = {f"{part}.{n}": p for part, m in run.lora_modules.items() for n, p in lora_parameters(m).items()}
        add_part("text_encoder", values, text_lr, args.adam_weight_decay_text_encoder, args.train_text_encoder_frac)
    if args.train_transformer_frac > 0:
        own = sorted({ADAPTER.split(key)[0] for key in run.start.get(DENOISER, ())})
        targets = own if own and not args.lora_layers and not args.lora_blocks else lora_targets(run.denoiser, args)
        with waiting("adding the LoRA"):
            add_lora(run.denoiser, targets, args, run.start.get(DENOISER))
        run.lora_modules = {DENOISER: run.denoiser} | run.lora_modules
        rate, values = args.learning_rate * factor, lora_parameters(run.denoiser)
        add_part("denoiser", values, rate, args.adam_weight_decay, args.train_transformer_frac)
        kind = LORA_TYPES[args.lora_type]
        say(f"{kind} of rank {args.rank}, alpha {args.lora_alpha:g} on {len(targets)} layers of the {DENOISER}")
    if args.gradient_checkpointing:
        enable_checkpointing(run.denoiser, args.lora_dropout > 0, whole=args.compile or args.use_dora)
    if run.components.sharded:
        shard_base(run.denoiser, run.accelerator.device)
        say(f"FSDP2: the {DENOISER} is split over {run.accelerator.num_processes} processes")
    if args.compile:
        compile_blocks(run.denoiser)
    run.initial_states = {part: lora_state(module) for part, module in run.lora_modules.items()}
    prepare_parts(run.parts, args, run.components.dtype)
    for module in run.lora_modules.values():
        if not (args.compile and module is run.denoiser):  # the compiler fuses too, and would take each LoraGroup anew
            fuse_lora(module)
    if not args.compile:
        lighten(run.denoiser)
    run.graphs = Graphs(run.parts) if args.cuda_graphs else None
    for part in run.parts:
        millions = part.weights.numel() / 1e6
        say(
            f"training {part.name}: {millions:.3f} million parameters, steps 1 to {part.last_step}, learning rate {part.learning_rate:g}"
        )
    if args.deepspeed:
        state = sum(p.weights.numel() for p in run.parts) * 8 / 2**20
        say(
            f"DeepSpeed's launcher: trained as with DDP; the optimizer's state ({state:.0f} MiB) isn't split, and"
            " config/accelerate_config_fsdp2.yaml splits the base"
        )
    run.guard = StepGuard(run.accelerator.device, run.accelerator.mixed_precision == "fp16")


# attention's layers in the original code, and here
ORIGINAL_NAMES = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out.0"}
LORA_TYPES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}  # https://arxiv.org/abs/2309.14859
ADAPTER = re.compile(r"\.(?=(?:lora|hada|lokr)_)")  # where, in the name of a parameter of these, the layer's name ends
LINEAR_FACTORS = (".lora_B.", ".hada_w2_b.", ".lokr_w1.")  # one of each layer, to which its update is proportional


def lora_targets(denoiser, args: argparse.Namespace) -> list[str]:
    """Full names of the modules that get a LoRA. A name in --lora_layers is a module's last part (`to_q`), a full name, or a
    block prefix (`mid_block`), which means the usual layers inside. Errors: UserError for what matches nothing.
    """
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    idle = idle_layers(DENOISER, denoiser.config, args)
    modules = [n for n, m in denoiser.named_modules() if isinstance(m, kinds) and not n.startswith(idle)]

    def ends(name: str, part: str) -> bool:
        return name == part or name.endswith("." + part)

    entries = [e.strip() for text in args.lora_layers or [] for e in text.split(",") if e.strip()]
    entries, chosen = [ORIGINAL_NAMES.get(e, e) for e in entries], []
    prefixes = block_prefixes(denoiser)
    for block in (b.strip() for text in args.lora_blocks or [] for b in text.split(",")):
        if not block.isdecimal():
            entries.append(block)
        elif int(block) >= len(prefixes):
            raise UserError(f"--lora_blocks {block}: the blocks are 0 to {len(prefixes) - 1}")
        else:
            chosen.append(prefixes[int(block)])
    found = set()
    for entry in entries or LORA_TARGETS:
        matched = {n for n in modules if ends(n, entry)}
        matched |= {n for n in modules if n.startswith(entry + ".") and any(ends(n, t) for t in LORA_TARGETS)}
        if not matched and entries:
            parts = sorted({".".join(n.split(".")[-k:]) for n in modules for k in (1, 2)} | set(prefixes))
            near = difflib.get_close_matches(entry, parts, n=3, cutoff=0.3)
            known = ", ".join(near or parts[:5])
            raise UserError(f"--lora_layers {entry} matches no layer of the {DENOISER}; near it are {known}")
        found |= {n for n in matched if not chosen or n.startswith(tuple(f"{p}." for p in chosen))}
    if not found:
        raise UserError("--lora_layers and --lora_blocks together match no layer")
    return sorted(found)


def block_prefixes(denoiser) -> list[str]:
    """The denoiser's blocks in order, for --lora_blocks."""
    names = []
    for name in BLOCKS:
        blocks = getattr(denoiser, name)
        listed = isinstance(blocks, torch.nn.ModuleList)
        names += [f"{name}.{i}" for i in range(len(blocks))] if listed else [name] * (blocks is not None)
    return names


def read_initial_lora(run: Run) -> dict[str, dict]:
    """--init_lora: {pipeline name: weights with peft's keys}; kind, rank, alpha and layers are set from the file.

    New tokens that lie beside it come under "embeddings". Errors: UserError for a file that isn't a LoRA of this family, or
    has layers of several ranks.
    """
    args, file = run.args, Path(run.args.init_lora)
    file = file / "pytorch_lora_weights.safetensors" if file.is_dir() else file
    with tempfile.TemporaryDirectory() as folder:
        try:
            weights, metadata = read_safetensors(file)
            diffusers = ("unet.", "transformer.", "text_encoder")
            if not all(key.startswith(diffusers) for key in weights):
                if not CONVERT.is_file():
                    raise UserError(f"--init_lora {file}: its keys aren't diffusers'; convert it with {CONVERT.name}")
                words = ["--to", "diffusers", "--family", FAMILY, "--base", str(run.components.folder)]
                told, problem = io.StringIO(), io.StringIO()
                with contextlib.redirect_stdout(told), contextlib.redirect_stderr(problem):
                    failed = runpy.run_path(str(CONVERT))["main"]([str(file), f"{folder}/{file.name}", *words])
                if failed:
                    raise UserError(f"--init_lora: {problem.getvalue().strip().rpartition('error: ')[2]}")
                for line in told.getvalue().splitlines()[:-1]:  # what was left out, or became a plain LoRA
                    say(f"--init_lora: {line}")
                weights, metadata = read_safetensors(Path(folder) / file.name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--init_lora {file}: {brief(error)}") from None
    start: dict[str, dict] = {}
    for key, value in weights.items():
        part, _, name = key.partition(".")
        for ours, theirs in DIFFUSERS_SPELLING if part == DENOISER else ():
            name = name.replace(theirs, ours)
        start.setdefault(part, {})[name] = value
    if DENOISER not in start:
        raise UserError(f"--init_lora {file}: no layer of a {DENOISER} in it: is it a LoRA for another family?")
    try:
        said = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        kind = said.get(f"{DENOISER}.peft_type", "LORA").lower()
        ranks = {len(value) for state in start.values() for key, value in state.items() if ".lora_A." in key}
        ranks |= {said.get(f"{part}.r", 0) for part in start if kind != "lora"}
        name = f"{'lora_' * (kind == 'lora')}alpha"
        alphas = {float(said.get(f"{part}.{name}", max(ranks, default=0))) for part in start}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"--init_lora {file}: its metadata is damaged: {brief(error)}") from None
    if kind not in LORA_TYPES:
        raise UserError(f"--init_lora {file}: {kind} is none of {', '.join(LORA_TYPES.values())}")
    uneven = any(said.get(f"{part}.{name}") for part in start for name in ("rank_pattern", "alpha_pattern"))
    if len(ranks) != 1 or len(alphas) != 1 or uneven:
        raise UserError(
            f"--init_lora {file}: layers of several ranks or alphas; scripts/lora/resize_lora.py makes them equal"
        )
    found = {"rank": ranks.pop(), "lora_alpha": alphas.pop()}
    found |= {"use_dora": any("magnitude" in key for key in start[DENOISER]), "lora_type": kind}
    found["lokr_factor"] = said.get(f"{DENOISER}.decompose_factor", -1)
    found |= {"lora_dropout": 0.0, "loraplus_lr_ratio": 1.0, "merge_lora": False} if kind != "lora" else {}
    for name, value in found.items():
        if args.settings[name] not in (args.defaults[name], value):
            raise UserError(f"--{name} {args.settings[name]}: --init_lora {file} has {value}; leave the flag out")
    vars(args).update(found)
    say(f"starting from {file}: {LORA_TYPES[kind]}, rank {args.rank}, alpha {args.lora_alpha:g}")
    if start.keys() - {DENOISER} and not args.train_text_encoder:
        say(f"warning: {file} has a LoRA for the text encoder too; without --train_text_encoder it is left out")
    tokens = file.with_name(f"{file.resolve().parent.name}_emb.safetensors")
    if args.train_text_encoder_ti and tokens.is_file():
        start["embeddings"] = read_safetensors(tokens)[0]
        say(f"new tokens start from {tokens}")
    return start


def read_safetensors(file: Path) -> tuple[dict, dict]:
    """Tensors and metadata of a file."""
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def add_lora(module, targets: list[str], args: argparse.Namespace, start: dict | None = None) -> None:
    """Adds a LoRA of --lora_type to a module; its parameters are float32 whatever the base is. start: weights with peft's keys.

    Every process draws the same start: the seed depends on nothing else.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoHaConfig, LoKrConfig, LoraConfig
    from peft.utils import set_peft_model_state_dict

    torch.manual_seed(stable_seed(args.seed, "lora", len(targets)))
    kind, common = args.init_lora_weights, {"r": args.rank, "target_modules": targets}
    alpha = args.lora_alpha * (math.sqrt(args.rank) if args.use_rslora else 1)
    try:
        if args.lora_type == "loha":
            config = LoHaConfig(**common, alpha=alpha)
        elif args.lora_type == "lokr":  # as LyCORIS starts it: the larger factor at zero
            config = LoKrConfig(**common, alpha=alpha, decompose_factor=args.lokr_factor, init_weights="lycoris")
        else:
            config = LoraConfig(
                **common,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_lora_weights={"default": True, "true": True}.get(kind.lower(), kind.lower()),
                use_dora=args.use_dora,
                use_rslora=args.use_rslora,
            )
        module.add_adapter(config)
    except ValueError as error:
        raise UserError(f"--init_lora_weights {kind}: {' '.join(str(error).split())[:200]}") from None
    if start:
        prefix = "text_model." if hasattr(module, "text_model") else ""
        own = {prefix + key.removeprefix("text_model."): value for key, value in start.items()}
        try:
            strays = set_peft_model_state_dict(module, own).unexpected_keys
        except RuntimeError as error:
            raise UserError(f"--init_lora {args.init_lora}: its layers are of another size: {brief(error)}") from None
        if strays:
            raise UserError(
                f"--init_lora {args.init_lora}: {len(strays)} keys fit no layer trained, such as {strays[0]}"
            )
    cast_training_params(module, torch.float32)


def lora_parameters(module) -> dict:
    """The trainable parameters of a module with a LoRA, by name."""
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def lora_state(module, parts: list[Part] = ()) -> dict:
    """A copy of the LoRA's weights with peft's keys, on the CPU in float32; those of `parts` from their own buffers."""
    from peft.utils import get_peft_model_state_dict

    pairs = [(part.parameters, part.split(part.weights.detach())) for part in parts]
    masters = {parameter: views[name] for owned, views in pairs for name, parameter in owned.items()}
    state = {name: masters.get(p, p) for name, p in module.named_parameters() if ADAPTER.search(name)}
    state = get_peft_model_state_dict(module, state_dict=state)
    return {k: v.detach().float().cpu().contiguous().clone() for k, v in state.items()}


@dataclass
class Part:
    """Parameters that are trained together: the denoiser's LoRA, the text encoders' LoRA, or the new tokens' rows.

    They lie in one flat float32 buffer, `weights`, and so do gradients and moments, so that optimizer, clipping, moving
    average, sum over processes and checkpoint are one operation each. Where a module computes in half precision, its
    parameters are views into a `shadow` of that buffer, which is cast once a step. It is trained while step < last_step.
    """

    name: str
    parameters: dict[str, object]  # as the modules have them
    learning_rate: float
    weight_decay: float
    last_step: int
    rate: float = 0.0  # the learning rate of the last step
    weights: object = None  # (N,) float32, a Parameter
    gradients: object = None  # (N,) float32, its gradient
    shadow: object = None  # (N,) the weights in the modules' precision; None where that is float32
    fresh: object = None  # (N,) gradients of the last micro-batch, in the same precision
    initial: object = None  # (N,) on the CPU, the weights at the start
    spreads: list[float] = field(default_factory=list)  # of new tokens: each table's standard deviation at the start
    optimizer: object = None
    schedule: object = None
    ema: object = None

    def allocate(self, dtype=None) -> None:
        """Makes the buffers and points the modules' parameters into them. dtype: the modules' precision; None: float32.

        LoRA's A matrices come first, so that those of one attention follow each other, its B matrices last.
        """
        self.parameters = dict(sorted(self.parameters.items(), key=lambda item: ".lora_B." in item[0]))
        values = torch.cat([p.detach().flatten().float() for p in self.parameters.values()])
        self.weights, self.gradients, self.initial = torch.nn.Parameter(values), torch.zeros_like(values), values.cpu()
        self.weights.grad, self.initial = self.gradients, self.initial.clone()
        if self.name == "embeddings":
            self.spreads = [rows.std().item() for rows in self.split(self.initial).values()]
        read, written = values, self.gradients
        if dtype not in (None, torch.float32):
            self.shadow, self.fresh = read, written = values.to(dtype), self.gradients.to(dtype)
        weights, gradients = self.split(read), self.split(written)
        for name, parameter in self.parameters.items():
            parameter.grad, parameter.data = None, weights[name]
            parameter.grad = gradients[name]

    def split(self, flat) -> dict[str, object]:
        """A flat tensor -> its stretch for each parameter, in that parameter's shape."""
        sizes = [p.numel() for p in self.parameters.values()]
        named = zip(self.parameters.items(), flat.split(sizes), strict=True)
        return {name: stretch.view(parameter.shape) for (name, parameter), stretch in named}

    def collect(self) -> None:
        """Adds a micro-batch's gradients to the others; to be called after each backward pass."""
        if self.fresh is not None:
            self.gradients.add_(self.fresh)
            self.fresh.zero_()

    def assign(self, weights) -> None:
        """Takes flat weights, and lets the modules see them."""
        self.weights.data.copy_(weights)
        self.publish()

    def publish(self) -> None:
        """Lets the modules see the weights; to be called after each change."""
        if self.shadow is not None:
            self.shadow.copy_(self.weights.detach())

    def step(self) -> None:
        """One step of optimizer, schedule and moving average; gradients start again at zero."""
        self.rate = self.group()["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.gradients.zero_()
        if self.spreads:
            self.pull_back()
        if self.ema is not None:
            self.ema.step([self.weights])
        self.publish()

    def pull_back(self) -> None:
        """Draws new tokens' rows a tenth of the way (in logarithms) to the spread they began with: Adam makes them grow,
        and an encoder reads rows of the size of its own.
        """
        views = [self.split(self.weights.data)]
        views += [self.split(s["z"]) for s in self.optimizer.state.values() if "z" in s]  # schedule-free's
        for spread, *tensors in zip(self.spreads, *(view.values() for view in views), strict=False):
            factor = (spread / tensors[0].std()).pow(0.1)
            for tensor in tensors:
                tensor.mul_(factor)

    def group(self) -> dict:
        """The optimizer's settings: the learning rate in use, lr, and Prodigy's estimate d, which multiplies it."""
        return self.optimizer.param_groups[0]

    def load_state_dict(self, saved: dict, ema_decay: float) -> None:
        """Takes what `training_state` has of this part. Rates and decays are this run's own, where they have changed."""
        from diffusers.training_utils import EMAModel

        self.assign(saved["weights"])
        self.initial = saved["initial"]
        if saved["optimizer"] is not None:
            own = "weight_decay betas eps initial_lr beta3 decouple use_bias_correction safeguard_warmup warmup_steps"
            mine = [{k: v for k, v in g.items() if k in own.split()} for g in self.optimizer.param_groups]
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"] | {"base_lrs": self.schedule.base_lrs})
            rate = self.schedule.lr_lambdas[0](self.schedule.last_epoch)
            for group, values in zip(self.optimizer.param_groups, mine, strict=True):
                group.update(values, lr=values["initial_lr"] * rate)
        if self.ema is not None:  # frozen, newly asked for, or gone on with
            self.ema = None if saved["optimizer"] is None else EMAModel([self.weights], decay=ema_decay)
        if self.ema is not None and saved["ema"] is not None:
            self.ema.load_state_dict(saved["ema"] | {"decay": ema_decay})
            self.ema.to(self.weights.device)

    def freeze(self) -> None:
        """Ends the training of this part: no gradients, no optimizer state; it stays at its average, if it has one."""
        if type(self.optimizer).__name__.endswith("ScheduleFree"):
            self.optimizer.eval()
        if self.ema is not None:
            self.ema.copy_to([self.weights])
        self.publish()
        for parameter in self.parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        self.gradients = self.fresh = self.weights.grad = self.optimizer = self.schedule = self.ema = None


def prepare_parts(parts: list[Part], args: argparse.Namespace, dtype=None) -> None:
    """Gives each part its buffers, optimizer, schedule and moving average. dtype: the modules' precision."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    for part in parts:
        exact = part.name == "embeddings" or args.use_dora  # DoRA's magnitudes would be rounded
        part.allocate(None if exact else dtype)
        try:
            part.optimizer = make_optimizer(part, args)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"--optimizer {args.optimizer}: {brief(error)}") from None
        part.schedule = get_scheduler(
            args.lr_scheduler,
            part.optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=part.last_step,
            num_cycles=args.lr_num_cycles,
            power=args.lr_power,
        )
        if args.use_ema and part.name != "embeddings":
            part.ema = EMAModel([part.weights], decay=args.ema_decay)


def make_optimizer(part: Part, args: argparse.Namespace):
    """The optimizer of --optimizer for one part. Each part has its own, so that Prodigy finds a step size for each."""
    common = {"params": parameter_groups(part, args.loraplus_lr_ratio), "lr": part.learning_rate}
    common |= {"weight_decay": part.weight_decay} | args.optimizer_args
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon} | common
    if "." in args.optimizer:
        return library_class(*args.optimizer.rsplit(".", 1))(**common)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(**adam, fused=part.weights.is_cuda)
    if args.optimizer == "adamw8bit":
        import bitsandbytes

        return waitless_adamw8bit(bitsandbytes.optim.AdamW8bit)(**adam)
    if args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        own = ("decouple", "use_bias_correction", "safeguard_warmup")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how it decays weights
            settings = {name: vars(args)[f"prodigy_{name}"] for name in own}
            return waitless_prodigy(Prodigy)(**adam, beta3=args.prodigy_beta3, **settings)
    if args.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        matrices = [torch.nn.Parameter(view) for view in part.split(part.weights.detach()).values()]
        for matrix, gradient in zip(matrices, part.split(part.gradients).values(), strict=True):
            matrix.grad = gradient  # it keeps a mean per row and column instead of one per weight
        return Adafactor(**common | {"params": matrices}, scale_parameter=False, relative_step=False, warmup_init=False)
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree(**adam, warmup_steps=args.lr_warmup_steps)
    optimizer.train()
    return optimizer


def parameter_groups(part: Part, ratio: float) -> list:
    """What a part's optimizer steps: its flat weights or, for LoRA+, those of the B matrices with a rate `ratio` times as high.

    https://arxiv.org/abs/2402.12354
    """
    later = sum(p.numel() for name, p in part.parameters.items() if ".lora_B." in name)
    if ratio == 1 or not later:
        return [part.weights]
    sizes = [len(part.gradients) - later, later]
    groups = [{"params": [torch.nn.Parameter(weights)]} for weights in part.weights.detach().split(sizes)]
    for group, gradient in zip(groups, part.gradients.split(sizes), strict=True):
        group["params"][0].grad = gradient
    groups[1]["lr"] = part.learning_rate * ratio
    return groups


def waitless_adamw8bit(base: type) -> type:
    """bitsandbytes' 8-bit AdamW without its wait for the GPU after each parameter."""

    class AdamW8bit(base):
        @torch.no_grad()
        def step(self, closure=None):
            for number, group in enumerate(self.param_groups):
                for place, parameter in enumerate(group["params"]):
                    if not self.state[parameter]:
                        self.init_state(group, parameter, number, place)
                    self.update_step(group, parameter, number, place)

    return AdamW8bit


def waitless_prodigy(base: type) -> type:
    """prodigyopt's Prodigy, https://arxiv.org/abs/2306.06101, for one parameter, with d kept on the GPU.

    The library reads two numbers from the GPU in each step.
    """

    class WaitlessProdigy(base):
        @torch.no_grad()
        def step(self, closure=None):
            (group,) = self.param_groups
            (weights,) = group["params"]
            state, gradient, d0, lr = self.state[weights], weights.grad, group["d0"], group["lr"]
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            beta3 = math.sqrt(beta2) if group["beta3"] is None else group["beta3"]
            if not state:
                state.update({name: torch.zeros_like(weights) for name in ("exp_avg", "exp_avg_sq", "s")})
                state.update(p0=weights.clone(), d=weights.new_tensor(d0), d_numerator=weights.new_zeros(()))
            if not lr:
                return
            d, group["k"] = state["d"], group["k"] + 1
            correction = math.sqrt(1 - beta2 ** group["k"]) / (1 - beta1 ** group["k"])
            dlr = d * (lr * correction if group["use_bias_correction"] else lr)
            if decay and not group["decouple"]:
                gradient.add_(weights, alpha=decay)
            progress, weight = torch.dot(gradient, state["p0"] - weights), d * dlr
            state["d_numerator"].mul_(beta3).addcmul_(weight, progress, value=1 / d0)
            scaled = gradient * d
            state["exp_avg"].lerp_(scaled, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(scaled, scaled, value=1 - beta2)
            weight = d * d if group["safeguard_warmup"] else weight
            state["s"].mul_(beta3).addcmul_(gradient, weight, value=1 / d0)
            found = state["d_numerator"] / torch.linalg.vector_norm(state["s"], 1) * group["d_coef"]
            state["d"] = torch.maximum(d, found.nan_to_num_(0.0))  # no gradient yet: 0 / 0
            denominator = state["exp_avg_sq"].sqrt().add_(state["d"], alpha=group["eps"])
            if decay and group["decouple"]:
                weights.addcmul_(weights, dlr, value=-decay)
            weights.addcdiv_(state["exp_avg"] * dlr, denominator, value=-1)
            group["d"] = state["d"]

    return WaitlessProdigy


@contextlib.contextmanager
def restored(parts: list[Part]):
    """What is done to parameters inside is undone afterwards, exactly, where a swap back would round."""
    kept = [part.weights.detach().clone() for part in parts]
    try:
        yield
    finally:
        for part, weights in zip(parts, kept, strict=True):
            part.assign(weights)


@contextlib.contextmanager
def averaged(parts: list[Part]):
    """While inside, parameters are what should be saved and shown: moving averages, where there are any."""
    free = [p.optimizer for p in parts if type(p.optimizer).__name__.endswith("ScheduleFree")]
    with restored(parts):
        for part in parts:
            if part.ema is not None:
                part.ema.copy_to([part.weights])
        for optimizer in free:
            optimizer.eval()
        for part in parts:
            part.publish()
        try:
            yield
        finally:
            for optimizer in free:
                optimizer.train()


class StepGuard:
    """Clips gradients, keeps non-finite ones from the weights, and scales the loss for fp16; never waits for the GPU."""

    def __init__(self, device, half: bool) -> None:
        self.half = half
        self.scale = torch.tensor(2.0**14 if half else 1.0, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)  # the last step's gradients
        self.good = torch.zeros((), device=device)  # steps since the scale last changed
        self.bad_run = torch.zeros((), device=device)  # non-finite steps in a row that no lower scale would mend
        self.bad_total = torch.zeros((), device=device)

    def apply(self, parts: list[Part], accelerator, max_norm: float):
        """Sums gradients over processes, unscales and clips them. A non-finite one makes all of them zero.

        Returns the norm before clipping, a tensor.
        """
        for part in parts:
            if accelerator.num_processes > 1:
                part.gradients.copy_(accelerator.reduce(part.gradients, reduction="sum"))
            if self.half:
                part.gradients.div_(self.scale)
        norms = [torch.linalg.vector_norm(part.gradients) for part in parts]
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        finite = norm < math.inf  # not where it is NaN either
        factor = (max_norm / (norm + 1e-6)).clamp_(max=1.0).nan_to_num_(0.0) if max_norm else finite.float()
        for part in parts:
            part.gradients.nan_to_num_(0.0, 0.0, 0.0).mul_(factor)
        if self.half:
            grow = self.good >= 1000
            self.scale = torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale / 2)
            self.good = torch.where(finite & ~grow, self.good + 1, 0.0)
        self.finite, counts = finite, ~finite & (self.scale < 1) if self.half else ~finite
        self.bad_run = torch.where(finite, 0.0, self.bad_run + counts)
        self.bad_total = self.bad_total + (~finite)
        return norm

    def allows_step(self) -> bool:
        """Whether this step is taken. On a GPU only fp16, which overflows now and then, is worth waiting for the answer;
        elsewhere a gradient that isn't finite has become zero.
        """
        return bool(self.finite) if self.half or not self.scale.is_cuda else True

    def state_dict(self) -> dict:
        """Its counts and scale, for a checkpoint."""
        return {name: value.cpu() for name, value in vars(self).items() if torch.is_tensor(value)}

    def load_state_dict(self, state: dict) -> None:
        """Takes what `state_dict` gave."""
        for name, value in state.items():
            getattr(self, name).copy_(value)


# ---- the step's layers: LoRA products, frozen weights in 8 and 4 bits ------------------------------------------------

SHARED_INPUT = (  # layers of an attention that are given the same tensor; in cross-attention the first has another
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("q_proj", "k_proj", "v_proj"),
)


class LoraGroup:
    """peft's LoRA layers that are given the same tensor one after another: the first call computes all of them.

    Takes the place of their `forward`. What is read and written are views into the buffers of the layers' part.
    """

    def __init__(self, layers: list) -> None:
        self.layers, self.bases = layers, [layer.base_layer for layer in layers]
        downs, ups = ([getattr(layer, name)["default"].weight for layer in layers] for name in ("lora_A", "lora_B"))
        self.trained, self.scale, self.ranks = downs + ups, layers[0].scaling["default"], [len(down) for down in downs]
        self.ups, self.up_grads = [up.detach().flatten(1) for up in ups], [up.grad.flatten(1) for up in ups]
        shape = (sum(self.ranks), downs[0][0].numel())
        self.down, self.down_grad = (t.as_strided(shape, (shape[1], 1)) for t in (downs[0].detach(), downs[0].grad))
        self.given, self.ready = None, {}
        for number, layer in enumerate(layers):
            layer.forward = functools.partial(self.forward, number)

    def forward(self, number: int, x):
        """What layer `number` makes of x: (..., K) -> (..., N), or (B, K, H, W) -> (B, N, H, W)."""
        layer = self.layers[number]
        if layer.disable_adapters or layer.merged:
            return layer.base_layer(x)
        if self.given is not x or number not in self.ready:
            self.given, self.ready = x, dict(enumerate(self.results(x)))
        result = self.ready.pop(number)
        if not self.ready:
            self.given = None
        return result

    def results(self, x) -> list:
        """The outputs of all layers."""
        picture = isinstance(self.bases[0], torch.nn.Conv2d)
        values = x.permute(0, 2, 3, 1) if picture else x
        rows = values.reshape(-1, values.shape[-1]).to(self.down.dtype)
        results = [r.view(*values.shape[:-1], -1) for r in LoraProducts.apply(rows, self, *self.trained)]
        if not picture:
            return results
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        return [r.permute(0, 3, 1, 2).contiguous(memory_format=layout) for r in results]


def fuse_lora(module) -> None:
    """Gives a module's plain LoRA layers (linear, 1 x 1 convolution; no dropout, no DoRA) the forward of LoraGroup.

    Those of one attention with the same input become one group. To be called when the part's buffers are there; peft
    computes all other layers.
    """
    from peft.tuners.lora import Conv2d, Linear

    def plain(layer) -> bool:
        if type(layer) not in (Linear, Conv2d) or list(layer.lora_A) != ["default"] or layer.lora_variant:
            return False
        base, linear = layer.base_layer, isinstance(layer.base_layer, torch.nn.Linear)
        if not linear and (base.kernel_size, base.stride, base.padding, base.groups) != ((1, 1), (1, 1), (0, 0), 1):
            return False
        return type(layer.lora_dropout["default"]) is torch.nn.Identity and not layer.lora_bias["default"]

    for parent in module.modules():
        layers = {name: layer for name, layer in parent.named_children() if plain(layer)}
        crossed = getattr(parent, "is_cross_attention", False)
        for names in SHARED_INPUT:
            group = [layers[name] for name in layers if name in names[crossed:]]
            if len(group) > 1 and len({layer.in_features for layer in group}) == 1 and adjacent(group):
                LoraGroup(group)
                layers = {name: layer for name, layer in layers.items() if layer not in group}
        for layer in layers.values():
            LoraGroup([layer])


def adjacent(layers: list) -> bool:
    """Whether the layers' A matrices follow each other in memory, so that together they are one matrix."""
    downs = [layer.lora_A["default"].weight for layer in layers]
    return all(b.storage_offset() == a.storage_offset() + a.numel() for a, b in zip(downs, downs[1:], strict=False))


def define_layers() -> None:
    """Defines the classes that derive from torch's, once torch is imported."""
    global FrozenLinear, FrozenProduct, LoraProducts, GatedGelu, JoinedGelu

    class FrozenLinear(torch.nn.Linear):
        """A linear layer that isn't trained: its weights in 8 bits (a scale per row), 4 (a scale per 64 values), or as they are.

        fp8: e4m3, of which GPUs that can (compute capability 8.9) take the product as it is. int8: rounded. nf4:
        https://arxiv.org/abs/2305.14314, with the scales in 8 bits. Autograd keeps nothing but the layer itself.
        """

        def __init__(self, weight, bias, kind: str | None, dtype) -> None:
            """weight: (N, K), of any floating type, where it is to stay; dtype: what the products come in."""
            torch.nn.Module.__init__(self)
            self.out_features, self.in_features = weight.shape
            self.kind, self.dtype, self.bias, self.state, self.swapped_in = kind, dtype, bias, None, None
            kept, scale = weight, weight.new_empty(0)
            if kind == "nf4":
                from bitsandbytes.functional import quantize_4bit

                kept, self.state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=True)
            elif kind:  # some rows at a time, so that little is held in float32
                quantize = to_fp8 if kind == "fp8" else functools.partial(to_int8, dtype=dtype)
                pieces = zip(*map(quantize, weight.split(max(1, 2**22 // self.in_features))), strict=True)
                kept, scale = map(torch.cat, pieces)
            self.register_buffer("stored", kept)
            self.register_buffer("scale", scale)
            nvidia = weight.is_cuda and not torch.version.hip  # AMD's numbers of capability mean something else
            capable = nvidia and torch.cuda.get_device_capability(weight.device) >= (8, 9)
            self.direct = kind == "fp8" and capable and not any(n % 16 for n in weight.shape)

        @property
        def kept(self):
            """The weights as they are kept; of a swapped block, where the device has them now."""
            return self.swapped_in() if self.swapped_in else self.stored

        @property
        def weight(self):
            """The weights (N, K) in `dtype`."""
            if self.kind is None:
                return self.kept
            if self.kind == "nf4":
                from bitsandbytes.functional import dequantize_4bit

                return dequantize_4bit(self.kept, self.state)
            return self.kept * self.scale if self.kind == "int8" else self.kept.to(self.dtype).mul_(self.scale)

        def _apply(self, fn, recurse=True):
            """Moves the weights; whatever else is asked for, a cast above all, leaves them as they are."""
            device = fn(self.scale.new_empty(0)).device
            if self.state is not None:
                self.state.to(device)
            return super()._apply(lambda tensor: tensor.to(device), recurse)

        def forward(self, x):
            """(..., K) -> (..., N)."""
            x = x.to(self.dtype)
            return F.linear(x, self.weight, self.bias) if torch.compiler.is_compiling() else frozen(self, x)

    class FrozenProduct(torch.autograd.Function):
        """x (M, K) -> x W^T + b, (M, N), of a FrozenLinear."""

        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            return product(layer, x)

        @staticmethod
        def backward(ctx, gradient):
            return input_gradient(ctx.layer, gradient), None

    class LoraProducts(torch.autograd.Function):
        """x (M, K) -> x W^T + b + s (x A^T) B^T, (M, N), for each layer of a LoraGroup, whose layers have x in common.

        The gradients of A and B are added to where the group's part collects them; autograd sees none.
        """

        @staticmethod
        def forward(ctx, x, group, *trained):
            hidden = torch.mm(x, group.down.t())  # (M, R), R the sum of the layers' ranks
            wanted = group.bases[0] not in left_out
            eighth = to_fp8(x) if wanted and direct(group.bases[0]) else None
            results = tuple(product(base, x, eighth) for base in group.bases)
            for result, part, up in zip(results, hidden.split(group.ranks, dim=1), group.ups, strict=True):
                if wanted:
                    result.addmm_(part, up.t(), alpha=group.scale)
            ctx.group = group
            ctx.save_for_backward(x, hidden)
            return results

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, *gradients):
            group, (x, hidden) = ctx.group, ctx.saved_tensors
            inner, total = torch.empty_like(hidden), None  # inner: gradients of the hidden values, but for the scale
            for gradient, part, up in zip(gradients, inner.split(group.ranks, dim=1), group.ups, strict=True):
                torch.mm(gradient, up, out=part)
            if ctx.needs_input_grad[0]:
                for base, gradient in zip(group.bases, gradients, strict=True):
                    total = input_gradient(base, gradient, total)
                total.addmm_(inner, group.down, alpha=group.scale)
            if ctx.needs_input_grad[2]:
                group.down_grad.addmm_(inner.t(), x, alpha=group.scale)
                for gradient, part, up in zip(gradients, hidden.split(group.ranks, dim=1), group.up_grads, strict=True):
                    up.addmm_(gradient.t(), part, alpha=group.scale)
            return total, *([None] * (1 + 2 * len(gradients)))

    class GatedGelu(torch.autograd.Function):
        """(..., 2C) -> first half * gelu(second half), (..., C); makes the gelu again instead of keeping it."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            value, gate = x.chunk(2, dim=-1)
            return F.gelu(gate).mul_(value)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            out = torch.empty_like(x)
            (value, gate), (of_value, of_gate) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
            torch.mul(gradient, F.gelu(gate), out=of_value)
            torch.ops.aten.gelu_backward.grad_input(gradient * value, gate, grad_input=of_gate)
            return out

    class JoinedGelu(torch.autograd.Function):
        """a (..., A) and x (..., C) -> a and gelu(x), (..., A + C), for a product alone: backwards it writes into the gradient
        that it is given, which is a product's own.
        """

        @staticmethod
        def forward(ctx, a, x):
            ctx.save_for_backward(x)
            joined = x.new_empty(*x.shape[:-1], a.shape[-1] + x.shape[-1])
            first, second = joined.tensor_split([a.shape[-1]], dim=-1)
            torch.ops.aten.gelu.out(x, approximate="tanh", out=second)
            first.copy_(a)
            return joined

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            of_a, of_x = gradient.split([gradient.shape[-1] - x.shape[-1], x.shape[-1]], dim=-1)
            torch.ops.aten.gelu_backward.grad_input(of_x, x, approximate="tanh", grad_input=of_x)
            return of_a, of_x


def rows_like(x, columns: int):
    """An empty (M, columns) that lies in memory as x (M, K) does: row by row or, as in a picture, column by column."""
    by_columns = x.stride(0) == 1 and x.stride(1) != 1
    return x.new_empty(columns, len(x)).t() if by_columns else x.new_empty(len(x), columns)


def to_fp8(x):
    """(M, K) -> the same in e4m3, row by row in memory, and float32 scales (M, 1) that make it x again.

    Scales are powers of two, the least that leave e4m3's largest, 448, unreached: bfloat16 is divided as it is, exactly.
    float16 doesn't reach down to the scales of small rows.
    """
    scale = torch.linalg.vector_norm(x, math.inf, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(1e-12).div_(224)
    scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone
    divisor = scale if x.dtype == torch.float16 else scale.to(x.dtype)
    return (x / divisor).to(torch.float8_e4m3fn, memory_format=torch.contiguous_format), scale


def to_int8(x, dtype):
    """(M, K) -> the same in int8, and scales (M, 1) in `dtype` that make it x again."""
    scale = (x.abs().amax(dim=1, keepdim=True).float().clamp_min_(1e-12) / 127).to(dtype)
    return (x / scale.float()).round_().to(torch.int8), scale


@functools.cache
def ones(columns: int, device):
    """(1, columns) of 1.0, for products without scales."""
    return torch.ones(1, columns, device=device)


def frozen(layer, x):
    """x (..., K) -> (..., N), of a linear layer that isn't trained."""
    return FrozenProduct.apply(x.reshape(-1, layer.in_features), layer).view(*x.shape[:-1], -1)


def product(layer, x, eighth=None):
    """x (M, K) -> x W^T + b, (M, N), of a linear layer or a 1 x 1 convolution, frozen in 8 or 4 bits or not.

    eighth: to_fp8(x), where several layers share it.
    """
    if layer in left_out:
        return x.new_empty(len(x), layer.out_features)
    if direct(layer):
        rows, scale = eighth or to_fp8(x)
        return torch._scaled_mm(rows, layer.kept.t(), scale, layer.scale.t(), bias=layer.bias, out_dtype=x.dtype)
    weight = layer.weight.flatten(1)
    out = rows_like(x, len(weight))
    if layer.bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(layer.bias, x, weight.t(), out=out)


def direct(layer) -> bool:
    """Whether a layer's products are taken in fp8."""
    return isinstance(layer, FrozenLinear) and layer.direct


def input_gradient(layer, gradient, total=None):
    """gradient (M, N) -> gradient W, (M, K); added to `total` if that is given."""
    if direct(layer):
        rows, scale = to_fp8(gradient * layer.scale.t().to(gradient.dtype))
        columns = layer.kept.t().contiguous().t()  # the GPU takes the second factor column by column only
        scales = scale, ones(layer.in_features, columns.device)
        mine = torch._scaled_mm(rows, columns, *scales, out_dtype=gradient.dtype)
        return mine if total is None else total.add_(mine)
    weight = layer.weight.flatten(1)
    if total is not None:
        return total.addmm_(gradient, weight)
    return torch.mm(gradient, weight, out=rows_like(gradient, weight.shape[1]))


class BlockSwap:
    """Blocks whose weights lie in the CPU's memory. Two places on the device take turns: while the block in one works, the
    next is copied into the other, on a stream of its own. Nothing is copied back.

    A layer that asks for its weights gets its block, in whatever order: forwards, backwards, recomputed, or drawing.
    """

    def __init__(self, blocks: list[list], device) -> None:
        """blocks: the FrozenLinears of each."""
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.copies: list[list] = []  # of each block: its layers' weights at home, in the first place, in the second
        self.inside, self.turn = [None, None], 0  # the number of the block in each place; the place that works
        rooms = [[-(-layer.stored.nbytes // 256) * 256 for layer in block] for block in blocks]
        places = [torch.empty(max(map(sum, rooms)), dtype=torch.uint8, device=device) for _ in range(2)]
        home = torch.empty(0, dtype=torch.uint8)
        for number, block in enumerate(blocks):
            free, copies = places, []
            for layer, room in zip(block, rooms[number], strict=True):
                if len(home) < room:  # many layers to a piece: pinned memory comes in powers of two
                    home = pinned(torch.empty(max(room, 2**29), dtype=torch.uint8))
                kept = layer.stored
                views = [flat[: kept.nbytes].view(kept.dtype).view(kept.shape) for flat in (home, *free)]
                views[0].copy_(kept)
                layer.stored, layer.swapped_in = kept.new_empty(0), functools.partial(self.fetch, number, views[1:])
                copies.append(views)
                home, *free = (flat[room:] for flat in (home, *free))
            self.copies.append(copies)

    def fetch(self, number: int, views: list):
        """A layer's weights, of its views in the two places; the first layer of a block sends for the block after it."""
        before = self.inside[self.turn]
        if before != number:
            self.turn = 1 - self.turn
            if self.inside[self.turn] != number:
                self.copy(number, self.turn)
            if self.stream:
                torch.cuda.current_stream().wait_stream(self.stream)
            ahead = number - 1 if before is not None and number < before else number + 1
            if 0 <= ahead < len(self.copies):  # else the way back begins, with the block before
                self.copy(ahead, 1 - self.turn)
        return views[self.turn]

    def copy(self, number: int, place: int) -> None:
        """Copies a block into a place, once the work with what is in it is done."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for home, *views in self.copies[number]:
                views[place].copy_(home, non_blocking=True)
        self.inside[place] = number


def compile_blocks(denoiser) -> None:
    """Compiles the blocks that repeat: each kind once, for each shape of batch."""
    torch._dynamo.config.recompile_limit = 256  # kinds times shapes; beyond it they would run uncompiled in silence
    for block in repeated(denoiser):
        block.compile(dynamic=False)


def repeated(module) -> list:
    """The blocks of which a transformer, an encoder, or the attention of a UNet is made."""
    return [part for part in module.modules() if type(part).__name__.endswith(("Block", "EncoderLayer"))]


def pinned(tensor):
    """The tensor in pinned memory, from which the GPU copies by itself; as it is where there is no GPU, or no more of that."""
    try:
        return tensor.pin_memory() if torch.cuda.is_available() else tensor
    except RuntimeError:
        return tensor


def swap_blocks(module, number: int | None, device) -> None:
    """Moves a module to the device, but for the linear weights of `number` of its blocks (None: all), evenly among the others.

    Autograd would keep a plain layer's weights on the device; a FrozenLinear asks for them again.
    """
    blocks = repeated(module)
    number = number or len(blocks)
    if number > len(blocks):
        raise UserError(f"--blocks_to_swap {number}: the {DENOISER} has {len(blocks)} blocks")
    chosen = [blocks[k * len(blocks) // number] for k in range(number)]
    for block in chosen:
        for name, layer in list(block.named_modules()):
            if type(layer) is torch.nn.Linear:
                block.set_submodule(name, FrozenLinear(layer.weight.data, layer.bias, None, layer.weight.dtype))
    BlockSwap([[part for part in block.modules() if isinstance(part, FrozenLinear)] for block in chosen], device)
    module.to(device)


def load_quantized(kind, folder: Path, quantize: str, dtype, device, variant: str | None = None, home=None):
    """A denoiser of diffusers class `kind` with the linear layers of its blocks in nf4, int8 or fp8, on the device `home`.

    Each tensor is read, cast or quantised on `device`, and dropped; those of the blocks first, the largest of them
    first, so that the CPU holds no more than one file, the device never more than the result. Layers outside of the blocks
    (embeddings, the last layer) are few and sensitive, and stay in `dtype`. Errors: UserError if weights are missing.
    """
    from accelerate import init_empty_weights

    home = home or device
    with init_empty_weights():
        model = kind.from_config(kind.load_config(folder)).requires_grad_(False).eval()
    middle, stem = f".{variant}" if variant else "", "diffusion_pytorch_model"
    index, files = folder / f"{stem}.safetensors.index{middle}.json", [f"{stem}{middle}.safetensors"]
    if index.is_file():
        with reading_base(index.name):
            files = sorted(set(read_json(index)["weight_map"].values()))
    total = sum((folder / file).stat().st_size for file in files if (folder / file).is_file())
    with waiting(f"loading in {quantize}", total, unit="B", unit_scale=True) as bar:
        for file in files:
            with reading_base(file):
                opened = safe_open(folder / file, framework="pt")
            with opened as shard:
                names = shard.keys()
                sizes = {name: ("block" in name, math.prod(shard.get_slice(name).get_shape())) for name in names}
                for name in sorted(names, key=sizes.get, reverse=True):
                    tensor = shard.get_tensor(name)
                    place(model, name, tensor, quantize, dtype, device, home)
                    bar.update(tensor.nbytes)
    if missing := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise UserError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}")
    return model.to(home)


def place(model, name: str, tensor, quantize: str, dtype, device, home) -> None:
    """Puts one tensor of a file into the model; a linear layer inside a block becomes a FrozenLinear."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    if leaf == "weight" and type(layer) is torch.nn.Linear and "block" in path:
        frozen = FrozenLinear(tensor.to(device), None, quantize, dtype).to(home)
        frozen.bias = layer.bias  # it comes later
        model.set_submodule(path, frozen)
    elif leaf in layer._parameters:
        layer._parameters[leaf] = torch.nn.Parameter(tensor.to(home, dtype, copy=True), requires_grad=False)
    elif leaf in layer._buffers:
        layer._buffers[leaf] = tensor.to(home, dtype if tensor.is_floating_point() else None, copy=True)


left_out: set = set()  # layers whose results nobody will read, while a block is computed again


def enable_checkpointing(denoiser, dropout: bool, whole: bool = False) -> None:
    """Turns gradient checkpointing on; without dropout there is no random state to be kept at each block.

    A block's LAST_PRODUCTS are not computed again: each is multiplied by a gate and added, and the backward pass needs the gate
    alone, as long as nothing trained moves the gate. whole: compute all of a block again.
    """
    run = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, preserve_rng_state=dropout)
    gates_move = any("norm" in name for name, p in denoiser.named_parameters() if p.requires_grad)
    ends = {block: last_layers(block) for block in repeated(denoiser) if not (whole or gates_move)}

    def frugal(block, *given):
        moved = any(torch.is_tensor(value) and value.dim() == 2 and value.requires_grad for value in given)
        layers = () if moved else ends.get(block, ())
        return run(block, *given, context_fn=lambda: (contextlib.nullcontext(), leaving_out(layers)))

    denoiser.enable_gradient_checkpointing(frugal if any(ends.values()) else run)


def last_layers(block) -> list:
    """The linear layers of a block that are in LAST_PRODUCTS, those under a LoRA too."""
    layers = dict(block.named_modules())
    found = [layers.get(f"{name}.base_layer", layers.get(name)) for name in LAST_PRODUCTS]
    for layer in found:
        if type(layer) is torch.nn.Linear:
            layer.forward = functools.partial(frozen, layer)
    return [layer for layer in found if layer is not None]


@contextlib.contextmanager
def leaving_out(layers):
    """While inside, these layers give tensors of the right shape with nothing in them."""
    left_out.update(layers)
    try:
        yield
    finally:
        left_out.difference_update(layers)


# ---- checkpoints and signals -----------------------------------------------------------------------------------------


STOP_SIGNALS = [n for n in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGBREAK") if hasattr(signal, n)]  # the last: Windows


class StopSignal:
    """Answers STOP_SIGNALS (Ctrl-C, and Ctrl-Break on Windows): at once outside the loop, after the step's checkpoint inside it."""

    raised = 0  # the signal that was answered at once: libraries may make another error of the exception

    def __init__(self) -> None:
        self.number, self.in_loop = 0, False
        for name in STOP_SIGNALS:
            signal.signal(getattr(signal, name), self.receive)

    def receive(self, number: int, frame: object) -> None:
        if not self.in_loop or self.number:
            self.number = StopSignal.raised = number
            raise Interrupted(128 + number, f"stopped at once by {signal.Signals(number).name}")
        self.number = number


@contextlib.contextmanager
def signals_given_back():
    """After it, signals are Python's and the system's again: none is an exception in what is said at the end."""
    try:
        yield
    finally:
        for name in STOP_SIGNALS:
            signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)


def save_checkpoint(run: Run, step: int) -> None:
    """Writes checkpoint-N: usable weights, the training state, and a manifest with hashes.

    The folder appears under its name only when it is whole; older ones go only after that.
    """
    output = Path(run.args.output_dir)
    with publishing(output, f"checkpoint-{step}", whole=True) as part:
        with averaged(run.parts):
            write_weights(run, part, torch.float32)
        torch.save(training_state(run, step), part / "training_state.pt")
        hashes = {f.name: file_hash(f) for f in sorted(part.iterdir())}
        manifest = {"step": step, "seed": run.args.seed, "settings": resume_settings(run), "files": hashes}
        (part / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    if run.args.checkpoints_total_limit:
        for stale in checkpoints_in(output)[run.args.checkpoints_total_limit :]:
            shutil.rmtree(stale, ignore_errors=True)  # another program may have a file of it open


def training_state(run: Run, step: int) -> dict:
    """What a resumed run needs: each part's flat weights, optimizer, schedule and average, and the guard's counts."""
    parts = {}
    for part in run.parts:
        stateful = {"optimizer": part.optimizer, "schedule": part.schedule, "ema": part.ema}
        states = {name: thing.state_dict() if thing else None for name, thing in stateful.items()}
        parts[part.name] = {"weights": part.weights.detach().cpu(), "initial": part.initial, **states}
    return {"step": step, "guard": run.guard.state_dict(), "parts": parts}


def load_checkpoint(run: Run, folder: Path, manifest: dict) -> int:
    """Restores a checkpoint; returns the number of steps done. Errors: UserError if it is another's, or can't be read.

    Settings that have changed are named. Those that its tensors don't fit end the run; the others need --resume_anyway.
    """
    before, now = manifest["settings"], json.loads(json.dumps(resume_settings(run)))
    changed = {n: f"{n} {before[n]}, now {now[n]}" for n in now if n in before and before[n] != now[n]}
    if hindered := [what for name, what in changed.items() if name in RESUME_FLAGS.split()]:
        ways = "another --output_dir, or --overwrite, begins anew"
        raise UserError(f"{folder.name} was trained with other settings: {', '.join(hindered)}; {ways}")
    if changed and not run.args.resume_anyway:
        ways = "set them as they were, or let --resume_anyway go on as they are now"
        raise UserError(f"{folder.name} was trained with other settings ({', '.join(changed.values())}): {ways}")
    if changed:
        say(f"note: changed since {folder.name}: {', '.join(changed.values())}")
    try:
        state = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
        run.guard.load_state_dict(state["guard"])
        for part in run.parts:
            part.load_state_dict(state["parts"][part.name], run.args.ema_decay)
        step = int(state["step"])
    except Exception as error:  # unpickling fails in many ways
        raise UserError(f"{folder.name}: training_state.pt can't be read: {brief(error)}") from None
    say(f"going on from {folder.name}")
    return step


def resume_settings(run: Run) -> dict:
    """What a checkpoint must agree with to be gone on from: all flags but those of FREE_FLAGS, and what follows from
    data, base and launcher.
    """
    args, base = run.args, run.components
    layers = "|".join(n for p in run.parts for n in p.parameters)
    examples = (run.data.examples, run.data.class_examples)
    data = ["|".join(f"{e.digest}{e.bucket}{e.held_out}{e.captions}" for e in kind) for kind in examples]
    data[0] += "".join(f"{own.repeats}{own.trigger_word}{own.caption_dropout}{own.weight}" for own in args.sets)
    decays = args.lr_scheduler not in ("constant", "constant_with_warmup")
    schedule = sorted((k, str(v)) for k, v in run.scheduler.config.items() if not k.startswith("_"))
    identity = [base.identity(DENOISER), base.identity("vae"), str(schedule)]
    short = {"targets": layers, "data": data[0], "class_images": data[1], "base": "|".join(identity)}
    return {
        **{name: vars(args)[name] for name in args.settings if name in vars(args) and name not in FREE_FLAGS.split()},
        **{name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in short.items()},
        "mixed_precision": run.accelerator.mixed_precision,
        "tokens": [t for tokens in run.abstractions.values() for t in tokens],
        "layout": "flat",  # of the weights in training_state.pt
        "global_batch_size": run.plan.size,
        "last_steps": [p.last_step for p in run.parts if decays or p.last_step < run.max_steps],
    }


def find_checkpoint(args: argparse.Namespace) -> tuple[Path, dict] | None:
    """The checkpoint to go on from and its manifest; a damaged one is named and the one before it taken."""
    wanted, output = args.resume_from_checkpoint, Path(args.output_dir)
    if wanted is None:
        return None
    named = [folder for folder in (Path(wanted), output / wanted) if folder.is_dir()][:1]
    for folder in checkpoints_in(output) if wanted == "latest" else named:
        try:
            with waiting(f"reading {folder.name}"):
                return folder, check_checkpoint(folder)
        except ValueError as error:
            problem = f"{folder.name} is passed over: {error}"
            say(f"warning: {problem}")
    if wanted != "latest":
        raise UserError(f"--resume_from_checkpoint {wanted}: {problem if named else 'no such folder'}")
    if checkpoints_in(output):
        raise UserError(f"--resume_from_checkpoint latest: every checkpoint in {output} is damaged")
    say(f"no checkpoint in {output}: starting from step 0")
    return None


def check_checkpoint(folder: Path) -> dict:
    """The manifest of a whole checkpoint. Errors: ValueError that says what is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        for name, digest in manifest["files"].items():
            if file_hash(folder / name) != digest:
                raise ValueError(f"{name} is damaged")
        if not isinstance(manifest["settings"], dict) or "training_state.pt" not in manifest["files"]:
            raise ValueError("its manifest is no checkpoint's")
        return manifest | {"step": int(manifest["step"]), "seed": int(manifest["seed"])}
    except (OSError, KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"manifest or file missing ({brief(error)})") from None


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoint folders, the latest first."""
    numbers = {p: p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*") if p.is_dir()}
    ours = [p for p, number in numbers.items() if number.isascii() and number.isdigit()]  # not checkpoint-backup-900
    return sorted(ours, key=lambda p: int(numbers[p]), reverse=True)


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Makes sure that a file's or a folder's content is on the disk; Windows flushes no folder, and no file open for reading."""
    folder = path.is_dir()
    with contextlib.suppress(PermissionError) if folder else contextlib.nullcontext():
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def rename(part: Path, final: Path) -> None:
    """Gives a file or folder its name. On Windows a scanner may hold it for a moment: it's tried again for some seconds."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(part, final)
        time.sleep(0.25)
    os.replace(part, final)


@contextlib.contextmanager
def publishing(output: Path, what: str, whole: bool = False):
    """Gives a folder to write to. Its files then appear in the output folder, each in one step; or, with `whole`, as the
    folder `what`, in one step. All of it is on the disk by then. Errors: UserError for a full one.
    """
    part = output / f".{what}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        for file in sorted(part.iterdir()):
            flush(file)
            if not whole:
                publish(file, output / file.name)
        if whole:
            flush(part)
            shutil.rmtree(output / what, ignore_errors=True)
            rename(part, output / what)
            flush(output)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' own, for a full disk
        raise UserError(f"{what} could not be written to {output} ({error}){last_good(output)}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def last_good(output: Path) -> str:
    """The end of an error's line: which checkpoint is the last, if there is one."""
    return next((f"; the last good checkpoint is {folder.name}" for folder in checkpoints_in(output)), "")


@contextlib.contextmanager
def written(file: Path):
    """Gives a path to write to; the file appears under its own name in one step, when all of it is written."""
    part = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        yield part
        rename(part, file)
    finally:
        part.unlink(missing_ok=True)


# ---- pictures: validation, class images, comparison ------------------------------------------------------------------


def draw_samples(run: Run, step: int) -> list[Path]:
    """Draws the validation prompts with what is trained so far; files samples/step-N/PROMPT_IMAGE_words.png.

    Image k of prompt p has a seed of its own that is the same at every step.
    """
    args = run.args
    files, total = [], len(run.sample_prompts) * args.num_validation_images
    with averaged(run.parts), evaluating(run), torch.no_grad(), waiting(f"pictures at step {step}", total) as bar:
        pipeline = run.components.pipeline(run.denoiser)
        for p, prompt in enumerate(run.sample_prompts):
            own = args.prompt_settings[p] if args.prompt_settings else {}  # of --validation_prompts_file
            embeds = run.prompts.for_pipeline(prompt, own.get("negative_prompt", ""))
            embeds = {k: v.to(run.components.dtype) for k, v in embeds.items()}
            size = own.get("width", run.plan_size[0]), own.get("height", run.plan_size[1])
            settings = argparse.Namespace(**vars(args) | {PROMPT_KEYS[k][1]: v for k, v in own.items()})
            together = max(1, 2**17 // math.prod(size))  # large pictures singly, for their memory
            for begin in range(0, args.num_validation_images, together):
                numbers = range(begin, min(begin + together, args.num_validation_images))
                seeds = [own["seed"] + k if "seed" in own else sample_seed(args.seed, p, k) for k in numbers]
                with weakened(run.parts, own.get("lora_scale", 1.0)):
                    context = run.autocast()
                    images = sample_images(pipeline, run.components, embeds, seeds, size, settings, context)
                bar.update(len(images))
                for k, seed, image in zip(numbers, seeds, images, strict=True):
                    if run.accelerator.is_main_process:
                        files.append(save_sample(run, step, f"{p:02d}_{k:02d}", prompt, seed, image))
    return files


@contextlib.contextmanager
def weakened(parts: list[Part], scale: float):
    """While inside, the LoRA's update counts `scale` times."""
    changed = parts if scale != 1 else []
    with restored(changed):
        for part in changed:
            for name, view in part.split(part.weights.data).items():
                view.mul_(scale if any(factor in name for factor in LINEAR_FACTORS) else 1.0)
            part.publish()
        yield


def save_sample(run: Run, step: int, number: str, prompt: str, seed: int, image) -> Path:
    """Writes samples/step-N/NUMBER_words.png, with prompt, seed and step in its text."""
    folder = Path(run.args.output_dir) / "samples" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    words = "-".join("".join(c if c.isalnum() else " " for c in prompt).split())[:48]
    text = PngImagePlugin.PngInfo()
    kind = "control" if number.startswith("control") else "validation"
    for key, value in {"prompt": prompt, "seed": seed, "step": step, "kind": kind}.items():
        text.add_itxt(key, str(value))
    file = folder / f"{number}_{words}.png"
    with written(file) as part:
        image.save(part, pnginfo=text)
    return file


def log_samples(run: Run, step: int) -> None:
    """Draws samples and sends them to TensorBoard or W&B."""
    files = draw_samples(run, step)
    for tracker in run.accelerator.trackers if run.accelerator.is_main_process else []:
        if tracker.name == "tensorboard":
            for file in files:
                tracker.writer.add_image(
                    f"validation/{file.name[:5]}", np.asarray(Image.open(file)), step, dataformats="HWC"
                )
        elif tracker.name == "wandb":
            import wandb

            pictures = [wandb.Image(str(f), caption=run.sample_prompts[int(f.name[:2])]) for f in files]
            tracker.log({"validation": pictures}, step=step)


def sample_images(pipeline, components: Components, embeds: dict, seeds: list[int], size, args, context) -> list:
    """Draws one image of a size (width, height) per seed, with one prompt's embeddings. `context` (autocast) holds for the
    denoiser alone: the VAE decodes in its own precision, so that a float32 one stays float32.
    """
    return decoded(pipeline, components, sampled_latents(pipeline, embeds, seeds, size, args, context))


def decoded(pipeline, components: Components, latents) -> list:
    """Latents (B, C, H, W) as the denoiser works on them -> images."""
    vae, latents = components.vae(), unscaled(latents, components.config("vae"))
    with torch.no_grad(), reading_base("the vae"):
        pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
    return pipeline.image_processor.postprocess(pixels.float())


def sampled_latents(pipeline, embeds: dict, seeds: list[int], size: tuple[int, int], args, context):
    """What the denoiser draws with one prompt's embeddings, as it works on it: (number of seeds, C, H, W)."""
    with context:
        latents = pipeline(
            **{k: v.repeat_interleave(len(seeds), dim=0) for k, v in embeds.items()},
            width=size[0],
            height=size[1],
            num_inference_steps=args.validation_inference_steps,
            guidance_scale=args.validation_guidance_scale,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            output_type="latent",
        ).images
    return unpack_output(latents, size)


def sample_seed(seed: int, prompt: int, image: int) -> int:
    """The seed of a validation image."""
    return stable_seed(seed, "validation", prompt, image) % 2**32


@contextlib.contextmanager
def evaluating(run: Run):
    """Trained modules in evaluation mode, the VAE on the device, and text embeddings of this moment; all put back after."""
    modules = {m: m.training for m in (run.denoiser, *run.lora_modules.values())}
    vae = run.components.vae()
    run.prompts.forget()
    for module in modules:
        module.eval()
    vae.to(run.accelerator.device)
    try:
        with torch.compiler.set_stance("force_eager"):  # other shapes than in training would be compiled anew
            yield
    finally:
        for module, training in modules.items():
            module.train(training)
        run.prompts.forget()
        if run.args.offload and run.args.cache_latents:  # else each step encodes
            vae.to("cpu")


def generate_class_images(args: argparse.Namespace, components: Components, prompts: Prompts, accelerator) -> None:
    """Draws the class images that are missing with the untrained base, and keeps them for the next run.

    Image i depends on (seed, i) only, so that several processes, or a second start, draw what one would have drawn.
    """
    folder = Path(args.class_data_dir)
    there = [example.name for example in load_class_examples(args)]
    missing = [i for i in range(args.num_class_images) if f"class_{i:05d}.png" not in there]
    missing = missing[: args.num_class_images - len(there)]
    accelerator.wait_for_everyone()
    if not missing:
        return
    wanted = f"{len(there)} of {args.num_class_images} class images in {folder}"
    say(f"{wanted}: drawing {len(missing)} of {args.class_prompt!r}")
    precision = args.prior_generation_precision
    dtype = torch_dtype(precision) if precision else components.dtype
    embeds = {k: v.to(accelerator.device, dtype) for k, v in prompts.for_pipeline(args.class_prompt).items()}
    prompts.release()  # never on the GPU together with the denoiser
    frugal = args.quantize_base or args.blocks_to_swap
    base = components.denoiser() if frugal else components.get(DENOISER, dtype)
    pipeline, size = components.pipeline(base), (args.resolution * 2)[:2]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    with waiting("class images", len(mine)) as bar:
        for begin in range(0, len(mine), args.sample_batch_size):
            numbers = mine[begin : begin + args.sample_batch_size]
            seeds = [stable_seed(args.seed, "class", i) % 2**32 for i in numbers]
            images = sample_images(pipeline, components, embeds, seeds, size, args, contextlib.nullcontext())
            for number, image in zip(numbers, images, strict=True):
                with written(folder / f"class_{number:05d}.png") as part:
                    image.save(part)
                bar.update()
    del pipeline, base
    components.free(DENOISER)
    accelerator.wait_for_everyone()


def load_class_examples(args: argparse.Namespace) -> list[Example]:
    """The whole class images that are there, --num_class_images of them at most, each with its own caption if it has one."""
    examples = []
    for example in folder_examples(Path(args.class_data_dir), None):
        if len(examples) < args.num_class_images:
            example.captions = example.captions or [clean_caption(args.class_prompt)]
            with contextlib.suppress(Exception), Image.open(io.BytesIO(example.read())) as image:
                image.verify()  # a half-written one doesn't count
                examples.append(example)
    return examples


def comparison_sheet(run: Run):
    """The picture to look at: training images, each prompt before and after with the same seeds, and control prompts.

    None if the run has not drawn all of them.
    """
    from PIL import ImageDraw, ImageFont

    output, shown = Path(run.args.output_dir), min(run.args.num_validation_images, 4)
    steps = {"before": 0, "with the\nLoRA" if run.lora_modules else "with the\nnew tokens": run.max_steps}
    blocks = [("trained on", {"": sorted(output.glob("training_pictures/*.png"))})]
    groups = [(prompt, f"{p:02d}_*") for p, prompt in enumerate(run.sample_prompts[:6])]
    for heading, pattern in (*groups, (f"should not change: {', '.join(run.control_prompts)}", "control_*")):
        rows = {name: sorted(output.glob(f"samples/step-{step:06d}/{pattern}")) for name, step in steps.items()}
        blocks.append((heading, rows))
    if not run.compares or any(len(files) < shown for _, rows in blocks[1:] for files in rows.values()):
        return None
    whole = 224 // max(run.plan_size)  # toys draw 64 pixels
    tile = tuple(round(side * (whole or 384 / max(run.plan_size))) for side in run.plan_size)
    font, small = ImageFont.load_default(20), ImageFont.load_default(16)
    margin, label, head, columns = 12, 120, 34, max(4, shown)
    width = label + columns * (tile[0] + margin) + margin
    height = sum(head + margin + (tile[1] + margin) * len(rows) for _, rows in blocks)
    sheet = Image.new("RGB", (width, height), "white")
    pen, y = ImageDraw.Draw(sheet), margin
    for heading, rows in blocks:
        heading = heading[:300]
        while pen.textlength(heading, font=font) > width - 2 * margin:
            heading = heading[:-2] + "…"
        pen.text((margin, y), heading, fill="black", font=font)
        y += head
        for name, files in rows.items():
            pen.text((margin, y + tile[1] // 2 - 16), name, fill="#444", font=small)
            for k, file in enumerate(files[:columns]):
                with Image.open(file) as image:
                    sharp = whole and image.width == run.plan_size[0]
                    method = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
                    fitted = ImageOps.pad(image.convert("RGB"), tile, method, color="white")
                sheet.paste(fitted, (label + k * (tile[0] + margin), y))
            y += tile[1] + margin
        y += margin
    return sheet


# ---- probes: what was learned, what was forgotten --------------------------------------------------------------------

QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of the noise levels, at which losses are measured
NEUTRAL_PROMPTS = ("a photograph of a street in a town", "a portrait of a woman")


class Probe:
    """Measures what training has changed, on pictures, noise levels and noise that stay the same.

    learned: 1 - loss now / loss of the base alone, on training pictures and their captions; the same on held-out ones.
    forgotten: how far the prediction for control prompts has moved from the base's, on latents that the base has drawn,
    relative to how far that for the trained captions has moved (root mean squares).
    """

    def __init__(self, run: Run, first_step: int) -> None:
        self.run, examples, chosen = run, run.data.examples, probed_images(run)
        pairs = [(chosen[k % len(chosen)], QUANTILES[(k + k // len(chosen)) % 4]) for k in range(8)]
        held_out = [(i, q) for i, e in enumerate(examples) if e.held_out for q in QUANTILES]
        self.rows = {"trained": [self.row(*pair) for pair in pairs], "held_out": [self.row(*pair) for pair in held_out]}
        with base_alone(run), evaluating(run), torch.no_grad(), waiting("probes of the base"):
            self.rows["control"] = self.control_rows(draw_control(run, 0, keep=first_step == 0))
            self.base = {kind: [self.look(*row) for row in rows] for kind, rows in self.rows.items()}

    def row(self, index: int, quantile: float) -> tuple[dict, str]:
        """A batch of one image with fixed noise at a quantile of the noise levels, and its caption."""
        run, example = self.run, self.run.data.examples[index]
        generator = torch.Generator().manual_seed(stable_seed(run.args.seed, "held-out", example.name, quantile))
        item = run.data[Slot(index, example.bucket, 0, 0, 1.0)]
        shape = tuple(item["posterior_noise"].shape)
        item |= draw_noise(generator, shape, run.scheduler, run.args, quantile=quantile)
        return collate([item]), insert_tokens(
            with_trigger(example.captions[0], example.own.trigger_word), run.abstractions
        )

    def control_rows(self, drawn: list) -> list[tuple[dict, str]]:
        """A batch of each latent (1, C, H, W) that the base has drawn for a control prompt, each at another noise level."""
        run, config, out = self.run, self.run.components.config("vae"), []
        size = torch.tensor([run.plan_size[::-1]])
        for k, (quantile, latents) in enumerate(zip(QUANTILES, drawn, strict=True)):
            mean = unscaled(latents.float().cpu(), config)
            generator = torch.Generator().manual_seed(sample_seed(run.args.seed, -2, k))
            noise = draw_noise(generator, tuple(mean.shape[1:]), run.scheduler, run.args, quantile=quantile)
            none = torch.zeros_like(mean)
            batch = {"moments": torch.cat([mean, none], dim=1), "posterior_noise": none}
            batch |= {"original_size": size, "target_size": size, "crop_top_left": torch.zeros_like(size)}
            batch |= {name: value[None] for name, value in noise.items()}
            out.append((batch, run.control_prompts[k % len(run.control_prompts)]))
        return out

    def look(self, batch: dict, caption: str) -> tuple[float, object]:
        """(loss, the denoiser's prediction) of a batch."""
        device = self.run.accelerator.device
        loss, prediction = predict(self.run, to_device(batch, device), self.run.prompts.lookup([caption]))
        return loss.item(), prediction

    def measure(self) -> dict[str, float]:
        """learned, forgotten and, with held-out images, held_out_loss and learned_held_out."""
        with averaged(self.run.parts), evaluating(self.run), torch.no_grad(), waiting("probes"):
            now = {kind: [self.look(*row) for row in rows] for kind, rows in self.rows.items()}
        loss = {k: [sum(row[0] for row in rows[k]) / max(1, len(rows[k])) for rows in (now, self.base)] for k in now}
        moved = {}
        for kind in ("trained", "control"):
            squares = [(a[1] - b[1]).square().mean() for a, b in zip(now[kind], self.base[kind], strict=True)]
            moved[kind] = torch.stack(squares).mean().sqrt().item()
        out = {"learned": 1 - loss["trained"][0] / loss["trained"][1]}
        out["forgotten"] = moved["control"] / moved["trained"] if moved["trained"] else 0.0
        if now["held_out"]:
            out |= {
                "held_out_loss": loss["held_out"][0],
                "learned_held_out": 1 - loss["held_out"][0] / loss["held_out"][1],
            }
        return out


def probed_images(run: Run) -> list[int]:
    """Up to eight training images, drawn by the seed."""
    trained = [i for i, e in enumerate(run.data.examples) if not e.held_out]
    return random.Random(stable_seed(run.args.seed, "probe")).sample(trained, min(8, len(trained)))


def draw_control(run: Run, step: int, keep: bool = True) -> list:
    """Draws a picture of a control prompt for each of the probe's noise levels, and returns the latents.

    keep: save them too, where the run compares before and after.
    """
    drawn, total = [], len(QUANTILES)
    with averaged(run.parts), evaluating(run), torch.no_grad(), waiting("control pictures", total) as bar:
        pipeline = run.components.pipeline(run.denoiser)
        for k in range(len(QUANTILES)):
            prompt, seed = run.control_prompts[k % len(run.control_prompts)], sample_seed(run.args.seed, -1, k)
            embeds = {name: v.to(run.components.dtype) for name, v in run.prompts.for_pipeline(prompt).items()}
            drawn.append(sampled_latents(pipeline, embeds, [seed], run.plan_size, run.args, run.autocast()))
            bar.update()
            if keep and run.compares and run.accelerator.is_main_process:
                save_sample(run, step, f"control_{k}", prompt, seed, decoded(pipeline, run.components, drawn[-1])[0])
    return drawn


def control_prompts(args: argparse.Namespace, examples: list[Example], abstractions: dict[str, list[str]]) -> list[str]:
    """Prompts whose pictures should not change: --control_prompt, else the class prompts, else the captions without trigger
    word and tokens, else two neutral ones.
    """
    classes = [args.class_prompt, *(own.default_caption for own in args.sets if own.is_class)]
    if given := args.control_prompt or [prompt for prompt in classes if prompt]:
        return given
    words, stripped = [*abstractions, *args.triggers], []
    for caption in (e.captions[0] for e in examples if words and not e.held_out):
        for word in words:
            caption = " ".join(caption.replace(word, " ").split()).strip(" ,")
        stripped += [caption] if caption else []
    return list(dict.fromkeys(stripped))[:4] or list(NEUTRAL_PROMPTS)


def verdict(run: Run) -> dict | None:
    """Which step to take and why, from the probes in metrics.jsonl; None if none of them gave numbers.

    Returns {"step": int, "text": str, "warnings": [str], "rows": [probe rows]}. A step's worth is the share that it has of
    what was learned at most, times the square of what it has kept, 1 - forgotten. docs/probes.md shows that this agrees
    with a judge of the pictures.
    """
    rows = [row for row in read_metrics(run.args.output_dir) if isinstance(row.get("learned"), float)]
    rows = [row for row in rows if all(isinstance(value, int | float) for value in row.values())]  # none is NaN
    if not rows:
        return None
    seen = "learned_held_out" if "learned_held_out" in rows[-1] else "learned"
    most = max(row[seen] for row in rows)
    worth = [max(0.0, row[seen]) / max(most, 1e-9) * (1 - min(1.0, row["forgotten"])) ** 2 for row in rows]
    last, faint = rows[-1], most < 0.005
    clearly = not faint and worth[-1] < 0.85 * max(worth)
    best = rows[worth.index(max(worth))] if clearly else last
    text = f"take step {best['step']}, the last: nothing speaks for an earlier one"
    if best is not last:
        less = 1 - best["forgotten"] / last["forgotten"] if last["forgotten"] else 0.0
        text = f"take step {best['step']} of {run.max_steps}: {best[seen] / most:.0%} of what was learned"
        text += f", and {less:.0%} less forgotten" if less > 0 else ""
    warnings = []
    if last["learned"] < -0.005 or (not faint and last["learned"] < 0.5 * max(row["learned"] for row in rows)):
        warnings.append("the loss has risen far above its best: the --learning_rate is too high")
    elif faint:
        warnings.append(
            "hardly anything was learned: a higher --learning_rate, more steps, or captions with the trigger word"
        )
    if "held_out_loss" in last:
        low = min(rows, key=lambda row: row["held_out_loss"])
        if last["held_out_loss"] > 1.02 * low["held_out_loss"]:
            warnings.append(
                f"the loss on held-out images has risen since step {low['step']}: from there on, pictures are memorised"
            )
    if best["forgotten"] > 0.5 and most > 0.02:
        warnings.append(
            f"control prompts have changed half as much as trained ones ({', '.join(run.control_prompts[:2])}): the LoRA bleeds;"
            " a lower --learning_rate, prior preservation, or captions that say more"
        )
    return {"step": best["step"], "text": text, "warnings": warnings, "rows": rows}


def read_metrics(output: str) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    rows, file = [], Path(output) / "metrics.jsonl"
    for line in file.read_bytes().split(b"\n") if file.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):  # the last one, where a run was killed
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


@contextlib.contextmanager
def base_alone(run: Run):
    """While inside, all that is trained is as it was at the start, when it changes nothing that the base draws."""
    with restored(run.parts):
        for part in run.parts:
            part.assign(part.initial)
        try:
            yield
        finally:
            run.prompts.forget()


# ---- files that a run leaves -----------------------------------------------------------------------------------------


def save_weights(run: Run) -> None:
    """Writes LoRA and embeddings to the output folder."""
    with publishing(Path(run.args.output_dir), "LoRA") as part, averaged(run.parts):
        write_weights(run, part, torch.float32 if run.args.upcast_before_saving else run.components.dtype)


def save_results(run: Run) -> None:
    """Writes what follows the weights: verdict, with --keep_best the weights it advises, sheet, model card, merged base."""
    args, output, advice, sheet = run.args, Path(run.args.output_dir), verdict(run) if run.probe else None, None
    with publishing(output, "results") as part:
        if args.keep_best and advice and advice["step"] != run.max_steps:
            best = output / f"checkpoint-{advice['step']}"
            for file in best.glob("*.safetensors"):
                shutil.copy(file, part / file.name)
            kept = f"the result is that of step {advice['step']}; the last's is in checkpoint-{run.max_steps}"
            gone = f"warning: --keep_best: {best.name} is gone by --checkpoints_total_limit: the result is the last's"
            say(kept if best.is_dir() else gone)
        try:
            if sheet := comparison_sheet(run):
                sheet.save(part / "comparison.png")
        except Exception as error:  # a picture is damaged
            say(f"warning: comparison.png could not be made: {brief(error)}")
        if advice:
            (part / "verdict.json").write_text(json.dumps(advice, indent=1), encoding="utf-8")
        (part / "README.md").write_text(model_card(run, sheet is not None, advice), encoding="utf-8")
    if args.merge_lora:
        save_merged(run, output / "merged")
    elif args.lora_type != "lora" and run.lora_modules:
        say(f"note: {LORA_TYPES[args.lora_type]}: diffusers' pipelines don't load it; infer_lora.py draws with it")
    elif args.use_dora:
        say(
            "note: DoRA: diffusers draws it as trained, ComfyUI nearly, AUTOMATIC1111 and kohya's scripts do not; as a plain LoRA:"
            f" python scripts/lora/resize_lora.py {output} plain.safetensors --to kohya --rank 64 --base"
            f" {args.pretrained_model_name_or_path}; the whole model: --merge_lora"
        )


def publish(file: Path, target: Path) -> None:
    """Moves a result to its place in one step; to a name of its own if Windows has the place open in another program."""
    try:
        rename(file, target)
    except PermissionError:
        spare = target.with_name(f"{target.stem}-{time.strftime('%Y%m%d-%H%M%S')}{target.suffix}")
        os.replace(file, spare)
        say(f"warning: {target} is open in another program: the new one is {spare.name}")


def write_run_files(run: Run) -> None:
    """What the report reads, and a run that is to be repeated: config.yaml, data.json, thumbnails of training images."""
    import yaml

    args, output = run.args, Path(run.args.output_dir)
    examples, buckets = run.data.examples, run.data.buckets
    settings = kept_settings(args) | {"seed": args.seed}
    from importlib.metadata import version

    versions = {name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "accelerate")}
    command = "" if args.hub_token else shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace("\n", " ")
    head = [f"# command: {command}", f"# versions: {json.dumps(versions)}", f"# defaults: {json.dumps(args.defaults)}"]
    body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    with written(output / "config.yaml") as part:
        part.write_text("\n".join([*head, body]), encoding="utf-8")
    sizes = ["{} x {}".format(*bucket) for bucket in buckets]
    rows = [[e.name, e.captions[0], "{} x {}".format(*e.size), sizes[e.bucket]] for e in examples[:500]]
    lost = {b: [lost_to_crop(e.size, buckets[b]) for e in examples if e.bucket == b] for b in range(len(buckets))}
    used = [[sizes[b], len(shares), sum(shares) / len(shares)] for b, shares in lost.items() if shares]
    summary = {"images": len(examples), "held_out": sum(e.held_out for e in examples), "captions": rows}
    summary |= {"buckets": used, "findings": run.findings}
    with written(output / "data.json") as part:
        part.write_text(json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8")
    folder = output / "training_pictures"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for k, index in enumerate(probed_images(run)):
        text = PngImagePlugin.PngInfo()
        text.add_itxt("prompt", with_trigger(examples[index].captions[0], examples[index].own.trigger_word))
        image = run.data.stores[0].decoded(index)
        if run.data.masks:  # what hardly counts, in red
            red = Image.blend(image, Image.new("RGB", image.size, "red"), 0.6)
            image = Image.composite(image, red, run.data.masks.decoded(index))
        image.thumbnail((384, 384))
        with written(folder / f"{k:02d}.png") as part:
            image.save(part, pnginfo=text)


@contextlib.contextmanager
def locked_output(args: argparse.Namespace):
    """Makes the folders of a run and holds the output folder's lock, which says who writes there.

    The system lets go of a lock when its process ends, however it ends: a dead run's is taken over. Errors: UserError if
    a folder can't be used, or another run writes to it.
    """
    folders = {"output_dir": args.output_dir, "cache_folder": args.cache_folder}
    logs = {"tensorboard", "all"} & set(args.report_to.split(","))
    folders["logging_dir"] = Path(args.output_dir, args.logging_dir) if logs else None
    folders["class_data_dir"] = args.class_data_dir if args.with_prior_preservation else None
    for flag, folder in folders.items():
        try:
            if folder is not None:
                Path(folder).mkdir(parents=True, exist_ok=True)
            if folder is not None and flag in ("output_dir", "logging_dir"):  # of the others much may be there already
                with tempfile.TemporaryDirectory(dir=folder) as trial:
                    Path(trial, "x" * 90).touch()  # Windows may end paths at 260 characters
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--{flag} {folder} can't be written to: {why}") from None
    if QUIET:
        yield
        return
    import platform

    file = Path(args.output_dir, ".lock")
    with file.open("a+", encoding="utf-8", errors="replace") as lock:
        if not takes_lock(lock):
            lock.seek(0)
            raise UserError(f"--output_dir {args.output_dir}: another run writes there ({lock.read().strip()})")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        try:
            yield
        finally:
            with contextlib.suppress(PermissionError):  # Windows removes no open file
                file.unlink(missing_ok=True)


def takes_lock(file) -> bool:
    """Takes the system's lock of an open file, if no living process has it; a file system without locks gives it."""
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            file.seek(1 << 20)  # beyond the text, which others read
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by the loader's processes
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        say("note: this file system has no locks: see that no second run writes to the output folder")
    return True


def finished_before(args: argparse.Namespace) -> bool:
    """Whether the folder holds this very run, finished, which is said. Errors: UserError if it holds something that would
    be lost: without --overwrite, results are gone on from, and never written over.
    """
    output, wanted = Path(args.output_dir), args.resume_from_checkpoint
    files = [output / name.format(name=output.resolve().name) for name in RESULTS.values()]
    found, there = [f for f in files if f.suffix == ".safetensors" and f.is_file()], checkpoints_in(output)
    if args.overwrite or not (found or there):
        return False
    ways = "another --output_dir, or --overwrite"
    before, step = earlier_settings(output)
    now = kept_settings(args) | ({"seed": before.get("seed")} if args.seed is None else {})  # one that was drawn
    names = [n for n in before | now if before.get(n, args.defaults.get(n)) != now.get(n)]  # one may be a newer flag
    changed = [f"{name} {before.get(name)}, now {now.get(name)}" for name in names]
    if found and step and not changed and wanted in (None, "latest"):
        say(f"this run is finished, at step {step}; {ways}, trains anew")
        summarise(args)
        return True
    if not wanted and found and (changed or not before):
        raise UserError(f"{output} holds another run's results ({', '.join(changed) or found[0].name}): {ways}")
    if not wanted:
        what = there[0].name if there else found[0].name
        ways = "--resume_from_checkpoint latest goes on, --overwrite begins anew"
        raise UserError(f"{output} holds {what} of a run that has not finished: {ways}")
    begin = (there[0] if wanted == "latest" and there else Path(wanted)).name.removeprefix("checkpoint-")
    if found and changed and (int(begin) if begin.isdecimal() else 0) < step:
        raise UserError(f"{output} holds the results of step {step}, and {wanted} begins before: {ways}")
    return False


def kept_settings(args: argparse.Namespace) -> dict:
    """The settings as they were given, but for what is secret and what is not the run's own: what config.yaml holds."""
    left_out = {"hub_token", "config", "dry_run", "resume_from_checkpoint", "resume_anyway", "local_rank", "overwrite"}
    return {name: value for name, value in args.settings.items() if value is not None and name not in left_out}


def earlier_settings(output: Path) -> tuple[dict, int]:
    """(what config.yaml says, the last step if that run has finished, else 0); ({}, 0) where there is none."""
    import yaml

    try:
        text = (output / "config.yaml").read_text(encoding="utf-8")
        settings, step = dict(yaml.safe_load(text)), text.rpartition(FINISHED)[2].strip()
        return settings, int(step) if step.isdecimal() else 0
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return {}, 0


def clear_output(output: Path) -> None:
    """Before the first step: removes what another run has left, and nothing that is a person's own."""
    for folder in (*checkpoints_in(output), *output.glob("samples/step-[0-9]*")):
        shutil.rmtree(folder, ignore_errors=True)
    for name in (*RESULTS.values(), "verdict.json", "metrics.jsonl", "crash.log"):
        with contextlib.suppress(PermissionError):  # on Windows: open in another program
            (output / name.format(name=output.resolve().name)).unlink(missing_ok=True)


def write_weights(run: Run, folder: Path, dtype) -> None:
    """Writes the LoRA (diffusers, and kohya/ComfyUI keys) and the token embeddings into a folder."""
    args, name = run.args, Path(run.args.output_dir).resolve().name
    for part in run.parts:
        if not part.weights.isfinite().all():
            advice = "a lower --learning_rate or weight decay, or a higher --adam_epsilon"
            kept = last_good(Path(args.output_dir))
            raise UserError(f"the {part.name}'s weights are no longer finite, and are not saved: try {advice}{kept}")
    if run.lora_modules:
        states = {part: lora_state(module, run.parts) for part, module in run.lora_modules.items()}
        states, alpha, rank = reference_free(states, run.initial_states, args)
        states = {part: {k: v.to(dtype) for k, v in state.items()} for part, state in states.items()}
        about = lora_metadata(run, alpha, rank)
        write_diffusers_file(run, folder / "pytorch_lora_weights.safetensors", states, alpha, rank, about)
        config, scale = run.components.config(DENOISER), math.sqrt(rank) if args.use_rslora else 1.0
        if args.use_dora and run.norms is None:  # once, for it reads the base
            run.norms = neighbours_norms(run.components.folder_of(DENOISER), states[DENOISER], config)
        exported = kohya_state(states, alpha * scale, config, run.norms, alpha * scale / rank)
        exported = {k: v.contiguous() for k, v in exported.items()}
        save_file(exported, folder / f"{name}.safetensors", metadata=about | tensor_hashes(exported))
    if run.rows:
        tables = {key: row.weight.detach().float().cpu().clone() for key, row in run.rows.items()}
        save_file(tables, folder / f"{name}_emb.safetensors", metadata={"format": "pt"})


def write_diffusers_file(run: Run, file: Path, states: dict, alpha: float, rank: int, about: dict[str, str]) -> None:
    """The LoRA as the family's pipeline writes it, with alpha and rank in its metadata, and `about`."""
    from diffusers.training_utils import _collate_lora_metadata

    arguments = _collate_lora_metadata(run.lora_modules)  # without it alpha is lost
    for part, state in states.items():
        arguments[f"{part}_lora_layers"] = to_diffusers_keys(state) if part == DENOISER else text_encoder_keys(state)
        metadata = arguments[f"{part}_lora_adapter_metadata"]
        metadata |= {"lora_alpha": alpha, "r": rank, "init_lora_weights": True} if "lora_alpha" in metadata else {}
        metadata |= {key: sorted(value) for key, value in metadata.items() if isinstance(value, set)}
    library_class("diffusers", PIPELINE_CLASS).save_lora_weights(file.parent, weight_name=file.name, **arguments)
    tensors, own = read_safetensors(file)  # the pipeline takes no other metadata than its own
    save_file(tensors, file, metadata=about | {"modelspec.implementation": "diffusers"} | own)


def to_diffusers_keys(state: dict) -> dict:
    """The denoiser's LoRA with the keys of diffusers' files, the same spelling for every layer.

    diffusers looks at the first key only to tell how a file is spelled: its own conversion renames the attention's layers
    alone, so a UNet's file that also has other layers would be read without them, or without the attention.
    """
    for ours, theirs in DIFFUSERS_SPELLING:
        state = {k.replace(ours, theirs): v for k, v in state.items()}
    return state


def text_encoder_keys(state: dict) -> dict:
    """A text encoder's LoRA with the level `text_model` that released files have and transformers 5 has not."""
    return {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in state.items()}


def reference_free(states: dict, initials: dict, args: argparse.Namespace) -> tuple[dict, float, int]:
    """LoRA weights for the unchanged base. Returns (states, alpha, rank).

    pissa and olora change the base's weights by the LoRA's start; what they learned, B A - B0 A0, is a LoRA of twice the
    rank: https://arxiv.org/abs/2404.02948
    """
    if not args.init_lora_weights.startswith(("pissa", "olora")):
        return states, args.lora_alpha, args.rank
    out = {}
    for part, state in states.items():
        out[part] = {}
        for key, value in state.items():
            start = initials[part][key]
            out[part][key] = torch.cat([value, start]) if ".lora_A." in key else torch.cat([value, -start], dim=1)
    return out, args.lora_alpha * (math.sqrt(2) if args.use_rslora else 2), args.rank * 2


def kohya_state(
    states: dict[str, dict], alpha: float, config: dict, norms: dict | None = None, scale: float = 1.0
) -> dict:
    """LoRA, LoHa or LoKr weights with the keys of kohya's scripts, LyCORIS, AUTOMATIC1111 and ComfyUI.

    states: pipeline name -> weights with peft's keys; config: the denoiser's; norms: of `neighbours_norms`; scale: alpha/rank,
    which LyCORIS leaves out where a LoKr's factors are both whole. Each module gets its own alpha.
    """
    kinds = {
        "lora_A.weight": "lora_down.weight",
        "lora_B.weight": "lora_up.weight",
        "lora_magnitude_vector": "dora_scale",
    }
    out = {}
    for part, state in states.items():
        modules: dict[str, dict] = {}
        for key, value in (state if part == DENOISER else text_encoder_keys(state)).items():
            name, suffix = ADAPTER.split(key)
            if suffix == "lora_magnitude_vector":  # a column, as ComfyUI multiplies it; of convolutions (out, 1, 1, 1)
                value = value.reshape(-1, *[1] * max(1, value.dim() - 1))
            modules.setdefault(name, {"alpha": torch.tensor(float(alpha))})[kinds.get(suffix, suffix)] = value
        for tensors in modules.values():
            if {"lokr_w1", "lokr_w2"} <= tensors.keys():
                tensors["lokr_w1"] = tensors["lokr_w1"] * scale
        prefix = KOHYA_PREFIXES[part]
        if part == "transformer" and not any(".lora_" in key for key in state):
            prefix = "lycoris"  # before diffusers' names: factors of q, k and v can't be put together; ComfyUI knows it
        elif part == DENOISER:
            unchanged = {name: {"dora_scale": norm[:, None]} for name, norm in (norms or {}).items()}
            modules = kohya_layout(modules | unchanged, config)
        for name, tensors in modules.items():
            out |= {f"{prefix}_{name.replace('.', '_')}.{kind}": t for kind, t in tensors.items()}
    return out


def halves_swapped(tensors: dict) -> dict:
    """A module whose rows are scale and shift, in the other order."""
    by_row = ("lora_up.weight", "dora_scale")
    return {kind: torch.cat(t.chunk(2)[::-1]) if kind in by_row else t for kind, t in tensors.items()}


def neighbours_norms(folder: Path, state: dict, config: dict) -> dict:
    """{layer: norms of its rows} of the base's layers without LoRA that the original holds as one with a layer that has one:
    with these as their magnitudes (DoRA) they stay as they are. folder: the denoiser's.
    """

    def original(name: str) -> str:
        probe = {"lora_down.weight": torch.zeros(1, 1), "lora_up.weight": torch.zeros(1, 1), "alpha": torch.tensor(1.0)}
        return next(iter(kohya_layout({name: probe}, config)))

    trained, norms = {key.split(".lora_")[0] for key in state}, {}
    shared = {original(name) for name in trained}
    for file in sorted(folder.glob("*.safetensors")) if DENOISER == "transformer" else ():  # a UNet's are single
        with safe_open(file, "pt") as shard:
            keys = shard.keys()
            for name in {k.removesuffix(".weight") for k in keys if len(shard.get_slice(k).get_shape()) == 2} - trained:
                if f"{name}.weight" in keys and original(name) in shared:
                    norms[name] = shard.get_tensor(f"{name}.weight").float().norm(dim=1)
    return norms


def fuse_projections(parts: list[dict | None], heights: list[int]) -> dict:
    """The LoRAs of layers that the original holds as one (without matrices, or None: a layer without LoRA) as one LoRA.

    The down matrices stand under each other, the up matrices on a block diagonal of `heights` rows each; the rank is
    their sum, and so is alpha. Errors: ValueError for DoRA on some of the layers, where the others' magnitudes are missing.
    """
    there = [p for p in parts if p is not None and "lora_up.weight" in p]
    rank = sum(p["lora_down.weight"].shape[0] for p in there)
    up, row, column = there[0]["lora_up.weight"].new_zeros(sum(heights), rank), 0, 0
    for part, height in zip(parts, heights, strict=True):
        if any(part is p for p in there):
            width = part["lora_up.weight"].shape[1]
            up[row : row + height, column : column + width] = part["lora_up.weight"]
            column += width
        row += height
    down = torch.cat([p["lora_down.weight"] for p in there])
    fused = {"lora_down.weight": down, "lora_up.weight": up, "alpha": sum(p["alpha"] for p in there)}
    if "dora_scale" in there[0]:
        if None in parts:
            raise ValueError("DoRA on some of the layers that the original holds as one")
        fused["dora_scale"] = torch.cat([p["dora_scale"].to(up.dtype) for p in parts])
    return fused


KOHYA_SETTINGS = """ learning_rate unet_lr=learning_rate text_encoder_lr lr_scheduler lr_warmup_steps optimizer max_grad_norm
    seed mixed_precision gradient_checkpointing gradient_accumulation_steps batch_size_per_device=train_batch_size clip_skip
    noise_offset min_snr_gamma=snr_gamma loss_type prior_loss_weight network_dropout=lora_dropout cache_latents
    caption_dropout_rate=caption_dropout flip_aug=random_flip """  # kohya's names (without ss_), and ours where they differ


def lora_metadata(run: Run, alpha: float, rank: int) -> dict[str, str]:
    """What both files of a LoRA say of it: kohya's ss_ fields and SAI modelspec 1.0.0, which other tools show and sort by."""
    args, name = run.args, Path(run.args.output_dir).resolve().name
    base, size = Path(args.pretrained_model_name_or_path).name, (args.resolution * 2)[:2]
    folder = Path(args.dataset_config or args.dataset_name or args.train_data_dir or args.instance_data_dir).name
    trained = [e for e in run.data.examples if not e.held_out]
    tags = Counter(tag.strip() for e in trained for caption in e.captions for tag in caption.split(",") if tag.strip())
    settings = (word.partition("=") for word in KOHYA_SETTINGS.split())
    values = {f"ss_{kohya}": getattr(args, own or kohya, None) for kohya, _, own in settings} | {
        "ss_network_module": "networks.lora" if args.lora_type == "lora" else "lycoris.kohya",
        "ss_network_args": None if args.lora_type == "lora" else json.dumps({"algo": args.lora_type}),
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_output_name": name,
        "ss_base_model": base,
        "ss_sd_model_name": base,
        "ss_resolution": size,
        "ss_max_train_steps": run.max_steps,
        "ss_num_train_images": len(trained),
        "ss_dataset_dirs": json.dumps({folder: {"n_repeats": args.repeats, "img_count": len(trained)}}),
        "ss_tag_frequency": json.dumps({folder: dict(tags.most_common(500))}, ensure_ascii=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": args.run_name or name,
        "modelspec.resolution": "{}x{}".format(*size),
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.trigger_phrase": args.trigger_word or None,
    }
    if run.abstractions:
        words = ", ".join(f"{''.join(tokens)} for {word}" for word, tokens in run.abstractions.items())
        values["modelspec.usage_hint"] = f"new tokens, of {name}_emb.safetensors: {words}"
    values |= base_versions(run.components.config(DENOISER), run.components.config("scheduler"))
    return {key: str(value) for key, value in values.items() if value is not None}


def base_versions(config: dict, schedule: dict) -> dict[str, str]:
    """What a LoRA's metadata says of its base; AUTOMATIC1111 hides LoRAs by it. The configurations as in `base_version`."""
    version, architecture, implementation = base_version(config, schedule)
    spec = {"modelspec.architecture": f"{architecture}/lora", "modelspec.implementation": implementation}
    return spec | {"ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2"))}


def tensor_hashes(tensors: dict) -> dict[str, str]:
    """The hash by which other tools know a file whatever its metadata."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode() + tensors[key].float().numpy().tobytes())
    return {"sshs_model_hash": digest.hexdigest(), "modelspec.hash_sha256": f"0x{digest.hexdigest()}"}


def save_merged(run: Run, folder: Path) -> None:
    """Writes the base with the LoRA merged in, as a diffusers folder."""
    components, kind = run.components, library_class("diffusers", PIPELINE_CLASS)
    pipeline = kind.from_pretrained(components.folder, dtype=components.dtype)
    pipeline.load_lora_weights(run.args.output_dir, weight_name="pytorch_lora_weights.safetensors")
    pipeline.fuse_lora(components=list(run.lora_modules), safe_fusing=True)
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(folder)


def model_card(run: Run, pictures: bool, advice: dict | None) -> str:
    """README.md of the output folder: what was trained, on what, how to use it."""
    from huggingface_hub import ModelCardData

    args, name = run.args, Path(run.args.output_dir).resolve().name
    words = [*args.triggers, *("".join(tokens) for tokens in run.abstractions.values())]
    words = ", ".join(f"`{word}`" for word in words if word)
    use = ["import torch", f"from diffusers import {PIPELINE_CLASS}"]
    use += ["from safetensors.torch import load_file"] if run.rows else []
    use.append(f"pipeline = {PIPELINE_CLASS}.from_pretrained({args.pretrained_model_name_or_path!r})")
    if run.lora_modules and args.lora_type == "lora":
        use.append(f"pipeline.load_lora_weights({name!r}, weight_name='pytorch_lora_weights.safetensors')")
    elif run.lora_modules:
        use.append(
            f"# no pipeline loads a {LORA_TYPES[args.lora_type]}: python infer_lora.py {name}; or scripts/lora/merge_lora.py"
        )
    for key, row in run.rows.items():
        use += embedding_lines(key, row.tokens, f"load_file('{name}/{name}_emb.safetensors')[{key!r}]")
    tags = ["text-to-image", "diffusers-training", "lora" if run.lora_modules else "textual_inversion", *HUB_TAGS]
    about = {"base_model": str(args.pretrained_model_name_or_path), "instance_prompt": args.instance_prompt}
    card = ModelCardData(library_name="diffusers", license="other", inference=True, tags=tags, **about)
    paragraphs = [
        f"---\n{card.to_yaml()}\n---",
        f"# {args.run_name or name}",
        f"{LORA_TYPES[args.lora_type] if run.lora_modules else 'Token embeddings'} for {FAMILY_TITLE}, base `{args.pretrained_model_name_or_path}`.",
        "![before and after](comparison.png)" if pictures else "",
        "\n".join(f"- {line}" for line in (advice["text"], *advice["warnings"])) if advice else "",
        f"Words that call it: {words}" if words else "",
        "\n".join(["```python", *use, "```"]),
        f"Trained on {len(run.plan.buckets)} images for {run.max_steps} steps, batch"
        f" {args.train_batch_size} x {run.accelerator.num_processes} x {args.gradient_accumulation_steps}, {args.optimizer},"
        f" learning rate {args.learning_rate:g}, rank {args.rank}, alpha {args.lora_alpha:g}, seed {args.seed}.",
    ]
    return "\n\n".join(p for p in paragraphs if p) + "\n"


def embedding_lines(key: str, tokens: list[str], rows: str) -> list[str]:
    """Python lines that give a pipeline the new tokens of one encoder; `rows`: the expression that loads them."""
    tokenizer, encoder = (f"pipeline.{name}" for name in TEXT_ENCODERS[key])
    if LOADS_EMBEDDINGS:
        places = f"text_encoder={encoder}, tokenizer={tokenizer}"
        return [f"pipeline.load_textual_inversion({rows}, token={tokens!r}, {places})"]
    return [
        f"{tokenizer}.add_tokens({tokens!r})",
        f"{encoder}.resize_token_embeddings(len({tokenizer}))",
        f"{encoder}.get_input_embeddings().weight.data[{tokenizer}.convert_tokens_to_ids({tokens!r})] = {rows}",
    ]


def summarise(args: argparse.Namespace, processes: int = 1, stopped: int = 0) -> None:
    """The last lines: which step to take, where the files are, and what draws with them. stopped: the step after which a
    signal ended the run; its checkpoint's files are shown, and what goes on from there.
    """
    output = Path(args.output_dir)
    place, name = output / f"checkpoint-{stopped}" if stopped else output, output.resolve().name
    if args.dry_run:
        return
    if not stopped and (file := output / "verdict.json").is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        say("\n".join(f"advice: {line}" for line in (found["text"], *found["warnings"])))
    for what, pattern in RESULTS.items():
        folder = place if pattern.endswith("safetensors") else output
        if (file := folder / pattern.format(name=name)).is_file():
            say(f"{what:12}{file}")
    prompt = (args.validation_prompt or [""])[0]
    with contextlib.suppress(OSError, ValueError, LookupError):
        caption = json.loads((output / "data.json").read_text(encoding="utf-8"))["captions"][0][1]
        prompt = prompt or with_trigger(caption, (*args.triggers, None)[0])
    say(f"{'draw':12}{command('run_lora_infer', 'infer_lora.py', [], place, '--prompt', brief(prompt) or 'a picture')}")
    if stopped:
        resume = "--resume_from_checkpoint", "latest"
        words = "--config", output / "config.yaml", *resume
        again = command("run_lora_train", Path(__file__).name, [FAMILY], *words)
        again = again if processes == 1 else f"the same command with {' '.join(resume)}"
        say(f"{'go on':12}{again}")


def command(wrapper: str, program: str, first: list[str], *words: object) -> str:
    """A command line that works here: one of the project's wrappers (its `first` word: the family) in the project's own folder,
    else its Python file.
    """
    import subprocess

    home, windows = Path(__file__).resolve().parent, sys.platform == "win32"
    file = home / f"{wrapper}{'.bat' if windows else '.sh'}"
    line = [*["bash"] * (not windows), file.name, *first] if file.is_file() and Path.cwd() == home else None
    if line is None and not (home / program).is_file():
        return "README.md there has the lines for diffusers"
    line = [*(line or [sys.executable, home / program]), *words]
    return (subprocess.list2cmdline if windows else shlex.join)(map(str, line))


def write_report(run: Run) -> None:
    """--report: makes report.html of what is in the output folder so far. A fault there never ends a training."""
    if run.args.report:
        try:
            runpy.run_path(str(REPORT))["write_report"](Path(run.args.output_dir))
        except Exception as error:
            say(f"warning: report.html could not be written: {brief(error)}")


def push_to_hub(args: argparse.Namespace) -> None:
    """Uploads what others need of the output folder: weights, model card and drawn pictures."""
    from huggingface_hub import create_repo, upload_folder

    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        repo = create_repo(name, exist_ok=True, token=args.hub_token).repo_id
        public = ["*.safetensors", "README.md", "comparison.png", "samples/*"]
        hidden = ["*/*.safetensors"]  # of checkpoints, caches, merged/: a star matches folders too
        place = {"repo_id": repo, "folder_path": args.output_dir, "token": args.hub_token}
        upload_folder(**place, allow_patterns=public, ignore_patterns=hidden)
    except Exception as error:  # whatever the hub's client raises, the results are already on the disk
        raise UserError(f"--push_to_hub failed ({brief(error)}); the results are in {args.output_dir}") from None


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses and checks the command line on top of the --config file; nothing heavy has been imported yet."""
    parser = OneLineParser(description=f"Trains a LoRA for {FAMILY_TITLE}.", allow_abbrev=False)
    add_shared_args(parser)
    add_family_args(parser.add_argument_group(f"{FAMILY_TITLE} only").add_argument)
    for name in FOREIGN_FLAGS:
        parser.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    finder = OneLineParser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    file = finder.parse_known_args(words)[0].config
    ordered = {word.split("=")[0].lstrip("-") for word in words}  # a config's flags are wishes where a machine can't
    words = (config_words(parser, read_config(file), f"--config {file}") if file else []) + words
    args, unset = parser.parse_args(words), object()
    marked = parser.parse_args(words, argparse.Namespace(**dict.fromkeys(vars(args), unset)))
    for name, why in FOREIGN_FLAGS.items():  # what another family's commands carry: fine while it's off
        marked.__dict__.pop(name)
        if (args.__dict__.pop(name) or "none").lower() not in ("none", "0", "0.0", "false", "no", '""', "epsilon"):
            raise UserError(f"--{name}: {why}")
    settings, defaults = dict(vars(args)), {name: parser.get_default(name) for name in vars(args)}
    given = {name for name, value in vars(marked).items() if value is not unset}
    args.weight, args.is_class = 1.0, False
    args.sets = [read_set(parser, args, *entry) for entry in set_entries(args)]
    args.validation_split = max(own.validation_split for own in args.sets or [args])
    args.triggers = list(dict.fromkeys(own.trigger_word for own in args.sets or [args] if own.trigger_word))
    check_args(args, given, parser)
    if args.overwrite and "resume_from_checkpoint" not in ordered:  # which a recipe has
        args.resume_from_checkpoint = None
    args.settings, args.defaults, args.ordered = settings, defaults, ordered  # settings: before anything was filled in
    return args


SET_KEYS = (  # what a set of --dataset_config may say: flags, and what is its own
    "train_data_dir dataset_name dataset_config_name dataset_split image_column caption_column instance_data_dir"
    " instance_prompt default_caption trigger_word repeats caption_dropout caption_per_line masked_loss unmasked_weight"
    " validation_split max_train_samples resolution aspect_ratio_buckets weight resolutions class_prompt"
)


def set_entries(args: argparse.Namespace) -> list[tuple[str, dict]]:
    """(where it stands, keys and values) of each set of --dataset_config, or of a folder as kohya's scripts have it."""
    if args.kohya_folders and args.train_data_dir and Path(args.train_data_dir).is_dir():
        folders = sorted(f for f in Path(args.train_data_dir).iterdir() if f.is_dir())
        named = [(folder, *match.groups()) for folder in folders if (match := re.fullmatch(r"(\d+)_(.+)", folder.name))]
        if not named:
            raise UserError(f"--kohya_folders: no folder such as 10_sks dog in {args.train_data_dir}")
        keys = "train_data_dir", "repeats", "default_caption"
        return [(str(f), dict(zip(keys, (str(f), int(n), text), strict=True))) for f, n, text in named]
    if not args.dataset_config:
        return []
    out = []
    for number, entry in enumerate(read_config(args.dataset_config, "--dataset_config", list), 1):
        where = f"--dataset_config {args.dataset_config}, set {number}"
        wrong = [key for key in entry if key not in SET_KEYS.split()] if isinstance(entry, dict) else [entry]
        if wrong:
            raise UserError(f"{where}: unknown key {wrong[0]!r}; known are {', '.join(SET_KEYS.split())}")
        sizes = entry.pop("resolutions", None) or [entry.get("resolution")]
        sizes = sizes if isinstance(sizes, list) else [sizes]
        out += [(where, entry | ({"resolution": size} if size else {})) for size in sizes]
    if not out:
        raise UserError(f"--dataset_config {args.dataset_config}: no set in it")
    return out


def read_set(parser, args: argparse.Namespace, where: str, entry: dict) -> argparse.Namespace:
    """The flags of one set: the run's, and what its entry says. Errors: UserError that names the set."""
    entry = dict(entry)
    weight, about_class = entry.pop("weight", 1.0), entry.pop("class_prompt", None)
    entry |= {"default_caption": about_class} if about_class else {}
    blank = {"dataset_config": None, "kohya_folders": False, "train_data_dir": None, "weight": weight}
    own = argparse.Namespace(**vars(args) | blank | {"is_class": about_class is not None})
    parser.parse_args(config_words(parser, entry, where), own)
    try:
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"weight: {weight!r} is no number from 0 on")
        check_args(own, set(entry), parser)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return own


def add_shared_args(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that all four training scripts have."""
    # fmt: off
    add = parser.add_argument_group("run").add_argument
    add("--config", metavar="FILE", help="YAML or JSON file with flag names as keys; flags on the command line win")
    add("--dry_run", action="store_true", help="check everything with one real step, save and validation; keep nothing")

    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", "--model_name_or_path", "-m", metavar="BASE", help="hub id, diffusers folder, or .safetensors/.ckpt file")
    add("--pretrained_vae_model_name_or_path", metavar="VAE", help="another VAE: hub id, folder or file (default: the base's)")
    add("--revision", help="revision of the base on the hub")
    add("--variant", help="weights variant of the base, such as fp16")
    add("--cache_dir", help="folder for downloads (default: the hub's own)")

    add = parser.add_argument_group("data").add_argument
    add("--train_data_dir", "--data_dir", "-d", metavar="DIR", help="folder of images with metadata.jsonl/.csv or a .txt beside each image")
    add("--dataset_name", "--data_name", metavar="NAME", help="hub data set, local folder, or a Python file with a datasets builder")
    add("--dataset_config", metavar="FILE", help="YAML list of several sets, each with its folder, repeats, trigger word, weight, sizes, masks, ...")
    add("--kohya_folders", action="store_true", help="--train_data_dir holds folders such as `10_sks dog`: repeats and caption")
    add("--dataset_config_name", help="configuration of the data set")
    add("--dataset_split", "--data_split", default="train", help="split of the data set (train)")
    add("--image_column", default="image", help="image column of the data set (image)")
    add("--caption_column", help="caption column (default: the one of text, caption, prompt that exists)")
    add("--max_train_samples", type=count, help="use so many images, drawn by --seed (default: all)")
    add("--instance_data_dir", metavar="DIR", help="folder of images of one thing, without captions")
    add("--instance_prompt", help="caption of every image that has none of its own")
    add("--repeats", type=count, default=1, help="times that each image is shown per epoch (1)")
    add("--trigger_word", help="word put before each caption, once")
    add("--default_caption", help="caption of images that have none")
    add("--caption_dropout", type=share, default=0.0, help="share of captions replaced by the empty one (0: off)")
    add("--shuffle_tags", action="store_true", help="shuffle the tags of a caption anew in each epoch")
    add("--tag_separator", default=", ", help="what stands between tags (', ')")
    add("--tag_dropout", type=share, default=0.0, help="share of a caption's tags left out each time (0: off)")
    add("--keep_tokens", type=natural, default=0, help="the first so many tags are neither shuffled nor dropped (0)")
    add("--caption_per_line", action="store_true", help="each line of a .txt is a caption, one of which is drawn each time")
    add("--validation_split", type=share, default=0.0, help="share of images held out for the held-out loss (0: none)")

    add = parser.add_argument_group("image").add_argument
    add("--resolution", "--base_resolution", type=count, nargs="+", metavar="PIXELS", help=f"one side, or width and height ({DEFAULT_RESOLUTION})")
    add("--aspect_ratio_buckets", metavar="BUCKETS", help='"auto", or "H,W;H,W;..." (default: one size for all)')
    add("--center_crop", action="store_true", help="crop the middle (default: crop anywhere)")
    add("--random_flip", action="store_true", help="mirror every other image")
    add("--image_interpolation_mode", default="lanczos", choices=["lanczos", "bicubic", "bilinear", "box", "hamming", "nearest"], help="(lanczos)")
    add("--color_jitter", type=amount, nargs="*", metavar="B C S H", help="brightness, contrast, saturation, hue (off; bare: 0.1 0.1 0.1 0.05)")
    add("--random_rotation", type=amount, nargs="?", const=5.0, metavar="DEGREES", help="turn by up to so many degrees (off; bare: 5)")
    add("--random_rotation_prob", type=share, default=0.3, help="share of images turned (0.3)")

    add = parser.add_argument_group("caches").add_argument
    add("--cache_latents", action="store_true", help="encode each image once; its crop is then drawn once per image")
    add("--cache_text_embeddings", action="store_true", help="encode each caption once (always on where captions and encoders can't change)")
    add("--cache_folder", metavar="DIR", help="keep the caches on disk, for the next run (default: in memory)")

    add = parser.add_argument_group("prior preservation").add_argument
    add("--with_prior_preservation", "--dreambooth", action="store_true", help="train on images of the class too, so that it is not forgotten")
    add("--class_data_dir", metavar="DIR", help="class images; missing ones are generated (default: class_images in the output folder)")
    add("--class_prompt", help="prompt of the class images")
    add("--num_class_images", type=count, default=100, help="class images (100)")
    add("--prior_loss_weight", type=amount, default=1.0, help="weight of the class images' loss (1)")
    add("--sample_batch_size", type=count, default=4, help="class images generated at a time (4)")
    add("--preserve_class", metavar="WORD", help="keep what the base draws for WORD, the class, without class images: one more pass forward and back")
    add("--preserve_weight", type=amount, default=1.0, help="weight of its loss (1)")
    add("--prior_generation_precision", choices=["no", "fp32", "fp16", "bf16"], help="precision while generating them (default: the training's)")

    add = parser.add_argument_group("LoRA").add_argument
    add("--rank", "--lora_r", "-r", type=count, default=4, help="rank (4)")
    add("--lora_alpha", "--alpha", type=amount, help="the update is scaled by alpha/rank (default: the rank)")
    add("--lora_dropout", type=part_of_one, default=0.0, help="dropout before the LoRA layers (0: off)")
    add("--lora_layers", "--target_modules", nargs="+", metavar="NAME", help=f"module names or block prefixes ({','.join(LORA_TARGETS)})")
    add("--lora_blocks", nargs="+", metavar="N", help="numbers of the blocks that get a LoRA (default: all); names are taken as --lora_layers")
    add("--lora_type", choices=[*LORA_TYPES], default="lora", help="loha, lokr: products of Hadamard or Kronecker; a step makes each layer's update whole, as large as its weight (lora)")
    add("--lokr_factor", type=int, default=-1, help="size of LoKr's smaller factor, 4 to 16 are usual: the larger, the fewer weights (-1: near the root)")
    add("--use_dora", action="store_true", help="weight-decomposed LoRA (DoRA)")
    add("--use_rslora", action="store_true", help="scale by alpha/sqrt(rank)")
    add("--init_lora", "--network_weights", metavar="FILE", help="start from this LoRA, of any tool; rank, alpha and layers are its own")
    add("--init_lora_weights", default="gaussian", help="gaussian, default, olora, pissa, pissa_niter_N, orthogonal, ... as peft (gaussian)")
    add("--merge_lora", action="store_true", help="also write the base with the LoRA merged in, to merged/")

    add = parser.add_argument_group("text encoders").add_argument
    add("--train_text_encoder", action="store_true", help="LoRA on the text encoder too")
    add("--train_text_encoder_frac", type=share, default=1.0, help="share of the steps in which it is trained (1)")
    add("--text_encoder_lr", type=rate, help="learning rate of text encoders and new tokens (default: --learning_rate)")
    add("--train_text_encoder_ti", action="store_true", help="pivotal tuning: learn new tokens (textual inversion), then the LoRA alone")
    add("--train_text_encoder_ti_frac", type=share, default=0.5, help="share of the steps in which the tokens are trained (0.5)")
    add("--token_abstraction", default="TOK", help="word in prompts that stands for the new tokens; several with commas (TOK)")
    add("--num_new_tokens_per_abstraction", type=count, default=2, help="new tokens per word (2)")
    add("--initializer_concept", help="start from this text's embeddings; its tokens decide how many new ones (default: random)")
    add("--train_transformer_frac", "--train_unet_frac", type=share, default=1.0, help="share of the steps in which the LoRA is trained (1; 0: textual inversion alone)")

    add = parser.add_argument_group("loss").add_argument
    add("--loss_type", choices=["l2", "huber"], default="l2", help="(l2)")
    add("--huber_c", type=amount, default=0.1, help="where huber turns from square to linear (0.1)")
    add("--masked_loss", metavar="WHERE", help='train on what masks show in white: "alpha" (the picture\'s own), a folder, or the end of their names, as in --masked_loss=-mask')
    add("--unmasked_weight", type=share, default=0.1, help="weight of the rest (0.1)")
    add("--min_timestep", type=natural, default=0, help="no timestep below: 0 is the picture (0)")
    add("--max_timestep", type=count, default=1000, help="no timestep from here on: 1000 is noise alone (1000)")

    add = parser.add_argument_group("optimizer").add_argument
    add("--optimizer", type=optimizer_name, default="adamw", help=f"{', '.join(OPTIMIZERS)}, or any class by its dotted name, such as torch.optim.RAdam (adamw)")
    add("--optimizer_args", nargs="+", metavar="KEY=VALUE", help="more arguments of the optimizer; they win")
    add("--loraplus_lr_ratio", type=amount, default=1.0, help="LoRA+: the B matrices' learning rate is so many times as high, 16 is usual (1: off)")
    add("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit")
    add("--use_prodigy", action="store_true", help="the same as --optimizer prodigy")
    add("--learning_rate", type=rate, default=1e-4, help="(1e-4; for prodigy use 1)")
    add("--scale_lr", action="store_true", help="multiply it by processes, batch size and accumulation steps")
    add("--lr_scheduler", default="constant", choices=["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"], help="(constant)")
    add("--lr_warmup_steps", type=natural, default=0, help="steps until the full learning rate (0)")
    add("--lr_num_cycles", type=count, default=1, help="restarts of cosine_with_restarts (1)")
    add("--lr_power", type=amount, default=1.0, help="of polynomial (1)")
    add("--adam_beta1", type=part_of_one, default=0.9, help="(0.9)")
    add("--adam_beta2", type=part_of_one, default=0.999, help="(0.999)")
    add("--adam_weight_decay", type=amount, default=1e-2, help="(1e-2)")
    add("--adam_weight_decay_text_encoder", type=amount, default=1e-3, help="of text encoders and new tokens (1e-3)")
    add("--adam_epsilon", type=amount, default=1e-8, help="(1e-8)")
    add("--prodigy_beta3", type=part_of_one, help="for prodigy's step size (default: the square root of beta2)")
    add("--prodigy_decouple", type=yes_or_no, default=True, nargs="?", const=True, help="weight decay as in AdamW (true)")
    add("--prodigy_use_bias_correction", type=yes_or_no, default=True, nargs="?", const=True, help="(true)")
    add("--prodigy_safeguard_warmup", type=yes_or_no, default=True, nargs="?", const=True, help="(true)")
    add("--max_grad_norm", type=amount, default=1.0, help="gradients are clipped to this norm (1; 0: off)")
    add("--use_ema", action="store_true", help="save and validate with a moving average of the LoRA")
    add("--ema_decay", type=part_of_one, default=0.9999, help="(0.9999)")

    add = parser.add_argument_group("length and batch").add_argument
    add("--seed", type=int, help="same seed, same run (default: drawn, printed and stored)")
    add("--train_batch_size", type=count, default=1, help="images per process and step (1)")
    add("--num_train_epochs", type=count, help="times through the data")
    add("--max_train_steps", type=count, help="optimizer steps; wins over epochs (1000 when neither is given)")
    add("--gradient_accumulation_steps", type=count, default=1, help="batches per optimizer step (1)")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="precision of the frozen base (default: as accelerate is configured)")
    add("--dataloader_num_workers", type=natural, default=0, help="processes that prepare images (0: none)")
    add("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)

    add = parser.add_argument_group("memory and speed").add_argument
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third more time per step")
    add("--allow_tf32", action="store_true", help="faster float32 matrix products on Ampere and later")
    add("--compile", action="store_true", help="torch.compile of the repeated blocks: slow first step, then faster")
    add("--cuda_graphs", action="store_true", help="one launch for a whole forward and backward pass: where the GPU waits for Python")
    add("--quantize_base", choices=["nf4", "int8", "fp8"], help="hold the frozen base in 4 or 8 bits")
    add("--blocks_to_swap", type=natural, default=0, metavar="N", help="hold the weights of N blocks in the CPU's memory until they work (0: none)")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="attention by xformers (torch's own is as good)")
    add("--offload", action="store_true", help="text encoders and VAE stay on the CPU while they are unused")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--output_dir", "--output_path", "-o", metavar="DIR", help="folder for everything that is written (output/FAMILY-lora)")
    add("--checkpointing_steps", type=count, default=500, help="steps between checkpoints (500)")
    add("--checkpoints_total_limit", type=count, help="keep the latest so many (default: all)")
    add("--resume_from_checkpoint", metavar="PATH", help='a checkpoint, or "latest"')
    add("--resume_anyway", action="store_true", help="go on with settings that have changed, as they are now; they are named")
    add("--overwrite", action="store_true", help="write over the results of another run in the output folder")
    add("--upcast_before_saving", action="store_true", help="save the LoRA in float32 (default: in the precision of the base)")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", "--eval_prompt", nargs="+", metavar="PROMPT", help="prompts drawn during training")
    add("--validation_prompts_file", metavar="FILE", help="prompts with settings of their own: YAML, or kohya's lines (--n --w --h --d --s --l)")
    add("--num_validation_images", type=natural, default=4, help="per prompt (4; 0: none)")
    add("--validation_epochs", type=count, help="draw every so many epochs")
    add("--validation_steps", type=count, help="draw every so many steps (with neither: about five times)")
    add("--validation_inference_steps", type=count, default=DEFAULT_INFERENCE_STEPS, help=f"({DEFAULT_INFERENCE_STEPS})")
    add("--validation_guidance_scale", type=amount, default=DEFAULT_INFERENCE_GUIDANCE, help=f"({DEFAULT_INFERENCE_GUIDANCE})")
    add("--control_prompt", nargs="+", metavar="PROMPT", help="prompts whose pictures should stay as they are: what is forgotten is measured on them")
    add("--keep_best", action="store_true", help="the step that the run advises becomes the result (default: the last one)")
    add("--skip_final_inference", action="store_true", help="no pictures before and after: no comparison.png")

    add = parser.add_argument_group("logging").add_argument
    add("--report_to", default="tensorboard", help="tensorboard, wandb, another tracker of accelerate, all, none (tensorboard)")
    add("--logging_dir", default="logs", help="inside the output folder (logs)")
    add("--logging_steps", type=count, default=1, help="steps between log lines (1)")
    add("--report", action="store_true", help="write report.html after each validation, with this project's scripts/reports/")
    add("--run_name", help="name in trackers (default: the output folder's)")
    add("--push_to_hub", action="store_true", help="upload the results at the end")
    add("--hub_model_id", help="repository on the hub (default: the output folder's name)")
    add("--hub_token", help="token for the hub; never stored or logged")


# What a checkpoint's tensors must fit; all other flags must be as they were, or --resume_anyway given, but the free ones,
# which change nothing of what is trained
RESUME_FLAGS = (
    "rank lora_alpha lora_type lokr_factor use_dora use_rslora init_lora_weights optimizer targets tokens layout"
)
FREE_FLAGS = (  # data, base, precision and length are compared as what they come to
    "config dry_run pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant cache_dir train_data_dir"
    " dataset_name dataset_config_name dataset_split image_column caption_column instance_data_dir cache_text_embeddings"
    " cache_folder class_data_dir num_class_images sample_batch_size prior_generation_precision lora_layers lora_blocks"
    " merge_lora use_8bit_adam use_prodigy max_train_steps num_train_epochs train_batch_size mixed_precision local_rank"
    " dataloader_num_workers gradient_checkpointing offload output_dir checkpointing_steps checkpoints_total_limit"
    " resume_from_checkpoint resume_anyway overwrite"
    " upcast_before_saving validation_prompt num_validation_images validation_epochs validation_steps"
    " validation_prompts_file validation_inference_steps validation_guidance_scale control_prompt keep_best skip_final_inference report_to"
    " logging_dir logging_steps report run_name push_to_hub hub_model_id hub_token"
)
NAMES_ELSEWHERE = {  # what kohya's scripts, Olive and Transformer Lab call our flags
    **dict.fromkeys(("network_dim", "lora_rank", "lora_r_dim"), "--rank"),
    **dict.fromkeys(("unet_lr", "lr"), "--learning_rate"),
    **dict.fromkeys(("max_train_epochs", "epochs", "num_epochs"), "--num_train_epochs"),
    **dict.fromkeys(("output_name", "adaptor_name"), "--output_dir (its last folder names the files)"),
    **dict.fromkeys(("save_every_n_steps", "save_steps"), "--checkpointing_steps"),
    "network_alpha": "--lora_alpha",
    "network_dropout": "--lora_dropout",
    "network_train_unet_only": "no flag: that is the default",
    "caption_dropout_rate": "--caption_dropout",
    "log_to_wandb": "--report_to wandb",
    "text_encoder_lr1": "--text_encoder_lr",
    "min_snr_gamma": "--snr_gamma",
    "flip_aug": "--random_flip",
    "enable_bucket": "--aspect_ratio_buckets auto",
    "sample_prompts": "--validation_prompt",
    "sample_every_n_steps": "--validation_steps",
    "optimizer_type": "--optimizer",
    "fp8_base": "--quantize_base fp8",
}
# (flags, when they are wrong, why): a reason that begins with "with" is one for which they would have no effect
PRIOR = "class_data_dir class_prompt num_class_images sample_batch_size prior_generation_precision"
TOKENS = "train_text_encoder_ti_frac token_abstraction num_new_tokens_per_abstraction initializer_concept"
NO_LORA = "lora_alpha lora_type lora_dropout lora_layers lora_blocks use_dora use_rslora init_lora_weights merge_lora use_ema preserve_class init_lora"
LORA_STARTS = ("gaussian", "default", "true", "orthogonal", "olora", "pissa")
TRACKERS = ("tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio")
# fmt: off
RULES = (
    ("", lambda a: not a.pretrained_model_name_or_path, "--pretrained_model_name_or_path is missing: a hub id, a diffusers folder or a checkpoint file"),
    ("revision", lambda a: Path(a.pretrained_model_name_or_path).exists(), "with a base on this machine"),
    # data
    ("train_data_dir", lambda a: not Path(a.train_data_dir).is_dir(), "{flag} {a.train_data_dir}: no such folder"),
    ("instance_data_dir", lambda a: not Path(a.instance_data_dir).is_dir(), "{flag} {a.instance_data_dir}: no such folder"),
    ("", lambda a: not (a.train_data_dir or a.dataset_name or a.instance_data_dir or a.dataset_config), "no data: give --train_data_dir, --dataset_name, or --instance_data_dir with --instance_prompt"),
    ("instance_data_dir", lambda a: a.train_data_dir, "--train_data_dir and {flag} exclude each other: give one"),
    ("instance_data_dir", lambda a: a.dataset_name, "--dataset_name and {flag} exclude each other: give one"),
    ("train_data_dir", lambda a: a.dataset_name and not a.dataset_name.endswith(".py"), "{flag} and --dataset_name exclude each other: give one"),
    ("train_data_dir dataset_name instance_data_dir", lambda a: a.dataset_config, "{flag} and --dataset_config exclude each other: name the folder in the file"),
    ("kohya_folders", lambda a: not a.train_data_dir, "without --train_data_dir, the folder that holds them"),
    ("dataset_config_name dataset_split image_column", lambda a: not a.dataset_name, "without --dataset_name"),
    ("instance_data_dir", lambda a: not a.instance_prompt and not a.default_caption, '{flag} needs --instance_prompt, such as "a photo of sks dog"'),
    ("default_caption", lambda a: a.instance_prompt, "--instance_prompt and --default_caption say the same thing: give one"),
    ("validation_split", lambda a: a.validation_split == 1, "--validation_split 1 leaves no image to train on"),
    ("random_rotation_prob", lambda a: not a.random_rotation, "without --random_rotation"),
    ("tag_separator keep_tokens", lambda a: not a.shuffle_tags and not a.tag_dropout, "without --shuffle_tags or --tag_dropout"),
    ("", lambda a: (a.shuffle_tags or a.tag_dropout) and not a.tag_separator, "--tag_separator is empty: what stands between tags?"),
    ("caption_per_line", lambda a: a.dataset_name and not Path(a.dataset_name).is_dir(), "with --dataset_name: it is for .txt files in a folder"),
    (PRIOR, lambda a: not a.with_prior_preservation, "without --with_prior_preservation"),
    ("prior_loss_weight", lambda a: not a.with_prior_preservation and not any(own.is_class for own in a.sets), "without --with_prior_preservation or a set with class_prompt"),
    ("preserve_weight", lambda a: not a.preserve_class, "without --preserve_class"),
    ("preserve_class", lambda a: not a.trigger_word and not a.train_text_encoder_ti, "{flag} needs --trigger_word, or new tokens: the class stands in their place"),
    ("preserve_class", lambda a: a.train_text_encoder, "{flag} and --train_text_encoder exclude each other: what the base makes of the text would change"),
    ("preserve_class", lambda a: a.train_text_encoder_ti and any(w.strip() in a.preserve_class for w in a.token_abstraction.split(",") if w.strip()), "{flag} {a.preserve_class} has a word of --token_abstraction in it, which new tokens take the place of: call the class otherwise"),
    ("prior_generation_precision", lambda a: a.quantize_base or a.blocks_to_swap, "with --quantize_base or --blocks_to_swap, whose base draws the class images too"),
    ("cuda_graphs", lambda a: not a.cache_latents, "{flag} needs --cache_latents"),
    ("train_text_encoder train_text_encoder_ti compile blocks_to_swap quantize_base lora_dropout use_dora preserve_class", lambda a: a.cuda_graphs, "--cuda_graphs can't be combined with {flag}, which does more than launch the same work again"),
    ("blocks_to_swap", lambda a: a.compile, "{flag} can't be combined with --compile, which wants weights that stay in one place"),
    ("with_prior_preservation", lambda a: not a.class_prompt, '{flag} needs --class_prompt, such as "a photo of a dog"'),
    ("cache_latents", lambda a: a.color_jitter is not None or a.random_rotation, "{flag} can't be combined with --color_jitter or --random_rotation: they change each image each time"),
    ("train_text_encoder train_text_encoder_ti shuffle_tags tag_dropout", lambda a: a.cache_text_embeddings, "--cache_text_embeddings can't be combined with {flag}: the embeddings change"),
    ("cache_folder", lambda a: not a.cache_latents and (trains_text(a) or a.shuffle_tags or a.tag_dropout), "without --cache_latents or captions whose embeddings can't change"),
    # LoRA and text encoders
    ("train_text_encoder", lambda a: a.train_text_encoder_ti, "--train_text_encoder and --train_text_encoder_ti exclude each other: give one"),
    ("train_text_encoder_frac", lambda a: not a.train_text_encoder, "without --train_text_encoder"),
    (TOKENS, lambda a: not a.train_text_encoder_ti, "without --train_text_encoder_ti"),
    ("text_encoder_lr adam_weight_decay_text_encoder", lambda a: not trains_text(a), "without --train_text_encoder or --train_text_encoder_ti"),
    ("text_encoder_lr", lambda a: a.text_encoder_lr == 0, "--text_encoder_lr 0 trains nothing: leave out --train_text_encoder and --train_text_encoder_ti instead"),
    ("", lambda a: a.initializer_concept is not None and not a.initializer_concept.strip(), "--initializer_concept is blank: leave it out to start at random"),
    ("num_new_tokens_per_abstraction", lambda a: a.initializer_concept, "with --initializer_concept: its tokens decide how many"),
    ("", lambda a: a.train_transformer_frac == 0 and not a.train_text_encoder_ti, "--train_transformer_frac 0 trains no LoRA: it needs --train_text_encoder_ti"),
    (NO_LORA, lambda a: a.train_transformer_frac == 0, "with --train_transformer_frac 0, which adds no LoRA"),
    ("", lambda a: 0 < a.train_transformer_frac < 1 and text_frac(a) < 1, "--train_transformer_frac below 1 leaves steps in which nothing is trained; raise it or a text fraction to 1"),
    ("", lambda a: a.lora_alpha == 0, "--lora_alpha 0 scales the update to nothing"),
    ("lokr_factor", lambda a: a.lora_type != "lokr" and not a.init_lora, "without --lora_type lokr"),
    ("lokr_factor", lambda a: a.lokr_factor < 1, "{flag} {a.lokr_factor}: 1 or more, or -1"),
    ("use_dora lora_dropout init_lora_weights loraplus_lr_ratio", lambda a: a.lora_type != "lora", "{flag} is for plain LoRAs: peft's {a.lora_type} has no such thing"),
    ("merge_lora", lambda a: a.lora_type != "lora", "{flag} is for plain LoRAs: scripts/lora/merge_lora.py merges a {a.lora_type}"),
    ("init_lora", lambda a: not Path(a.init_lora).exists(), "{flag} {a.init_lora}: no such file"),
    ("init_lora_weights use_rslora", lambda a: a.init_lora, "with --init_lora, whose weights are the start"),
    ("quantize_base blocks_to_swap", lambda a: a.merge_lora or a.init_lora_weights.startswith(("pissa", "olora", "corda", "loftq")), "{flag} can't be combined with --merge_lora or an initialisation that changes the base's weights"),
    ("", lambda a: (s := a.init_lora_weights.lower()) not in LORA_STARTS and not s.removeprefix("pissa_niter_").isdecimal(), "--init_lora_weights {a.init_lora_weights}: needs data or settings that no flag gives; use one of gaussian, default, orthogonal, olora, pissa, pissa_niter_N"),
    ("use_dora", lambda a: a.init_lora_weights.lower().startswith(("pissa", "olora")), "{flag} can't be combined with --init_lora_weights {a.init_lora_weights}: what it learns is no LoRA of the unchanged base"),
    # loss and optimizer
    ("huber_c", lambda a: a.loss_type != "huber", "without --loss_type huber"),
    ("unmasked_weight", lambda a: not a.masked_loss, "without --masked_loss"),
    ("masked_loss", lambda a: not (a.masked_loss == "alpha" or a.masked_loss[0] in "-_" or Path(a.masked_loss).is_dir()), "{flag} {a.masked_loss}: neither alpha, nor a folder, nor an end of names that begins with - or _"),
    ("min_timestep max_timestep", lambda a: not a.min_timestep < a.max_timestep <= 1000, "--min_timestep {a.min_timestep} and --max_timestep {a.max_timestep}: the first must be below the second, both within 0 to 1000"),
    ("use_8bit_adam use_prodigy", lambda a: a.use_8bit_adam and a.use_prodigy, "--use_8bit_adam and --use_prodigy contradict each other"),
    ("use_8bit_adam use_prodigy", lambda a: a.optimizer not in ("adamw", optimizer_of(a)), "{flag} and --optimizer {a.optimizer} contradict each other"),
    ("prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup", lambda a: optimizer_of(a) != "prodigy", "without --optimizer prodigy"),
    ("", lambda a: optimizer_of(a) == "schedulefree" and (a.lr_scheduler != "constant" or a.use_ema), "--optimizer schedulefree averages by itself: use --lr_scheduler constant and no --use_ema"),
    ("loraplus_lr_ratio", lambda a: optimizer_of(a) in ("prodigy", "adafactor", "schedulefree"), "with --optimizer {a.optimizer}: it takes one rate for all"),
    ("adam_beta1 adam_beta2 adam_epsilon", lambda a: "." in a.optimizer, "with --optimizer {a.optimizer}: give its own with --optimizer_args"),
    ("adam_beta1 adam_beta2 adam_epsilon", lambda a: a.optimizer == "adafactor", "with --optimizer adafactor"),
    ("", lambda a: a.lr_scheduler == "polynomial" and min(a.learning_rate, a.text_encoder_lr or 1) <= 1e-7, "--lr_scheduler polynomial ends at a rate of 1e-7: the --learning_rate must be higher"),
    ("lr_num_cycles", lambda a: a.lr_scheduler != "cosine_with_restarts", "without --lr_scheduler cosine_with_restarts"),
    ("lr_power", lambda a: a.lr_scheduler != "polynomial", "without --lr_scheduler polynomial"),
    ("ema_decay", lambda a: not a.use_ema, "without --use_ema"),
    ("", lambda a: a.learning_rate == 0, "--learning_rate 0 trains nothing"),
    # sizes
    ("color_jitter", lambda a: len(a.color_jitter) not in (0, 4), "{flag} takes four numbers (brightness contrast saturation hue) or none"),

    # output folder
    ("", lambda a: Path(a.output_dir or "").resolve().name.lower() == "pytorch_lora_weights", "--output_dir {a.output_dir}: the LoRA for other tools would have the name of diffusers' file; choose another"),
    ("", lambda a: len(os.fsencode(Path(a.output_dir or "").resolve().name)) > 239, "--output_dir {a.output_dir}: the last folder's name is too long for files that are named after it (239 bytes)"),
    ("", lambda a: data_holding(a, a.output_dir), "--output_dir {a.output_dir} lies in the data folder, and its pictures would become data"),
    ("class_data_dir", lambda a: data_holding(a, a.class_data_dir), "{flag} {a.class_data_dir} lies in the data folder, and its pictures would become data"),
    ("resume_anyway", lambda a: not a.resume_from_checkpoint, "without --resume_from_checkpoint"),
    # validation and logging
    ("validation_epochs", lambda a: a.validation_steps, "--validation_epochs and --validation_steps exclude each other: give one"),
    ("validation_epochs validation_steps", lambda a: a.num_validation_images == a.validation_split == 0, "{flag} has no effect: there are no validation images and no held-out images"),
    ("validation_prompts_file", lambda a: a.validation_prompt, "--validation_prompt and {flag} exclude each other: give one"),
    ("keep_best", lambda a: a.num_validation_images == a.validation_split == 0, "without pictures or held-out images, at which steps are compared"),
    ("report", lambda a: not REPORT.is_file(), "{flag} needs scripts/reports/report.py of this project beside the script; it also works later, on the output folder"),
    ("logging_dir", lambda a: set(a.report_to.split(",")) <= {"none", "wandb"}, "without a tracker that writes there, such as --report_to tensorboard"),
    ("hub_model_id hub_token", lambda a: not a.push_to_hub, "without --push_to_hub"),
    ("hub_token", lambda a: {"wandb", "all"} & set(a.report_to.split(",")), "{flag} is refused with wandb, which stores command lines: log in with `hf auth login` instead"),
    ("enable_xformers_memory_efficient_attention", lambda a: importlib.util.find_spec("xformers") is None, "{flag}: xformers isn't installed; torch's own attention needs no flag"),
)
# fmt: on


def check_args(args: argparse.Namespace, given: set[str], parser: argparse.ArgumentParser) -> None:
    """Refuses combinations that can't work or would be ignored, and fills in defaults that depend on other flags.

    given: names of the flags on the command line or in the --config file. Errors: UserError that names the flag and the way out.
    """
    for flags, wrong, why in (*RULES, *FAMILY_RULES):
        names = [n for n in flags.split() if n in given and not is_off(n, getattr(args, n), parser.get_default(n))]
        if (names or not flags) and wrong(args):
            why = f"{{flag}} has no effect {why}" if why.startswith("with") else why
            raise UserError(why.format(flag=f"--{names[0]}" if names else "", a=args))
    for name in ("rank", "train_text_encoder_ti_frac"):  # stand in the published commands for textual inversion
        if name in given and args.train_transformer_frac == 0:
            say(f"note: --{name} has no effect with --train_transformer_frac 0: no LoRA, tokens to the end")
    for name, value in vars(args).items():
        if value == "":  # off, as a recipe may say it
            setattr(args, name, parser.get_default(name))
        words = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]
        if any(printable(word) != word or "\0" in word for word in words):
            raise UserError(f"--{name}: {printable(str(value))!r} has bytes that are no text")
    check_trackers(args.report_to)
    use_prepared_buckets(args)
    fill_defaults(args)
    check_sizes(args)


def is_off(name: str, value: object, default: object) -> bool:
    """Whether a flag's value is its off value: none, 0, or its default. A learning rate of 0 is no way to turn it off."""
    return value == default or (value in (None, 0, "none", "") and value is not False and name != "text_encoder_lr")


def data_holding(args: argparse.Namespace, folder: str | None) -> Path | None:
    """The data folder that a folder is, or lies in."""
    data = [Path(d).resolve() for d in (args.train_data_dir, args.instance_data_dir, args.dataset_name) if d]
    return next((d for d in data if folder and d.is_dir() and Path(folder).resolve().is_relative_to(d)), None)


def trains_text(args: argparse.Namespace) -> bool:
    """Whether text embeddings change while training."""
    return args.train_text_encoder or args.train_text_encoder_ti


def text_frac(args: argparse.Namespace) -> float:
    """The share of the steps in which a text encoder or new tokens are trained."""
    tokens = args.train_text_encoder_ti and args.train_text_encoder_ti_frac
    return max(tokens, args.train_text_encoder and args.train_text_encoder_frac)


def optimizer_of(args: argparse.Namespace) -> str:
    """The optimizer that --optimizer, --use_8bit_adam or --use_prodigy names."""
    return "adamw8bit" if args.use_8bit_adam else "prodigy" if args.use_prodigy else args.optimizer


def check_trackers(report_to: str) -> None:
    """The trackers of --report_to must be known, and their packages installed."""
    for tracker in [] if report_to in ("none", "all") else report_to.split(","):
        if tracker not in TRACKERS:
            raise UserError(f"--report_to {tracker}: unknown; use one of {', '.join(sorted(TRACKERS))}, all, none")
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"--report_to {tracker}: not installed; `pip install {tracker}`, or --report_to none")


def fill_defaults(args: argparse.Namespace) -> None:
    """Fills in what depends on other flags."""
    args.optimizer = optimizer_of(args)
    args.captions_vary = args.shuffle_tags or args.tag_dropout > 0
    args.optimizer_args = dict(map(key_and_value, args.optimizer_args or ()))
    args.lora_alpha = float(args.rank) if args.lora_alpha is None else args.lora_alpha
    if args.lr_warmup_steps and args.lr_scheduler == "constant" and args.optimizer != "schedulefree":
        args.lr_scheduler = "constant_with_warmup"  # the two flags together can mean nothing else
    args.resolution = args.resolution or [DEFAULT_RESOLUTION]
    args.prompt_settings = read_prompts(args.validation_prompts_file) if args.validation_prompts_file else []
    if args.prompt_settings:
        args.validation_prompt = [own.pop("prompt") for own in args.prompt_settings]
    for name in ("validation_prompt", "control_prompt"):  # each is one line, as a caption is; "" is off
        vars(args)[name] = [c for p in vars(args)[name] or [] if (c := clean_caption(p))] or None
    args.color_jitter = [0.1, 0.1, 0.1, 0.05] if args.color_jitter == [] else args.color_jitter
    args.output_dir = str(Path(args.output_dir or f"output/{FAMILY}-lora"))  # "name/" and "name" are the same folder
    args.class_data_dir = args.class_data_dir or str(Path(args.output_dir) / "class_images")
    if args.max_train_steps is None and args.num_train_epochs is None:
        args.max_train_steps = 1000


def use_prepared_buckets(args: argparse.Namespace) -> None:
    """Takes the buckets that scripts/prepare_dataset.py has left in the data folder; --aspect_ratio_buckets wins.

    Errors: UserError if --resolution asks for another size, because the pictures have been scaled already.
    """
    file = Path(args.train_data_dir or args.instance_data_dir or args.dataset_name or "") / "buckets.json"
    if args.aspect_ratio_buckets is not None or not file.is_file():
        return
    try:
        prepared = json.loads(file.read_text(encoding="utf-8"))
        side, buckets = count(prepared["resolution"]), str(prepared["aspect_ratio_buckets"])
    except Exception:  # of a damaged file, half a dozen kinds
        raise UserError(f"{file}: has no resolution and aspect_ratio_buckets; prepare the folder again") from None
    if args.resolution is not None and not 3 / 4 <= math.prod((args.resolution * 2)[:2]) / side**2 <= 4 / 3:
        asked, way_out = " ".join(map(str, args.resolution)), "prepare again, or use --aspect_ratio_buckets auto"
        raise UserError(f"--resolution {asked}: the pictures are prepared for {side} ({file}); {way_out}")
    args.resolution, args.aspect_ratio_buckets = [side], buckets
    say(f"buckets as prepared: {file}")


def check_sizes(args: argparse.Namespace) -> None:
    """--resolution and --aspect_ratio_buckets: numbers that the VAE and the denoiser can divide."""
    if len(args.resolution) > 2:
        raise UserError("--resolution takes one number, or width and height")
    for side in args.resolution:
        if side % PIXEL_DIVISOR:
            raise UserError(f"--resolution {side} is not divisible by {PIXEL_DIVISOR}")
    for pair in [] if args.aspect_ratio_buckets in (None, "auto") else args.aspect_ratio_buckets.split(";"):
        sides = [int(side) if side.strip().isdecimal() else 0 for side in pair.split(",")]
        if len(sides) != 2 or not all(side and side % PIXEL_DIVISOR == 0 for side in sides):
            what = f'{pair!r} is no "height,width" of multiples of {PIXEL_DIVISOR}'
            raise UserError(f'--aspect_ratio_buckets: {what}; or use "auto"')


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line that names the flag and the nearest known one."""

    def error(self, message: str) -> None:
        if message.startswith("unrecognized arguments:"):
            wrong = message.split(":", 1)[1].strip().split(" ")[0].split("=")[0]
            near = self.nearest(wrong, cutoff=0.5)
            message = f"unknown flag {wrong}" + (f"; did you mean {near}?" if near else "; --help lists all flags")
        raise SystemExit(fail(message, 2))

    def nearest(self, wrong: str, cutoff: float) -> str | None:
        """The flag that other trainers call so, else the one of nearest spelling; never a hidden one."""
        known = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        near = difflib.get_close_matches(wrong, known, n=1, cutoff=cutoff)
        return NAMES_ELSEWHERE.get(wrong.lstrip("-")) or (near[0] if near else None)


def number(name: str, kind: type, least: float, most: float, complaint: str):
    """A type for argparse, which names it in its errors: a number from `least` to `most`."""

    def convert(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} {complaint}")
        return value

    convert.__name__ = name
    return convert


count = number("count", int, 1, 2**31 - 1, "is below 1, or beyond what any run needs")
natural = number("whole number", int, 0, 2**31 - 1, "must not be negative, or beyond what any run needs")
share = number("share", float, 0, 1, "is not between 0 and 1")
part_of_one = number("share", float, 0, math.nextafter(1, 0), "is not from 0 up to, but without, 1")
rate = number("learning rate", float, 0, 100, "is not between 0 and 100")
amount = number("amount", float, 0, 1e9, "is not a number from 0 to 1e9")
signed = number("number", float, -100, 100, "is not a number between -100 and 100")
mode_scale = number("scale", float, 0, 1.75, "is not between 0 and 1.75: beyond, timesteps leave their range")
tokens = number("count", int, 1, 512, "is not between 1 and the 512 tokens that the pipeline takes")


OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adafactor", "schedulefree")


def optimizer_name(text: str) -> str:
    """One of OPTIMIZERS in small letters, or a dotted name as it is."""
    if "." not in text and text.lower() not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(
            f"{text} is none of {', '.join(OPTIMIZERS)}; others take a dotted name, such as torch.optim.RAdam"
        )
    return text if "." in text else text.lower()


def key_and_value(text: str) -> tuple[str, object]:
    """key=value -> (key, the value as Python means it, else as text)."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"--optimizer_args {text} is not key=value")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def yes_or_no(text: str) -> bool:
    """true/false, as people write it."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text} is neither true nor false")
    return words[text.lower()]


PROMPT_KEYS = {  # of --validation_prompts_file: kohya's letter, the flag that it stands for, type
    "prompt": ("", "prompt", str),
    "negative_prompt": ("n", "negative_prompt", str),
    "width": ("w", "width", count),
    "height": ("h", "height", count),
    "seed": ("d", "sample_seed", natural),
    "steps": ("s", "validation_inference_steps", count),
    "guidance": ("l", "validation_guidance_scale", amount),
    "lora_scale": ("", "lora_scale", amount),
}


def read_prompts(file: str) -> list[dict]:
    """The prompts of --validation_prompts_file, each with its settings (PROMPT_KEYS). Errors: UserError that names the entry."""
    letters = {letter: key for key, (letter, *_) in PROMPT_KEYS.items() if letter} | {"g": "guidance"}
    if file.lower().endswith((".yaml", ".yml", ".json")):
        entries = [
            {"prompt": e} if isinstance(e, str) else e for e in read_config(file, "--validation_prompts_file", list)
        ]
    else:
        lines = [line.strip() for line in read_text(file, "--validation_prompts_file").splitlines()]
        pieces = [re.split(r"\s--(\w+)\s+", line) for line in lines if line and not line.startswith("#")]
        entries = [
            {"prompt": p[0]} | {letters.get(k, k): v for k, v in zip(p[1::2], p[2::2], strict=True)} for p in pieces
        ]
    for number, entry in enumerate(entries, 1):
        where = f"--validation_prompts_file {file}, prompt {number}"
        if not isinstance(entry, dict) or not str(entry.get("prompt") or "").strip():
            raise UserError(f"{where}: has no prompt")
        for key, value in entry.items():
            if key not in PROMPT_KEYS:
                raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(PROMPT_KEYS)}")
            try:
                entry[key] = PROMPT_KEYS[key][2](str(value))
            except (ValueError, argparse.ArgumentTypeError):
                raise UserError(f"{where}: {key} {value!r} is no {PROMPT_KEYS[key][2].__name__}") from None
            if key in ("width", "height") and entry[key] % PIXEL_DIVISOR:
                raise UserError(f"{where}: {key} {value} is not divisible by {PIXEL_DIVISOR}")
    if not entries:
        raise UserError(f"--validation_prompts_file {file}: no prompt in it")
    return entries


def config_words(parser: argparse.ArgumentParser, values: dict, where: str) -> list[str]:
    """Keys and values of a --config file as command-line words.

    Errors: UserError that says where, if a key is no flag (the nearest is named), or has a value of another kind.
    """
    tokens = []
    for key, value in values.items():
        flag = f"--{key}"
        action = parser._option_string_actions.get(flag)
        if action is None or flag == "--config":
            near = parser.nearest(flag, cutoff=0.0).lstrip("-")
            raise UserError(f"{where}: unknown key {key!r}; the nearest is {near!r}")
        if value is False and "no" in (action.choices or ()):
            value = "no"  # as YAML reads it without quotes
        flat = isinstance(value, list) and action.nargs in ("+", "*")
        if any(isinstance(v, list | dict) for v in (value if flat else [value])):
            what = "values in one list" if action.nargs in ("+", "*") else "one value"
            raise UserError(f"{where}: {key} takes {what}, and not {brief(value)}")
        if isinstance(action, argparse._StoreTrueAction):
            if not isinstance(value, bool):
                raise UserError(f"{where}: {key} must be true or false, not {value!r}")
            tokens += [flag] if value else []
        elif isinstance(value, bool) and action.type is None:
            raise UserError(f"{where}: {key} takes text: put {str(value).lower()} in quotes if it's meant as such")
        elif flat:
            tokens += [flag, *(str(v) for v in value)]
        elif value is not None:
            tokens.append(f"{flag}={value}")
    return tokens


def read_config(file: str, flag: str = "--config", kind: type = dict):
    """The content of a YAML or JSON file, a dict or a list. Errors: UserError that names the flag if it is anything else."""
    text = read_text(file, flag)
    import yaml

    try:
        values = yaml.safe_load(text)  # JSON is YAML too
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none; lists in lists in lists
        raise UserError(f"{flag} {file}: not YAML or JSON: {brief(error)}") from None
    if not isinstance(values, kind):
        expected = "flag names and values" if kind is dict else "a list"
        raise UserError(f"{flag} {file}: expected {expected}, found {type(values).__name__}")
    return values


def read_text(file: str, flag: str) -> str:
    """The text of a file that a flag names."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {file}: {getattr(error, 'strerror', error)}") from None


# ---- base model: loading, quantising, splitting ----------------------------------------------------------------------


class Components:
    """The parts of a base, each loaded when it is first asked for and freed when nothing needs it any more.

    sharded: the frozen denoiser is split over the processes (FSDP2), each part whole on every GPU only while it works.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, dtype, device, sharded: bool = False) -> None:
        self.folder, self.args, self.dtype, self.device, self.sharded = folder, args, dtype, device, sharded
        self.index = read_json(folder / "model_index.json")
        self.index |= dict.fromkeys(n for flag, names in DROPPED_PARTS.items() if vars(args)[flag] for n in names)
        self.loaded: dict[str, object] = {}
        self.configs: dict[str, dict] = {}
        self.own_vae = not args.pretrained_vae_model_name_or_path
        self.vae_folder = folder / "vae" if self.own_vae else self.resolve_vae(args.pretrained_vae_model_name_or_path)
        if not self.own_vae and not self.has("vae"):
            self.index["vae"] = ["diffusers", "AutoencoderKL"]

    def resolve_vae(self, name: str) -> Path:
        """The folder of --pretrained_vae_model_name_or_path."""
        for path in (Path(name), Path(name) / "vae"):
            if (path / "config.json").is_file():
                return path
        if Path(name).exists() or name.startswith((".", "/", "~")):
            raise UserError(f"--pretrained_vae_model_name_or_path {name}: no config.json of a VAE there")
        return download(name, "--pretrained_vae_model_name_or_path", ["config.json", "*.safetensors"], self.args)

    def has(self, name: str) -> bool:
        """Whether the base has the part at all: SD3 comes without its T5, too."""
        return self.index.get(name) not in (None, [None, None])

    def folder_of(self, name: str) -> Path:
        """Where a part's files are."""
        return self.vae_folder if name == "vae" else self.folder / name

    def config(self, name: str) -> dict:
        """A part's configuration, without loading its weights."""
        if name not in self.configs:
            file = self.folder_of(name) / ("scheduler_config.json" if name == "scheduler" else "config.json")
            self.configs[name] = read_json(file)
        return self.configs[name]

    def identity(self, name: str) -> str:
        """A hash of a part's weights and configuration, for cache keys."""
        suffixes = (".safetensors", ".json", ".txt", ".model")
        with reading_base(name):
            return fingerprint(sorted(f for f in self.folder_of(name).iterdir() if f.suffix in suffixes))

    def get(self, name: str, dtype=None, device=None):
        """The part `name`, loaded in `dtype` (default: the base's) onto the device (default: the run's)."""
        if name in self.loaded:
            return self.loaded[name]
        folder, variant = self.folder_of(name), self.args.variant
        with reading_base(name):
            kind = library_class(*self.index[name])
            if "tokenizer" in name:
                part = kind.from_pretrained(folder)
                if "CLIP" in kind.__name__ and part.model_max_length > 1000:
                    raise ValueError("its configuration has no model_max_length")
            elif name == "scheduler":
                part = self.adjusted(kind.from_pretrained(folder))
            else:
                if variant and not any(variant in f.name for f in folder.iterdir()):
                    variant = None  # a part that comes in one precision only
                with waiting(f"loading {name}"):
                    part = kind.from_pretrained(folder, variant=variant, dtype=dtype or self.dtype)
                files = [safe_open(file, framework="pt") for file in folder.glob("*.safetensors")]
                stored = sum(math.prod(f.get_slice(key).get_shape()) for f in files for key in f.keys())  # noqa: SIM118
                missing = sum(p.numel() for p in part.parameters()) - stored
                if files and missing > 0:  # the libraries would draw them at random
                    raise UserError(f"{missing:,} of its weights are missing")
            if "tokenizer" not in name and name != "scheduler":
                part = part.requires_grad_(False).eval().to(device or self.device)
        self.loaded[name] = part
        return part

    def adjusted(self, scheduler):
        """The base's scheduler as --prediction_type and --rescale_betas_zero_snr want it."""
        changes = {k: v for k in ("prediction_type", "rescale_betas_zero_snr") if (v := vars(self.args).get(k))}
        kind = type(scheduler)
        if "rescale_betas_zero_snr" in changes:
            changes["timestep_spacing"] = "trailing"  # so that pictures begin where the signal is zero
            kind = kind if "rescale_betas_zero_snr" in scheduler.config else library_class("diffusers", "DDIMScheduler")
        return kind.from_config(scheduler.config, **changes) if changes else scheduler

    def training_scheduler(self):
        """The scheduler whose noise is trained on."""
        return library_class("diffusers", TRAINING_SCHEDULER).from_config(self.get("scheduler").config)

    def free(self, *names: str) -> None:
        """Drops parts and gives their memory back."""
        from diffusers.training_utils import free_memory

        for name in names:
            self.loaded.pop(name, None)
        free_memory()

    def vae(self):
        """The VAE, in float32 where the base's own overflows in half precision."""
        vae = self.get("vae", torch.float32 if VAE_FLOAT32 and self.own_vae else None)
        vae.enable_slicing()
        return vae

    def pipeline(self, denoiser):
        """A pipeline for prompt embeddings that are already there: no text encoder in it."""
        texts = dict.fromkeys(name for pair in TEXT_ENCODERS.values() for name in pair)
        parts = {DENOISER: denoiser, "vae": self.vae(), "scheduler": self.get("scheduler")}
        pipeline = library_class("diffusers", PIPELINE_CLASS)(**parts, **texts, **PIPELINE_OPTIONS)
        steps = {"desc": "steps", "delay": 2, "leave": False}  # of pictures that take long
        pipeline.set_progress_bar_config(disable=QUIET or not sys.stderr.isatty(), **steps)
        return pipeline

    def denoiser(self):
        """The frozen denoiser, quantised and with blocks swapped as --quantize_base and --blocks_to_swap say."""
        args, fresh = self.args, DENOISER not in self.loaded
        home = torch.device("cpu") if self.sharded or args.blocks_to_swap else self.device
        if args.quantize_base and fresh:
            place = (self.folder / DENOISER, args.quantize_base, self.dtype, self.device, args.variant, home)
            with reading_base(DENOISER):
                self.loaded[DENOISER] = load_quantized(library_class(*self.index[DENOISER]), *place)
        denoiser = self.get(DENOISER, device=home)
        if args.blocks_to_swap and fresh:
            swap_blocks(denoiser, args.blocks_to_swap, self.device)
        if args.enable_xformers_memory_efficient_attention:
            denoiser.enable_xformers_memory_efficient_attention()
        return denoiser


@contextlib.contextmanager
def reading_base(what: str):
    """Names the part of the base that can't be read. What the libraries raise then, of a dozen kinds, means damaged files."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error) or str(error).startswith("--"):
            raise
        raise UserError(
            f"--pretrained_model_name_or_path: {what} can't be loaded: {brief(error) or type(error).__name__}"
        ) from None


def read_json(file: Path) -> dict:
    """A JSON object of the base. Errors: UserError that names the file."""
    with reading_base(str(file)):
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
        return Configuration(found)


class Configuration(dict):
    """A part's settings, of which one that is missing means that they are damaged, or another part's."""

    def __missing__(self, name: str):
        raise UserError(f"--pretrained_model_name_or_path: a configuration of this base has no {name}")


def resolve_base(args: argparse.Namespace) -> Path:
    """The local diffusers folder of the base: as given, downloaded from the hub, or unpacked from a single file."""
    name = args.pretrained_model_name_or_path
    path, folders = Path(name), [DENOISER, *(folder for pair in TEXT_ENCODERS.values() for folder in pair)]
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"--pretrained_model_name_or_path {name}: no model_index.json in this folder")
        index = read_json(path / "model_index.json")
        if not index.keys() >= set(folders):
            kind = index.get("_class_name")
            raise UserError(f"--pretrained_model_name_or_path {name} is a {kind}, not {FAMILY_TITLE}")
        return path
    if path.is_file():
        return unpack_single_file(path, args)
    if path.suffix in (".safetensors", ".ckpt") or name.startswith((".", "/", "~")):
        raise UserError(f"--pretrained_model_name_or_path {name}: no such file or folder")
    variant = f".{args.variant}" if args.variant else ""
    endings = (".json", ".txt", ".model", f"{variant}.safetensors", f"{variant}*-of-*.safetensors")
    wanted = [f"{folder}/*{end}" for folder in (*folders, "vae", "scheduler") for end in endings]
    return download(name, "--pretrained_model_name_or_path", ["model_index.json", *wanted], args)


def download(name: str, flag: str, wanted: list[str], args: argparse.Namespace) -> Path:
    """The local folder of a repository of the hub with the wanted files. Errors: UserError that names the flag."""
    from huggingface_hub import snapshot_download

    revision = args.revision if flag == "--pretrained_model_name_or_path" else None
    try:
        with waiting(f"downloading {name}"):
            return Path(snapshot_download(name, revision=revision, cache_dir=args.cache_dir, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises a dozen kinds; all mean that it is not to be had
        raise UserError(f"{flag} {name}: neither a local path nor to be had from the hub ({brief(error)})") from None


def unpack_single_file(path: Path, args: argparse.Namespace) -> Path:
    """Converts a .safetensors or .ckpt checkpoint to a diffusers folder, once; pickled code is never run.

    What the checkpoint lacks (configurations, tokenizers, and whole parts, such as FLUX.1's text encoders) comes from a
    diffusers folder in which the file lies, else from the hub.
    """
    cache = Path(args.cache_dir or Path.home() / ".cache" / "lora_training") / f"{path.stem}-{fingerprint([path])[:20]}"
    if (cache / "model_index.json").is_file():
        return cache
    surrounded = (path.parent / "model_index.json").is_file()
    options = {"config": str(path.parent), "local_files_only": True} if surrounded else {}
    if path.stat().st_size > 8 << 30:  # float32, which the reader makes of everything, would be twice the file
        options["dtype"] = torch.bfloat16
    try:
        given = parts_with_weights(path.parent) if surrounded else {}
        with waiting(f"unpacking {path.name}, once"):
            pipeline = library_class("diffusers", PIPELINE_CLASS).from_single_file(str(path), **options, **given)
    except Exception as error:  # conversion fails in many ways, all of them the file's or the layout's
        advice = "; without network, scripts/bases/unpack_checkpoint.py makes a diffusers folder of it"
        problem = f"can't be read as {FAMILY_TITLE} ({brief(error)}){'' if surrounded else advice}"
        raise UserError(f"--pretrained_model_name_or_path {path}: {problem}") from None
    if marks := velocity_marks(path):
        pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **marks)
    part = cache.with_name(cache.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part)
    rename(part, cache)
    return cache


def velocity_marks(path: Path) -> dict:
    """What the scheduler of a single file that predicts velocity needs. Such files (NoobAI's and those trained from it) say so
    by an empty tensor `v_pred`, and `ztsnr` for a schedule that ends without signal, or in SAI's metadata.
    """
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata() or {}
    said = {metadata.get(f"modelspec.{key}", "").lower() for key in ("prediction_type", "predict_key")}
    marks = {"prediction_type": "v_prediction"} if "v_pred" in names or said & {"v", "v_prediction"} else {}
    return marks | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "ztsnr" in names else {})


def parts_with_weights(folder: Path) -> dict[str, object]:
    """The parts but the denoiser whose weights a diffusers folder has, on the CPU in their own precision."""
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    names = [name for name in index if name != DENOISER and any((folder / name).glob("*.safetensors"))]
    return {name: library_class(*index[name]).from_pretrained(folder / name) for name in names}


def library_class(library: str, name: str):
    """A class that a model_index.json names, of diffusers or transformers."""
    return getattr(importlib.import_module(library), name)


def fingerprint(files: list[Path]) -> str:
    """A hash of weight files' sizes and of 64 stretches of 64 KiB of each: enough to tell any two trainings apart."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size}|".encode())
        with file.open("rb") as stream:
            for k in range(64 if size > 65536 else 1):
                stream.seek(max(0, (size - 65536) * k // 63))
                digest.update(stream.read(65536))
    return digest.hexdigest()


def shard_base(denoiser, device) -> None:
    """Splits the frozen weights over all processes, block by block; the LoRA's stay whole on each.

    A block's weights are gathered when it works and dropped after, forwards and backwards: FSDP2 of
    https://arxiv.org/abs/2304.11277 without its gradients, because nothing that is sharded is trained.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # of in-place changes; the models make none
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trained = {p for p in denoiser.parameters() if p.requires_grad}
    for parameter in trained:
        parameter.data = parameter.data.to(device)
    for name in block_prefixes(denoiser):
        fully_shard(denoiser.get_submodule(name), mesh=mesh, ignored_params=trained)
    fully_shard(denoiser, mesh=mesh, ignored_params=trained)


# ---- the machine -----------------------------------------------------------------------------------------------------


def choose_precision(args: argparse.Namespace, device) -> str:
    """The frozen base's precision, said with the device in one line. What a preset or the launcher's configuration wants is a
    wish, and becomes what the machine can do; --mixed_precision on the command line is an order. Errors: UserError.
    """
    kind, order = device.type, "mixed_precision" in args.ordered
    # `able`: what it does well, first what a wish for another becomes; `never`: what it can't do at all
    name, able, never = f"CPU, {torch.get_num_threads()} threads", ["no", "bf16"], "fp16"
    if kind in ("cuda", "xpu"):
        library, hip = getattr(torch, kind), torch.version.hip
        # older GPUs compute bf16 in a roundabout way, which is for what overflows in fp16
        able, never = [*["bf16"] * library.is_bf16_supported(including_emulation=PREDICTS_FLOW), "fp16", "no"], None
        system = "XPU" if kind == "xpu" else f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}"
        name = f"{library.get_device_name(device)}, {system}"
    elif kind == "mps":
        old = not torch.backends.mps.is_macos_or_newer(14, 0)
        able = ["bf16", "no"] if not old else ["no"] if PREDICTS_FLOW else ["fp16", "no"]
        name, never = "Apple GPU, MPS", "bf16" if old else None
    elif shutil.which("nvidia-smi") and not torch.version.cuda:
        say(f"warning: torch {torch.__version__} is built for the CPU, and an NVIDIA GPU is there: see pytorch.org")
    usual = able[0] if kind == "mps" else "no"  # most of a Mac's memory would be the frozen base's
    chosen = wanted = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", usual)
    if wanted == "fp16" and PREDICTS_FLOW:
        say(f"{FAMILY_TITLE} overflows in fp16: using bf16")
        chosen = wanted = "bf16"
    if order and wanted == never:
        instead = " or ".join(p for p in ("bf16", "fp16", "no") if p != never)
        raise UserError(f"--mixed_precision {wanted} can't be done here ({name}): use {instead}")
    if not order and wanted not in able:
        chosen = able[0]
    why = "" if chosen == wanted else f", for {wanted} is not this machine's"
    say(f"machine: {name}; the frozen base in {str(torch_dtype(chosen)).removeprefix('torch.')}{why}")
    return chosen


def try_kernels(args: argparse.Namespace, device) -> None:
    """Tries on a few numbers what not every machine has kernels for, before anything is loaded. Errors: UserError; but what a
    preset asked for and is only faster or smaller is done without, which is said.
    """
    base, dtype = args.quantize_base, torch_dtype(args.mixed_precision)
    few = functools.partial(torch.zeros, 64, 64, device=device, dtype=dtype)

    def one_step() -> None:
        part = Part("trial", {"weights": torch.nn.Parameter(few().float())}, 1e-3, 0.0, 1)
        part.allocate()
        make_optimizer(part, args).step()

    def compiler() -> None:
        if device.type == "cuda":
            importlib.import_module("triton")
        else:
            importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()

    for name, value, wanted, trial, instead in (
        ("quantize_base", base, base, lambda: product(FrozenLinear(few(), None, base, dtype), few()), None),
        ("optimizer", args.optimizer, args.optimizer == "adamw8bit", one_step, "adamw"),
        ("optimizer_args", "", bool(args.optimizer_args), one_step, None),  # which a class may take, and not its step
        ("compile", "", args.compile, compiler, False),
    ):
        try:
            if wanted:
                trial()
        except Exception as error:  # whatever is missing: a package, its library, a kernel, a type of numbers
            why = f"is not possible on this machine ({device.type}: {brief(error)[:160]})"
            problem = " ".join([f"--{name}", *[value] * bool(value), why])
            if instead is None or {name, "use_8bit_adam"} & args.ordered:
                raise UserError(f"{problem}: leave it out") from None
            setattr(args, name, instead)
            say(f"{problem}: done without")


def peak_memory(device) -> int:
    """The most bytes that the run has held so far: of the GPU's memory or, on the CPU, of the process."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).max_memory_reserved()
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()  # what is held now, and Metal gives little back
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- errors, lines, seeds, libraries ---------------------------------------------------------------------------------


class UserError(Exception):
    """A mistake that a person can mend; ends the program with its message as one line and exit code 2."""


class Interrupted(BaseException):
    """Ends the program where nothing is wrong, with an exit code and lines to say. No handler of errors catches it."""


QUIET = int(os.environ.get("RANK", "0")) > 0  # the first process alone prints


def fail(why: str, code: int) -> int:
    """Says why the run ends. Beside a first process that says it too, the launcher ends this one while it waits."""
    number, StopSignal.raised = StopSignal.raised, 0
    if int(os.environ.get("RANK", "0")) > 0:
        time.sleep(10)
    if number:
        say(f"stopped at once by {signal.Signals(number).name}")
        return 128 + number
    print(f"{Path(sys.argv[0]).name}: error: {why}", file=sys.stderr)
    return code


def say(text: str) -> None:
    """Prints a line above the bars; in a log file, below them."""
    if QUIET:
        return
    with waiting.get_lock():
        bars, terminal = [bar for bar in waiting.shown if bar.drawn], sys.stderr.isatty()
        for bar in bars:
            bar.clear(nolock=True) if terminal else bar.fp.write("\n")
            bar.drawn = False
        print(text, flush=True)
        for bar in bars if terminal else []:
            bar.refresh(nolock=True)


class waiting(tqdm):
    """A bar on the first process for what takes more than two seconds; without a total, the time that has passed.

    A thread keeps the time moving while the work itself is silent, in a log file every 15 seconds. options: tqdm's.
    """

    noticed, shown, mover = 2.0, [], None  # seconds until a wait is noticed; all bars; the thread
    drawn = False  # whether this one is in sight

    def __init__(self, what: str, total: int | None = None, **options) -> None:
        terminal = sys.stderr.isatty()
        self.pause = self.noticed / 2 if terminal else 15
        options = {"delay": self.noticed, "leave": not terminal, "mininterval": self.pause / 2} | options
        form = {} if total else {"bar_format": "{desc} {elapsed}"}
        columns, lines = shutil.get_terminal_size()  # tqdm draws nothing in one without, as some containers have
        form |= {"ncols": columns, "nrows": lines} if terminal else {"position": 0}  # a log file has no way back up
        super().__init__(desc=what, total=total, disable=QUIET, **form, **options)
        if not self.disable:
            import threading

            self.due = time.time() + options["delay"]
            if waiting.mover is None or not waiting.mover.is_alive():  # threads don't outlive a fork
                waiting.mover = threading.Thread(target=keep_moving, daemon=True)
                waiting.mover.start()
            self.shown.append(self)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Draws the bar."""
        self.drawn, self.due = True, time.time() + self.pause
        return super().display(msg, pos)

    def close(self) -> None:
        """Takes the bar away."""
        self.shown[:] = [bar for bar in self.shown if bar is not self]  # tqdm's are equal in the same place
        if self.drawn:
            self.last_print_t = time.time()  # so that tqdm knows, too
        super().close()


def keep_moving() -> None:
    """Draws bars again that have stood still, for ever."""
    while True:
        time.sleep(min(0.25, waiting.noticed / 8))
        with waiting.get_lock():
            for bar in [bar for bar in waiting.shown if time.time() >= bar.due]:
                bar.refresh(nolock=True)


def brief(error: object) -> str:
    """The beginning of an error's message, as one line."""
    return " ".join(str(error).split())[:300]


def torch_dtype(precision: str | None):
    """fp16 and bf16 as torch's types; anything else is float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def stable_seed(*place: object) -> int:
    """A 63-bit seed that depends on nothing but its arguments: (seed, what is drawn, where it happens)."""
    digest = hashlib.sha256("|".join(str(p) for p in place).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def import_libraries(models: bool = True) -> None:
    """Imports what is slow to import (5 to 10 s) into this module, once the arguments are known to be right.

    models: also what models need, and not only pictures and tensors.
    """
    global torch, F, safe_open, save_file, SafetensorError
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import_image_libraries()
    import torch
    import torch.nn.functional as F
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    if models:
        import_logging_quietly()
        import accelerate  # noqa: F401  (now, where the wait is shown)
        import peft  # noqa: F401

        define_layers()


def import_image_libraries() -> None:
    """The part of `import_libraries` that reading pictures and captions needs (0.2 s)."""
    global np, Image, ImageCms, ImageEnhance, ImageOps, PngImagePlugin
    import numpy as np
    from PIL import Image, ImageCms, ImageEnhance, ImageOps, PngImagePlugin

    # of large pictures, odd metadata, and what a damaged base draws
    warnings.filterwarnings("ignore", module=r"PIL\.|diffusers\.image_processor")


def import_logging_quietly() -> None:
    """Imports the model libraries with progress bars and advice below the level of a warning turned off."""
    import logging

    for name in ("accelerate", "bitsandbytes", "diffusers.quantizers.bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import diffusers
    import huggingface_hub
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # downloads are long, and transformers has just switched theirs off too


if __name__ == "__main__":
    sys.exit(main())
