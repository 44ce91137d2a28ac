"""Bases of Stable Diffusion and FLUX.1 for a training loop of one's own: loaded with a LoRA, and drawn with.

    from lora import generate, preload_models_with_lora

    models = preload_models_with_lora("v1-5-pruned-emaonly.ckpt", "cuda", lora_rank=8)
    generate("a landscape", models, seed=1).save("landscape.png")

lora.py has LoRA itself. This needs diffusers as well and, for a checkpoint file, the library lora_training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image


def preload_models_with_lora(
    ckpt_path: str | Path,
    device: str | torch.device = "cpu",
    lora_rank: int = 4,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    apply_to_diffusion: bool = True,
    apply_to_clip: bool = False,
) -> dict[str, object]:
    """A base's models with a LoRA in the denoiser, the CLIP text encoders, both or none.

    ckpt_path: a diffusers folder, or a .safetensors or .ckpt checkpoint of SD 1.x/2.x, SDXL, SD3 or FLUX.1
    (code in a .ckpt is not run). The result has the names of diffusers' pipelines ("unet", "vae",
    "text_encoder", "tokenizer", …), and "diffusion", "clip", "encoder", "decoder" and "pipeline" for the same
    models. Errors: ValueError for what is no base.
    """
    import diffusers

    from lora import apply_lora_to_model

    folder = Path(ckpt_path)
    if folder.is_file():
        folder = unpack_checkpoint(folder)
    elif not (folder / "model_index.json").is_file():
        raise ValueError(f"{ckpt_path}: neither a checkpoint nor a diffusers folder")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True).to(device)
    models = dict(pipeline.components)
    models["diffusion"] = models.get("unet") or models["transformer"]
    models["clip"], vae = models["text_encoder"], models["vae"]
    models |= {"encoder": vae.encoder, "decoder": vae.decoder, "pipeline": pipeline}
    text_encoders = [model for name, model in models.items() if name.startswith("text_encoder")]
    clips = [model for model in text_encoders if type(model).__name__.startswith("CLIP")]
    for module in models.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    for model in [models["diffusion"]] * apply_to_diffusion + clips * apply_to_clip:
        apply_lora_to_model(model, lora_rank, lora_alpha, lora_dropout)
    return models


load_models = preload_models_with_lora


def generate(
    prompt: str,
    models: Mapping,
    uncond_prompt: str = "",
    do_cfg: bool = True,
    cfg_scale: float = 7.5,
    n_inference_steps: int = 50,
    seed: int | None = None,
    **options,
) -> Image.Image:
    """A picture drawn with a base's models, with the LoRAs that are switched on.

    models: of preload_models_with_lora. uncond_prompt: what should not be in it. do_cfg: with guidance of
    cfg_scale. seed: the same, the same picture. options: more of the pipeline's, such as width and height.
    """
    if uncond_prompt:
        options["negative_prompt"] = uncond_prompt
    options |= {"guidance_scale": cfg_scale if do_cfg else 1.0, "num_inference_steps": n_inference_steps}
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return models["pipeline"](prompt, generator=generator, **options).images[0]


def unpack_checkpoint(checkpoint: Path) -> Path:
    """The diffusers folder that is made of a checkpoint, once. Errors: ValueError."""
    from lora_training.base_model.family_detection import require_family
    from lora_training.base_model.sources import unpack_single_file
    from lora_training.errors import UserError
    from lora_training.families import FAMILIES

    try:
        return unpack_single_file(checkpoint, FAMILIES[require_family(str(checkpoint))])
    except UserError as error:
        raise ValueError(str(error)) from None


def denoiser_without_weights(folder: str | None) -> torch.nn.Module:
    """The denoiser of a diffusers folder, or of Stable Diffusion 1.5, on the meta device.

    Errors: ValueError for another folder.
    """
    import diffusers

    config = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}  # SD 1.5
    if folder is not None:
        files = [Path(folder) / name / "config.json" for name in ("unet", "transformer")]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise ValueError(f"{folder}: not a diffusers folder with a unet or transformer")
        config = json.loads(file.read_text(encoding="utf-8"))
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)
