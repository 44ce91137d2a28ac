"""The released SD 1.5 and SDXL as folders without weights, for checkpoints that bring nothing else."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_training.base_model.reading import import_class
from lora_training.base_model.released_models import DENOISERS, OTHER_PARTS

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPTokenizer

# model_index.json beside the parts, of the families whose tokenizers a package carries
MODEL_INDEXES = {  # of model_index.json, beside the parts
    "sd15": {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": (None, None),
        "requires_safety_checker": False,
        "safety_checker": (None, None),
    },
    "sdxl": {
        "_class_name": "StableDiffusionXLPipeline",
        "feature_extractor": (None, None),
        "force_zeros_for_empty_prompt": True,
        "image_encoder": (None, None),
    },
}


def write_layout(family: str, folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Writes configurations, tokenizers and model_index.json into a folder.

    family: a key of MODEL_INDEXES. tokenizer: CLIP's, as `clip_tokenizer` makes it.
    """
    import diffusers

    index = {"_diffusers_version": diffusers.__version__} | MODEL_INDEXES[family]
    parts = {"unet": ("diffusers", *DENOISERS[family])} | OTHER_PARTS[family]
    for name, (library, kind, config) in parts.items():
        index[name] = (library, kind)
        write_config(folder / name, library, kind, config)
    for encoder in [name for name in parts if name.startswith("text_encoder")]:
        name = encoder.replace("text_encoder", "tokenizer")
        index[name] = ("transformers", "CLIPTokenizer")
        if name == "tokenizer_2":
            tokenizer.pad_token = "!"  # its padding is token 0
        tokenizer.save_pretrained(folder / name)
    text = json.dumps(dict(sorted(index.items())), indent=2)
    (folder / "model_index.json").write_text(text + "\n", encoding="utf-8")


def write_config(folder: Path, library: str, kind: str, config: dict) -> None:
    """Writes the configuration of a part, a class of diffusers or one of transformers' CLIP models."""
    import torch
    import transformers

    if library == "transformers":
        transformers.CLIPTextConfig(**config).save_pretrained(folder)
        return
    with torch.device("cpu" if kind.endswith("Scheduler") else "meta"):  # a scheduler copies its numbers
        import_class(library, kind)(**config).save_config(folder)
