"""The denoisers' layers under the names of the original checkpoints, which kohya's files use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_training.families import Family

# Tables {diffusers: original}: layers outside of the blocks; layers of a block that the original has, too;
# and {layer of the original: the layers of diffusers that it holds, from top to bottom}.
SDXL_OUTER = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
SDXL_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
SD3_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
SD3_FUSED = {
    "x_block.attn.qkv": IMAGE_QKV,
    "context_block.attn.qkv": TEXT_QKV,
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
FLUX_OUTER = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
FLUX_DOUBLE_BLOCK = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
FLUX_DOUBLE_FUSED = {"img_attn.qkv": IMAGE_QKV, "txt_attn.qkv": TEXT_QKV}
FLUX_SINGLE_BLOCK = {"proj_out": "linear2", "norm.linear": "modulation.lin"}
FLUX_SINGLE_FUSED = {"linear1": (*IMAGE_QKV, "proj_mlp")}


def kohya_layout(family: Family, modules: dict[str, dict], config: dict) -> dict[str, dict]:
    """A denoiser's modules {name: tensors} under the names of kohya's files. config: the denoiser's.

    kohya's names for SD 1.x/2.x are diffusers'.
    """
    layouts = {"sdxl": sdxl_layout, "sd3": sd3_layout, "flux": flux_layout}
    return layouts[family.name](modules, config) if family.name in layouts else modules


def sdxl_layout(modules: dict[str, dict], config: dict) -> dict[str, dict]:
    """The UNet's modules under the names of the original checkpoint, which kohya's files use for SDXL."""
    return {sdxl_name(name, config): tensors for name, tensors in modules.items()}


def sdxl_name(name: str, config: dict) -> str:
    """down_blocks.I.attentions.J -> input_blocks.N.1 and so on; N counts over levels and their layers."""
    side, *parts = name.split(".")
    if side == "mid_block":
        kind, number, *rest = parts
        start = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}"
    elif side in ("down_blocks", "up_blocks"):
        level, kind, number, *rest = parts
        count = config["layers_per_block"] + 1  # of blocks in a level
        block = int(level) * count + int(number)
        if kind == "downsamplers":
            return f"input_blocks.{int(level) * count + count}.0.op"
        if kind == "upsamplers":
            has_attention = "CrossAttn" in config["up_block_types"][int(level)]
            return f"output_blocks.{int(level) * count + count - 1}.{2 if has_attention else 1}.conv"
        start = f"input_blocks.{block + 1}" if side == "down_blocks" else f"output_blocks.{block}"
        start += ".1" if kind == "attentions" else ".0"
    else:
        return SDXL_OUTER[name]
    if kind == "resnets":
        rest = [SDXL_RESNET[rest[0]]]
    return ".".join([start, *rest])


def sd3_layout(modules: dict[str, dict], config: dict) -> dict[str, dict]:
    """The transformer's modules under the names of the original checkpoint, where q, k and v are one layer.

    transformer_blocks.N.attn.{to_q,to_k,to_v} -> joint_blocks.N.x_block.attn.qkv and so on.
    """
    last_norm = f"transformer_blocks.{config['num_layers'] - 1}.norm1_context.linear"  # shift and scale alone
    swapped = ("norm_out.linear", last_norm)

    def place(name: str) -> tuple[str, int | None, int]:
        if name in SD3_OUTER:
            return SD3_OUTER[name], None, 0
        _, number, layer = name.split(".", 2)
        return block_place(f"joint_blocks.{number}", layer, SD3_BLOCK, SD3_FUSED)

    out, projections = place_modules(modules, place, swapped)
    for name, parts in projections.items():
        width = next(len(p["lora_up.weight"]) for p in parts if p is not None and "lora_up.weight" in p)
        out[name] = fuse_projections(parts, [width] * 3)
    return out


def flux_layout(modules: dict[str, dict], config: dict) -> dict[str, dict]:
    """The transformer's modules under the original checkpoint's names.

    There q, k and v are one layer, and in a single block the MLP's first layer with them.
    """

    def place(name: str) -> tuple[str, int | None, int]:
        if name in FLUX_OUTER:
            return FLUX_OUTER[name], None, 0
        group, number, layer = name.split(".", 2)
        if group == "single_transformer_blocks":
            return block_place(f"single_blocks.{number}", layer, FLUX_SINGLE_BLOCK, FLUX_SINGLE_FUSED)
        return block_place(f"double_blocks.{number}", layer, FLUX_DOUBLE_BLOCK, FLUX_DOUBLE_FUSED)

    out, projections = place_modules(modules, place, swapped=("norm_out.linear",))
    width = config["num_attention_heads"] * config["attention_head_dim"]
    heights = [width, width, width, 4 * width]
    return out | {name: fuse_projections(p, heights[: len(p)]) for name, p in projections.items()}


def block_place(
    block: str, layer: str, names: dict[str, str], fused: dict[str, tuple[str, ...]]
) -> tuple[str, int | None, int]:
    """(name in the original, which part of that layer this is or None, number of its parts)."""
    if layer in names:
        return f"{block}.{names[layer]}", None, 0
    original, parts = next(item for item in fused.items() if layer in item[1])
    return f"{block}.{original}", parts.index(layer), len(parts)


def place_modules(
    modules: dict[str, dict],
    place: Callable[[str], tuple[str, int | None, int]],
    swapped: tuple[str, ...],
) -> tuple[dict[str, dict], dict[str, list[dict | None]]]:
    """({name in the original: tensors}, {name of a fused layer: tensors of its parts, or None}).

    place: as `block_place` returns it. swapped: modules whose rows the original has as shift before scale.
    """
    out: dict[str, dict] = {}
    projections: dict[str, list[dict | None]] = {}
    for name, tensors in modules.items():
        original, part, count = place(name)
        if part is None:
            out[original] = swap_halves(tensors) if name in swapped else tensors
        else:
            projections.setdefault(original, [None] * count)[part] = tensors
    return out, projections


def swap_halves(tensors: dict) -> dict:
    """A module whose rows are scale and shift, in the other order."""
    by_row = ("lora_up.weight", "dora_scale")
    return {kind: torch.cat(t.chunk(2)[::-1]) if kind in by_row else t for kind, t in tensors.items()}


def fuse_projections(parts: list[dict | None], heights: list[int]) -> dict:
    """The LoRAs of layers that the original holds as one, as one LoRA.

    parts: from top to bottom; one without LoRA has no matrices, or is None. The down matrices stand
    under each other, the up matrices on a block diagonal of `heights` rows each; the rank is their sum,
    and so is alpha, where alpha / rank is the same for all: else it is the first one's, and the others' up
    matrices are scaled. Errors: ValueError for DoRA on some of the layers, where the others' magnitudes are
    missing.
    """
    there = [p for p in parts if p is not None and "lora_up.weight" in p]
    scales = [p["alpha"] / p["lora_down.weight"].shape[0] for p in there]
    same_scale = all(torch.isclose(scale, scales[0]) for scale in scales)
    rank = sum(p["lora_down.weight"].shape[0] for p in there)
    dtype = there[0]["lora_up.weight"].dtype if same_scale else torch.float32  # another scale isn't rounded
    up, row, column = there[0]["lora_up.weight"].new_zeros(sum(heights), rank, dtype=dtype), 0, 0
    for part, height in zip(parts, heights, strict=True):
        number = next((number for number, p in enumerate(there) if p is part), None)
        if number is not None:
            part_up = part["lora_up.weight"]
            scaled = part_up if same_scale else part_up.float() * (scales[number] / scales[0])
            up[row : row + height, column : column + part_up.shape[1]] = scaled
            column += part_up.shape[1]
        row += height
    down = torch.cat([p["lora_down.weight"] for p in there])
    alpha = sum(p["alpha"] for p in there) if same_scale else scales[0] * rank
    fused = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
    if "dora_scale" in there[0]:
        if None in parts:
            raise ValueError("DoRA on some of the layers that the original holds as one")
        fused["dora_scale"] = torch.cat([p["dora_scale"].to(up.dtype) for p in parts])
    return fused
