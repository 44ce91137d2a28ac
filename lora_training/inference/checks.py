"""Settings that can't work, or would have no effect, refused before a library or a base is loaded."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lora_training.errors import UserError, one_line
from lora_training.families import FAMILIES
from lora_training.inference.settings import list_adapters, list_prompts
from lora_training.inference.training_files import LORA_FILE, adapter_files, path_exists, select_checkpoints
from lora_training.inference.trainings import UNET_KEYS, Training


def check_settings(settings) -> None:
    """Files and combinations that the settings name. Errors: UserError that names the key."""
    adapters = list_adapters(settings)
    for prompt in list_prompts(settings):
        if prompt.endswith(".safetensors") or path_exists(f"{prompt}/{LORA_FILE}"):
            advice = f"it comes first: infer_lora.py {prompt} --prompt …"
            raise UserError(f"prompt: {prompt} is a LoRA; {advice}")
    for key in ("base_model_path", "pretrained_vae_model_name_or_path"):
        value = getattr(settings.paths, key)
        if value and value.startswith((".", "/", "~", "assets", "output")) and not path_exists(value):
            raise UserError(f"paths.{key}: no such file or folder: {one_line(value)}")
    for path, _ in adapters:
        adapter_files(path)
    negative, prompts = settings.negative_prompt, len(list_prompts(settings))
    if isinstance(negative, list) and len(negative) != prompts:
        raise UserError(
            f"negative_prompt: {len(negative)} of them for {prompts} prompts; give one, or as many"
        )
    if not adapters and (settings.compare_base or settings.fuse or settings.checkpoints):
        raise UserError("compare_base, fuse and checkpoints need paths.lora_weights_path")
    if settings.fuse and (settings.compare_base or isinstance(settings.adapter_scale, list)):
        raise UserError("fuse bakes one scale into the base: no compare_base and no list in adapter_scale")
    if settings.quantize != "none" and settings.fuse:
        raise UserError("fuse can't be combined with quantize")
    if settings.checkpoints:
        check_checkpoints(settings, adapters)


def check_checkpoints(settings, adapters: list[tuple[str, float]]) -> None:
    """Whether checkpoints can be drawn one after the other. Errors: UserError."""
    if len(adapters) != 1:
        raise UserError("checkpoints are those of one training: give one folder in paths.lora_weights_path")
    if settings.fuse or settings.compile or settings.offload == "sequential":
        raise UserError("checkpoints are loaded one after the other: no fuse, compile or offload: sequential")
    select_checkpoints(adapters[0][0], settings.checkpoints)


def check_infer_path(settings) -> None:
    """Whether pictures can be written. Errors: UserError."""
    folder = Path(settings.paths.infer_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"paths.infer_path: {one_line(folder)} can't be written: {reason}") from None


def check_family(settings, trainings: list[Training], family: str | None) -> None:
    """Whether LoRAs and settings are for the base's family; None: another one. Errors: UserError."""
    base, title = settings.paths.base_model_path, FAMILIES[family].title if family else "another family"
    for training in trainings:
        if family and training.family not in (None, family):
            trained_for = FAMILIES[training.family].title
            raise UserError(f"{training.path} was trained for {trained_for}, but {base} is {title}")
    has_unet = family is not None and FAMILIES[family].denoiser == "unet"
    if settings.true_cfg_scale is not None and family != "flux":
        raise UserError("true_cfg_scale is for FLUX.1 alone; other families have guidance_scale")
    if settings.negative_prompt and family == "flux" and (settings.true_cfg_scale or 0) <= 1:
        raise UserError("negative_prompt has no effect on FLUX.1 without true_cfg_scale above 1")
    for key in UNET_KEYS:
        if getattr(settings, key) and not has_unet:
            raise UserError(f"{key} is for Stable Diffusion 1.x/2.x and SDXL, and {base} is {title}")
    if settings.max_sequence_length and has_unet:
        raise UserError(f"max_sequence_length is for SD3 and FLUX.1, and {base} is {title}")
