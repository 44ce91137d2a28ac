"""How a key of a LoRA file is spelled, in every spelling that people meet.

A key is a prefix, the name of a layer and what it holds of it:
`lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight`. Names are those of diffusers or of the original
checkpoint, with dots or with underscores. Which layers there are, a base says (base_layers.py). Sources: the
files of the tools, and the code with which they write them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_training.errors import UserError
from lora_training.families import FAMILIES

if TYPE_CHECKING:
    from pathlib import Path

KEY_ENDINGS = (  # (pattern, what the tensor is; "": what the pattern's group says)
    (r"\.lora_mid\.weight", "mid"),
    (r"\.(?:lora_down|lora\.down|lora_linear_layer\.down|lora_A(?:\.[\w-]+)?)\.weight|\.lora_A", "down"),
    (r"\.(?:lora_up|lora\.up|lora_linear_layer\.up|lora_B(?:\.[\w-]+)?)\.weight|\.lora_B", "up"),
    (r"\.lora_magnitude_vector(?:\.[\w-]+)?(?:\.weight)?|\.magnitude", "magnitude"),
    (r"\.dora_scale", "dora_scale"),
    (r"\.alpha", "alpha"),
    (r"\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff)", ""),
    (r"(?<=_lora)\.down\.weight|(?<=_lora[12])\.down\.weight", "down"),  # attention processors
    (r"(?<=_lora)\.up\.weight|(?<=_lora[12])\.up\.weight", "up"),
)
OTHER_ADAPTERS = (  # (part of a key, the adapter that has it and is no LoRA)
    ("oft_", "OFT"),
    ("boft", "BOFT"),
    ("on_input", "IA3"),
    ("lora_norm", "Lora with normalisations"),
    ("w_norm", "normalisation layers"),
    ("b_norm", "normalisation layers"),
    ("_norm.scale", "a control LoRA with normalisations"),
    ("lora_B.bias", "a control LoRA with biases"),
    (".diff_b", "a full difference with biases"),
    ("a1.weight", "GLoRA"),
    ("b1.weight", "GLoRA"),
    ("reshape_weight", "a LoRA that makes layers larger"),
)
ENCODER_PARTS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
T5_PARTS = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}
UNET_NAMES = "down_blocks|mid_block|up_blocks|input_blocks|output_blocks|middle_block"
PREFIXES = (  # (pattern, the pipeline's part; "t5": the family's T5, "": the denoiser)
    *((rf"{part}\.", part) for part in ("text_encoder", "text_encoder_2", "text_encoder_3")),
    *((rf"(?:text_encoders\.{name}\.transformer|{name})\.", part) for name, part in ENCODER_PARTS.items()),
    (r"(?:text_encoders\.t5xxl\.transformer|t5xxl|t5)\.", "t5"),
    (r"lora_te3_", "t5"),
    (r"lora_te1?_", "text_encoder"),
    (r"lora_te2_", "text_encoder_2"),
    (rf"(?:unet\.|lora_unet_(?={UNET_NAMES}))", "unet"),
    (r"(?:transformer\.(?=[a-z_]+[._])|lora_transformer_)", "transformer"),
    (r"(?:lora_unet_|lycoris_|(?:model\.)?diffusion_model\.|)", ""),
)


def split_key(key: str, source: Path) -> tuple[str, str]:
    """A key -> (layer, what it holds of it: "down", "up", "alpha", …).

    Errors: UserError that names what is no LoRA.
    """
    adapter = next((name for part, name in OTHER_ADAPTERS if part in key), None)
    if adapter:
        raise UserError(f"{source}: {key}: {adapter} can't be converted to a LoRA, or merged")
    for pattern, kind in KEY_ENDINGS:
        match = re.search(f"(?:{pattern})$", key)
        if match:
            return key[: match.start()], kind or match[1]
    raise UserError(f"{source}: {key}: not a key of a LoRA")


def split_prefix(layer: str) -> list[tuple[str, str, str]]:
    """[(part, prefix, the layer's name in that part)] that a key may mean; the part as in PREFIXES."""
    bare = re.sub(r"^(?:base_model\.model\.|module\.)+", "", layer)
    matches = ((re.match(pattern, bare), part) for pattern, part in PREFIXES)
    return [(part, match[0], bare[match.end() :]) for match, part in matches if match]


def diffusers_name(name: str, part: str) -> str:
    """A layer's name without what diffusers' attention processors of 2023 put into it."""
    if "_blocks." in name and "lora" not in name.replace("_lora", ""):
        name = re.sub(r"\.processor\.to_(q|k|v|out)(?:_lora)?$", r".to_\1", name)
    if part.startswith("text_encoder"):
        name = re.sub(r"self_attn\.to_(q|k|v|out)(?:_lora)?$", r"self_attn.\1_proj", name)
    return name


def underscored(name: str) -> str:
    """A layer's name as it is looked up, whatever separates its parts."""
    return name.replace(".", "_")


def likely_families(layers: list[str], metadata: dict[str, str]) -> list[str]:
    """The families, the likeliest first, by a file's metadata and the looks of its layers' names."""
    base = " ".join(metadata.get(k, "") for k in ("modelspec.architecture", "ss_base_model_version")).lower()
    names = "\n".join(layers)
    signs = {
        "flux": "flux" in base or re.search(r"double_blocks|single_blocks|single_transformer_blocks", names),
        "sd3": "diffusion-3" in base
        or "diffusion-v3" in base
        or re.search(r"joint_blocks|attn2?[._]add_q", names),
        "sdxl": "xl" in base
        or re.search(r"lora_te2|text_encoder_2\.|clip_g|transformer_blocks[._]1[._]|input_blocks", names),
        "sd15": "diffusion-v" in base or re.search(r"(down|up)_blocks|mid_block", names),
    }
    return sorted(FAMILIES, key=lambda family: not signs[family])
