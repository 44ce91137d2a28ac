"""The names that tensors have in single-file checkpoints, for every part of the four families.

`single_file(family, folder)` turns a diffusers folder into the tensors of one checkpoint as Stability AI, Black Forest Labs
and ComfyUI lay it out; `denoiser_places` says where a single layer of the denoiser stands. Layers come from the training
scripts' own layouts (lora_files.original_places); what no LoRA can stand on (normalisations, position tables) is named here.
Sources: the state dicts of the released checkpoints, and ComfyUI's names for text encoders inside one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from scripts.lora.parts.layer_names import Place, original_places
from scripts.lora.parts.low_rank import FileError
from scripts.parts.files import read_json
from scripts.parts.released_models import meta_denoiser
from scripts.parts.training_scripts import load_script

DENOISER_PREFIX = "model.diffusion_model."
VAE_PREFIXES = {"sd15": "first_stage_model.", "sdxl": "first_stage_model.", "sd3": "first_stage_model.", "flux": "vae."}
TEXT_PREFIXES = {
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
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


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a part's folder, from one file or several."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [f for f in files if ".fp16" not in f.name]
    if not files:
        raise FileError(f"{folder}: no .safetensors weights")
    return {key: value for file in plain or files for key, value in load_file(file).items()}


class BaseWeights:
    """The weights of a base's layers, one by one, from a diffusers folder or a single file."""

    def __init__(self, base: Path, family: str, config: dict) -> None:
        self.base, self.family, self.places, self.files = base, family, {}, {}
        if base.is_dir():
            for folder in (f for f in base.iterdir() if f.is_dir()):
                files = sorted(folder.glob("*.safetensors"))
                for file in [f for f in files if ".fp16" not in f.name] or files:
                    self.know(file, f"{folder.name}.")
        else:
            self.know(base, "")
            self.places = denoiser_places(family, config)

    def know(self, file: Path, prefix: str) -> None:
        opened = safe_open(file, "pt")
        self.files |= {f"{prefix}{key}": (opened, key) for key in opened.keys()}  # noqa: SIM118

    def __call__(self, part: str, name: str) -> torch.Tensor:
        """The weight of a layer. Errors: FileError if the base has none."""
        place = third = None
        keys = [f"{part}.{name}.weight", f"{part}.{name.removeprefix('text_model.')}.weight"]
        if not self.base.is_dir() and name in self.places:
            place = self.places[name]
            keys = [f"{DENOISER_PREFIX}{place.name}.weight", f"{place.name}.weight"]
        elif not self.base.is_dir():
            key, third = text_place(TEXT_PREFIXES[self.family].get(part, ""), name)
            keys = [key]
        found = next((self.files[key] for key in keys if key in self.files), None)
        if found is None:
            raise FileError(f"{self.base}: no weight of {part}.{name}")
        weight = found[0].get_tensor(found[1])
        if third is not None:
            return weight.chunk(3)[third]
        if place is None:
            return weight
        own = torch.empty_like(weight[place.rows])
        own[place.order] = weight[place.rows]
        return own

    def norms(self, part: str, name: str) -> torch.Tensor:
        """Of the rows of a layer's weight, which a DoRA that changes nothing has as its magnitudes."""
        return self(part, name).float().flatten(1).norm(dim=1)


def text_place(prefix: str, name: str) -> tuple[str, int | None]:
    """Where a text encoder's layer stands in a single file: (key, which third of its rows; None: all)."""
    if prefix != "conditioner.embedders.1.model.":
        return f"{prefix}{name}.weight", None
    if name == "text_projection":
        raise FileError("a LoRA on SDXL's text projection has no place in a single file, which holds it transposed")
    _, _, _, number, rest = name.split(".", 4)
    block = f"{prefix}transformer.resblocks.{number}"
    simple = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    if rest in simple:
        return f"{block}.{simple[rest]}.weight", None
    return f"{block}.attn.in_proj_weight", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(rest)


def denoiser_places(family: str, config: dict) -> dict[str, Place]:
    """{diffusers name of a layer: where it stands in the original denoiser}; names without DENOISER_PREFIX."""
    script = load_script(
        "sdxl" if family == "sd15" else family
    )  # kohya's SD 1.5 names are diffusers', the file's aren't
    return original_places(script, meta_denoiser(family, config))


def other_denoiser_name(family: str, key: str, places: dict[str, Place]) -> str:
    """The original name of a denoiser's tensor that belongs to no linear or convolution layer."""
    layer, _, leaf = key.rpartition(".")
    if family in ("sd15", "sdxl"):
        if layer == "conv_norm_out":
            return f"out.0.{leaf}"
        parent, _, last = layer.rpartition(".")
        beside = {"norm1": ("conv1", "in_layers.0"), "norm2": ("conv2", "out_layers.0")}
        if last in beside and f"{parent}.conv1" in places:
            sibling, own = beside[last]
            return f"{places[f'{parent}.{sibling}'].name.rsplit('.', 2)[0]}.{own}.{leaf}"
        if last == "norm":  # of an attention block
            return f"{places[f'{parent}.proj_in'].name.rsplit('.', 1)[0]}.norm.{leaf}"
        inside = places[f"{parent}.attn1.to_q"].name.rsplit(".", 2)[0]
        return f"{inside}.{last}.{leaf}"
    if key == "pos_embed.pos_embed":
        return "pos_embed"
    group, number, *rest = layer.split(".")
    inner = ".".join(rest)
    if family == "sd3":
        names = {
            "attn.norm_q": "x_block.attn.ln_q",
            "attn.norm_k": "x_block.attn.ln_k",
            "attn.norm_added_q": "context_block.attn.ln_q",
            "attn.norm_added_k": "context_block.attn.ln_k",
            "attn2.norm_q": "x_block.attn2.ln_q",
            "attn2.norm_k": "x_block.attn2.ln_k",
        }
        return f"joint_blocks.{number}.{names[inner]}.{leaf}"
    double = {
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
    }
    single = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
    if group == "transformer_blocks":
        return f"double_blocks.{number}.{double[inner]}.scale"
    return f"single_blocks.{number}.{single[inner]}.scale"


def denoiser_to_original(family: str, state: dict, config: dict) -> dict[str, torch.Tensor]:
    """A denoiser's tensors under their original names, fused where the original is."""
    places, out = denoiser_places(family, config), {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        place = places.get(layer)
        if place is None:
            out[DENOISER_PREFIX + other_denoiser_name(family, key, places)] = value
            continue
        name = f"{DENOISER_PREFIX}{place.name}.{leaf}"
        if name not in out:
            out[name] = value.new_zeros(place.height, *value.shape[1:])
        out[name][place.rows] = value[place.order]
    return out


def vae_to_original(family: str, state: dict, config: dict) -> dict[str, torch.Tensor]:
    """The VAE's tensors under their original names; its attention's linear layers are 1 x 1 convolutions there."""
    levels, out = len(config["block_out_channels"]), {}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    for key, value in state.items():
        words = key.split(".")
        if words[0] in ("encoder", "decoder") and words[1] in ("down_blocks", "up_blocks"):
            level = int(words[2]) if words[1] == "down_blocks" else levels - 1 - int(words[2])
            start = [words[0], words[1].split("_")[0], str(level)]
            if words[3] == "resnets":
                words = [*start, "block", *words[4:]]
            else:
                words = [*start, words[3].rstrip("s").replace("sampler", "sample"), *words[5:]]
        elif words[1:2] == ["mid_block"] and words[2] == "resnets":
            words = [words[0], "mid", f"block_{int(words[3]) + 1}", *words[4:]]
        elif words[1:2] == ["mid_block"]:
            rest = [attention[words[4]], words[-1]]
            words = [words[0], "mid", "attn_1", *rest]
            if rest == [rest[0], "weight"] and rest[0] != "norm":
                value = value[:, :, None, None]
        elif words[1:2] == ["conv_norm_out"]:
            words[1] = "norm_out"
        words = ["nin_shortcut" if w == "conv_shortcut" else w for w in words]
        out[VAE_PREFIXES[family] + ".".join(words)] = value
    return out


def text_to_original(family: str, part: str, state: dict) -> dict[str, torch.Tensor]:
    """A text encoder's tensors under their original names; SDXL's second encoder is OpenCLIP's there."""
    prefix, out = TEXT_PREFIXES[family][part], {}
    for key, value in state.items():
        if prefix.endswith("t5xxl.transformer."):
            out[prefix + key] = value
            continue
        name = key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"
        out[name] = value
    if prefix.endswith("t5xxl.transformer."):
        return out
    if prefix != "conditioner.embedders.1.model.":
        return {prefix + name: value for name, value in out.items()}
    return {prefix + name: value for name, value in openclip_names(out).items()}


def openclip_names(state: dict) -> dict[str, torch.Tensor]:
    """transformers' CLIP text model -> OpenCLIP's: q, k and v in one matrix, the projection transposed."""
    simple = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    inner = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner["self_attn.out_proj"] = "attn.out_proj"
    out = {}
    for key, value in state.items():
        if key in simple:
            out[simple[key]] = value
        elif key == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
        elif key.startswith("text_model.encoder.layers."):
            number, _, rest = key.removeprefix("text_model.encoder.layers.").partition(".")
            layer, _, leaf = rest.rpartition(".")
            block = f"transformer.resblocks.{number}"
            if layer in inner:
                out[f"{block}.{inner[layer]}.{leaf}"] = value
            elif layer == "self_attn.q_proj":
                three = [state[key.replace("q_proj", f"{k}_proj")] for k in "qkv"]
                out[f"{block}.attn.in_proj_{leaf}"] = torch.cat(three)
    return out


def single_file(family: str, folder: Path) -> dict[str, torch.Tensor]:
    """A diffusers folder -> the tensors of one checkpoint with denoiser, VAE and text encoders."""
    script = load_script(family)
    index = read_json(folder / "model_index.json")

    def config(part: str) -> dict:
        return read_json(folder / part / "config.json")

    out = denoiser_to_original(family, read_weights(folder / script.DENOISER), config(script.DENOISER))
    out |= vae_to_original(family, read_weights(folder / "vae"), config("vae"))
    for part in TEXT_PREFIXES[family]:
        if index.get(part) not in (None, [None, None]):
            out |= text_to_original(family, part, read_weights(folder / part))
    return {key: value.contiguous() for key, value in out.items()}
