"""The names of a base's tensors in single-file checkpoints of Stability AI, Black Forest Labs and ComfyUI.

Where a denoiser's linear and convolution layers stand is passed as an argument (`OriginalPlace`, made by
lora/single_file.py); what no LoRA can stand on (normalisations, position tables) is named here, and so are
the VAE and the text encoders. Sources: the released checkpoints, and ComfyUI's names for text encoders
inside one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lora_training.errors import UserError

DENOISER_PREFIX = "model.diffusion_model."
VAE_PREFIXES = {
    "sd15": "first_stage_model.",
    "sdxl": "first_stage_model.",
    "sd3": "first_stage_model.",
    "flux": "vae.",
}
OPENCLIP_PREFIX = "conditioner.embedders.1.model."  # SDXL's second encoder is OpenCLIP's there
TEXT_PREFIXES = {
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": OPENCLIP_PREFIX,
    },
    "sd3": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    },
    "flux": {
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.t5xxl.transformer.",
    },
}
SD3_NORMS = {  # of a joint block
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}
FLUX_NORMS = {  # of a double or a single block
    "transformer_blocks": {
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
    },
    "single_transformer_blocks": {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"},
}
FLUX_BLOCKS = {"transformer_blocks": "double_blocks", "single_transformer_blocks": "single_blocks"}
OPENCLIP_TENSORS = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
OPENCLIP_LAYERS = {  # of a block
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass
class OriginalPlace:
    """Where a layer of diffusers stands in the original: in `rows` of the layer `name`, which has `height`.

    Its own rows stand there in the order `order`.
    """

    name: str
    rows: torch.Tensor
    order: torch.Tensor
    height: int

    def read(self, original: torch.Tensor) -> torch.Tensor:
        """The layer's tensor, taken from the original layer's (height, …)."""
        out = torch.empty_like(original[self.rows])
        out[self.order] = original[self.rows]
        return out

    def write(self, original: torch.Tensor, value: torch.Tensor) -> None:
        """Puts the layer's tensor into the original layer's (height, …)."""
        original[self.rows] = value[self.order]


def denoiser_to_original(
    family: str, state: dict[str, torch.Tensor], places: dict[str, OriginalPlace]
) -> dict[str, torch.Tensor]:
    """A denoiser's tensors under their original names, fused where the original is. places: of its layers."""
    out = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        place = places.get(layer)
        if place is None:
            out[DENOISER_PREFIX + other_denoiser_name(family, key, places)] = value
            continue
        name = f"{DENOISER_PREFIX}{place.name}.{leaf}"
        if name not in out:
            out[name] = value.new_zeros(place.height, *value.shape[1:])
        place.write(out[name], value)
    return out


def other_denoiser_name(family: str, key: str, places: dict[str, OriginalPlace]) -> str:
    """The original name of a denoiser's tensor that belongs to no linear or convolution layer."""
    layer, _, leaf = key.rpartition(".")
    if family in ("sd15", "sdxl"):
        return unet_norm_name(layer, leaf, places)
    if key == "pos_embed.pos_embed":
        return "pos_embed"
    group, number, inner = layer.split(".", 2)
    if family == "sd3":
        return f"joint_blocks.{number}.{SD3_NORMS[inner]}.{leaf}"
    return f"{FLUX_BLOCKS[group]}.{number}.{FLUX_NORMS[group][inner]}.scale"


def unet_norm_name(layer: str, leaf: str, places: dict[str, OriginalPlace]) -> str:
    """The original name of a UNet's normalisation, by that of a layer beside it."""
    if layer == "conv_norm_out":
        return f"out.0.{leaf}"
    parent, _, last = layer.rpartition(".")
    resnet_norms = {"norm1": ("conv1", "in_layers.0"), "norm2": ("conv2", "out_layers.0")}
    if last in resnet_norms and f"{parent}.conv1" in places:
        sibling, original = resnet_norms[last]
        return f"{places[f'{parent}.{sibling}'].name.rsplit('.', 2)[0]}.{original}.{leaf}"
    if last == "norm":  # of an attention block
        return f"{places[f'{parent}.proj_in'].name.rsplit('.', 1)[0]}.norm.{leaf}"
    return f"{places[f'{parent}.attn1.to_q'].name.rsplit('.', 2)[0]}.{last}.{leaf}"


def vae_to_original(family: str, state: dict[str, torch.Tensor], config: dict) -> dict[str, torch.Tensor]:
    """The VAE's tensors under their original names; linear layers of its attention are convolutions there."""
    levels, out = len(config["block_out_channels"]), {}
    for key, value in state.items():
        name = vae_name(key, levels)
        if ".attn_1." in name and name.endswith(".weight") and not name.endswith("norm.weight"):
            value = value[:, :, None, None]
        out[VAE_PREFIXES[family] + name] = value
    return out


def vae_name(key: str, levels: int) -> str:
    """The original name of a VAE's tensor. levels: of resolution."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    parts = ["nin_shortcut" if part == "conv_shortcut" else part for part in key.split(".")]
    side, rest = parts[0], parts[1:]
    if rest[0] in ("down_blocks", "up_blocks"):
        level = int(rest[1]) if rest[0] == "down_blocks" else levels - 1 - int(rest[1])
        start = [side, rest[0].split("_")[0], str(level)]
        if rest[2] == "resnets":
            return ".".join([*start, "block", *rest[3:]])
        return ".".join([*start, rest[2].rstrip("s").replace("sampler", "sample"), *rest[4:]])
    if rest[0] == "mid_block" and rest[1] == "resnets":
        return ".".join([side, "mid", f"block_{int(rest[2]) + 1}", *rest[3:]])
    if rest[0] == "mid_block":
        return ".".join([side, "mid", "attn_1", attention[rest[3]], rest[-1]])
    if rest[0] == "conv_norm_out":
        return ".".join([side, "norm_out", *rest[1:]])
    return ".".join(parts)


def text_to_original(family: str, part: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder's tensors under their original names."""
    prefix = TEXT_PREFIXES[family][part]
    if not prefix.endswith("t5xxl.transformer."):
        levels = ("text_model.", "text_projection.")
        state = {
            key if key.startswith(levels) else f"text_model.{key}": value for key, value in state.items()
        }
    if prefix == OPENCLIP_PREFIX:
        state = openclip_names(state)
    return {prefix + name: value for name, value in state.items()}


def openclip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' CLIP text model -> OpenCLIP's: q, k and v in one matrix, the projection transposed."""
    out = {}
    for key, value in state.items():
        if key in OPENCLIP_TENSORS:
            out[OPENCLIP_TENSORS[key]] = value
        elif key == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
        elif key.startswith("text_model.encoder.layers."):
            number, _, rest = key.removeprefix("text_model.encoder.layers.").partition(".")
            layer, _, leaf = rest.rpartition(".")
            block = f"transformer.resblocks.{number}"
            if layer in OPENCLIP_LAYERS:
                out[f"{block}.{OPENCLIP_LAYERS[layer]}.{leaf}"] = value
            elif layer == "self_attn.q_proj":
                projections = [state[key.replace("q_proj", f"{k}_proj")] for k in "qkv"]
                out[f"{block}.attn.in_proj_{leaf}"] = torch.cat(projections)
    return out


def text_layer_key(prefix: str, layer: str) -> tuple[str, int | None]:
    """Where a text encoder's layer stands in a single file: (key, which third of its rows; None: all).

    Errors: UserError for OpenCLIP's text projection.
    """
    if prefix != OPENCLIP_PREFIX:
        return f"{prefix}{layer}.weight", None
    if layer == "text_projection":
        raise UserError(
            "a LoRA on SDXL's text projection has no place in a single file, which holds it transposed"
        )
    _, _, _, number, rest = layer.split(".", 4)
    block = f"{prefix}transformer.resblocks.{number}"
    if rest in OPENCLIP_LAYERS:
        return f"{block}.{OPENCLIP_LAYERS[rest]}.weight", None
    thirds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return f"{block}.attn.in_proj_weight", thirds.index(rest)
