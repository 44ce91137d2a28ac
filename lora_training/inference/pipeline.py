"""The base's pipeline: loaded quietly and checked, its VAE and scheduler exchanged, placed on the device."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import logging
import logging.handlers
import os
import re
import sys
from pathlib import Path

import diffusers
import torch
import transformers

from lora_training.console import print_status
from lora_training.data.checks import find_cut_texts
from lora_training.errors import UserError, is_out_of_memory, one_line
from lora_training.families import FAMILIES
from lora_training.inference.settings import list_prompts
from lora_training.libraries import import_model_libraries


def silence_libraries() -> None:
    """Imports what pipelines need, which takes seconds, and shows no logs of these libraries.

    What goes wrong is raised as well.
    """
    import_model_libraries()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)


def load_base(base: str, shown_name: str, dtype: torch.dtype, **options):
    """The pipeline of a diffusers folder or hub id, on the CPU. options: as `from_pretrained` takes them.

    Errors: UserError with `shown_name` for a base that can't be loaded or isn't whole.
    """
    with record_warnings() as records:
        try:
            pipeline = diffusers.DiffusionPipeline.from_pretrained(base, dtype=dtype, **options)
        except Exception as error:  # a damaged folder: both libraries raise whatever comes
            if is_out_of_memory(error):
                raise
            problem = f"can't be loaded: {one_line(error)}"
            raise UserError(f"paths.base_model_path: {shown_name} {problem}") from None
    check_whole(pipeline, shown_name, records)
    return pipeline


@contextlib.contextmanager
def record_warnings():
    """Gives a list that gets what transformers logs while it loads, such as weights that it made up."""
    log, handler = logging.getLogger("transformers.modeling_utils"), logging.handlers.BufferingHandler(1000)
    log.setLevel(logging.WARNING)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield handler.buffer
    finally:
        log.removeHandler(handler)


def check_whole(pipeline, base: str, log_records: list[logging.LogRecord]) -> None:
    """Refuses what would draw wrongly: a part without vocabulary, or with weights made up as the log says."""
    messages = [record.getMessage() for record in log_records]
    incomplete = [re.findall(r"([A-Z]\w+) LOAD REPORT", text)[0] for text in messages if "MISSING" in text]
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer") and part is not None and not knows_words(part):
            raise UserError(f"paths.base_model_path: {base}: {name} has no vocabulary or no configuration")
        if hasattr(part, "parameters") and any(p.is_meta for p in part.parameters()):
            incomplete.append(name)
    if incomplete:
        raise UserError(f"paths.base_model_path: {base}: some weights of {incomplete[0]} are missing")


def knows_words(tokenizer) -> bool:
    """Whether a tokenizer has a vocabulary and a length."""
    length = tokenizer.model_max_length
    if not isinstance(length, int) or length > 10**6:  # beyond: the value that stands for none
        return False
    return tokenizer.unk_token_id not in tokenizer("a", add_special_tokens=False).input_ids


def load_vae(name: str, dtype: torch.dtype):
    """Another VAE, from a file, a folder of its own, a pipeline's folder or the hub. Errors: UserError."""
    try:
        if Path(name).is_file():
            return diffusers.AutoencoderKL.from_single_file(name, torch_dtype=dtype)
        in_pipeline = (Path(name) / "vae" / "config.json").is_file()
        options = {"subfolder": "vae"} if in_pipeline else {}
        return diffusers.AutoencoderKL.from_pretrained(name, dtype=dtype, **options)
    except Exception as error:  # as for the base
        key = "paths.pretrained_vae_model_name_or_path"
        raise UserError(f"{key}: {name} can't be loaded: {one_line(error)}") from None


def quantization_config(kind: str, dtype: torch.dtype):
    """diffusers' configuration for a denoiser in nf4 or int8."""
    options = {"load_in_8bit": True}
    if kind == "nf4":
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    return diffusers.PipelineQuantizationConfig(
        quant_backend=f"bitsandbytes_{'4' if kind == 'nf4' else '8'}bit",
        quant_kwargs=options,
        components_to_quantize=["unet", "transformer"],
    )


def change_scheduler(pipeline, settings) -> None:
    """Exchanges or adjusts the scheduler as the settings say. Errors: UserError for one of no use here."""
    keys = ("prediction_type", "rescale_betas_zero_snr")
    changes = {key: getattr(settings, key) for key in keys if getattr(settings, key) is not None}
    if not settings.scheduler and not changes:
        return
    kind = type(pipeline.scheduler)
    if settings.scheduler:
        kind = scheduler_class(settings.scheduler, kind.__name__)
    try:
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
    except (
        TypeError,
        ValueError,
        ImportError,
    ) as error:  # one for other models, or that needs another package
        raise UserError(f"scheduler: {kind.__name__} can't be used here: {one_line(error)}") from None


def scheduler_class(name: str, current: str):
    """A scheduler of diffusers by its name, upper case or not. current: the base's, of the same kind.

    Errors: UserError for an unknown one, or one that the base can't use.
    """
    names = [n for n in dir(diffusers) if n.endswith("Scheduler")]
    matches = [n for n in names if n.lower() in (name.lower(), name.lower() + "scheduler")]
    if not matches:
        near = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.2))
        raise UserError(f"scheduler: {one_line(name, 80)} is not in diffusers; near it are {near}")
    predicts_flow = matches[0].startswith("FlowMatch")
    if predicts_flow != current.startswith("FlowMatch"):
        target = "the flow of SD3 and FLUX.1" if predicts_flow else "noise, as in Stable Diffusion and SDXL"
        raise UserError(f"scheduler: {matches[0]} is for bases that predict {target}; this one has {current}")
    return getattr(diffusers, matches[0])


def report_cut_prompts(pipeline, settings) -> None:
    """Says which prompts are longer than the base's text encoders read; prompt_weighting reads them all."""
    if settings.prompt_weighting:
        return
    named = [family for family in FAMILIES.values() if family.pipeline_class == type(pipeline).__name__]
    negative = settings.negative_prompt or []
    prompts = list_prompts(settings) + (negative if isinstance(negative, list) else [negative])
    usual = inspect.signature(pipeline.__call__).parameters.get("max_sequence_length")
    values = {"max_token_length": settings.max_token_length}
    values["max_sequence_length"] = settings.max_sequence_length or (usual and usual.default)
    for family in named:  # one, or none for a base of another family
        parts, pairs = pipeline.components, family.text_encoders.items()
        tokenizers = {key: parts[name] for key, (name, encoder) in pairs if parts.get(encoder) is not None}
        for finding in find_cut_texts("prompts", prompts, tokenizers, family, values):
            print_status(f"warning: {finding.what}; {finding.advice}")


def device_and_dtype(settings) -> tuple[str, torch.dtype]:
    """Where and in which precision is drawn. Errors: UserError for a device that this machine hasn't."""
    available = {name: getattr(torch, name).is_available() for name in ("cuda", "mps", "xpu")} | {"cpu": True}
    device = settings.device
    if device == "auto":
        device = next(name for name, is_available in available.items() if is_available)
    if not available[device]:
        advice = "auto takes what there is"
        raise UserError(f"device: {device}: torch finds no such device on this machine; {advice}")
    if settings.offload != "none" and device == "cpu":
        reason = "moves parts from a GPU to the CPU, and there is no GPU in use"
        raise UserError(f"offload: {settings.offload} {reason}: none")
    if settings.quantize != "none" and device != "cuda":
        raise UserError(f"quantize: {settings.quantize} needs an NVIDIA GPU: none")
    if settings.dtype != "auto":
        return device, getattr(torch, settings.dtype)
    half = device in ("cuda", "xpu") or device == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)
    return device, torch.bfloat16 if half else torch.float32


def place_pipeline(pipeline, settings) -> None:
    """Compiles the denoiser, if asked for, and moves the parts to the device, or sets up their offloading."""
    device, _ = device_and_dtype(settings)
    denoiser = pipeline.unet if "unet" in pipeline.components else pipeline.transformer
    if device == "cpu" and "OMP_NUM_THREADS" not in os.environ and denoiser.num_parameters() < 5e7:
        torch.set_num_threads(1)  # a toy's threads wait for each other longer than they work
    if settings.compile:
        denoiser.compile_repeated_blocks()
    if settings.offload == "model":
        pipeline.enable_model_cpu_offload()
    elif settings.offload == "sequential":
        pipeline.enable_sequential_cpu_offload()
    else:
        pipeline.to(device)
    pipeline.set_progress_bar_config(disable=not sys.stderr.isatty(), desc="steps", position=1, leave=False)
