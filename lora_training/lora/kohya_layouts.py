"""The denoisers' layers under the names of the original checkpoints, which kohya's files use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lora_training.families import Family


def swap_halves(tensors: dict) -> dict:
    """A module whose rows are scale and shift, in the other order."""
    by_row = ("lora_up.weight", "dora_scale")
    return {kind: torch.cat(t.chunk(2)[::-1]) if kind in by_row else t for kind, t in tensors.items()}


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


def sdxl_layout(modules: dict[str, dict], config: dict) -> dict[str, dict]:
    """The UNet's modules under the names of the original checkpoint, which kohya's files use for SDXL.

    down_blocks.I.attentions.J -> input_blocks.N.1 and so on, with N counted over levels and their layers.
    """
    layers, out = config["layers_per_block"], {}
    inner = {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    outer = {
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
    }
    for name, tensors in modules.items():
        parts = name.split(".")
        if parts[0] in ("down_blocks", "up_blocks"):
            level, kind, number, rest = int(parts[1]), parts[2], int(parts[3]), parts[4:]
            down = parts[0] == "down_blocks"
            if kind in ("downsamplers", "upsamplers"):
                place = 1 + level * (layers + 1) + layers if down else level * (layers + 1) + layers
                has_attention = "CrossAttn" in config["up_block_types"][level] if not down else False
                target = (
                    f"input_blocks.{place}.0.op"
                    if down
                    else f"output_blocks.{place}.{2 if has_attention else 1}.conv"
                )
                out[target] = tensors
                continue
            place = 1 + level * (layers + 1) + number if down else level * (layers + 1) + number
            start = f"{'input' if down else 'output'}_blocks.{place}.{1 if kind == 'attentions' else 0}"
        elif parts[0] == "mid_block":
            kind, number, rest = parts[1], int(parts[2]), parts[3:]
            start = f"middle_block.{1 if kind == 'attentions' else 2 * number}"
        else:
            out[outer[name]] = tensors
            continue
        out[".".join([start, *([inner[rest[0]]] if kind == "resnets" else rest)])] = tensors
    return out


def sd3_layout(modules: dict[str, dict], config: dict) -> dict[str, dict]:
    """The transformer's modules under the names of the original checkpoint, where q, k and v are one layer.

    transformer_blocks.N.attn.{to_q,to_k,to_v} -> joint_blocks.N.x_block.attn.qkv and so on.
    """
    single = {
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
    fused = {
        "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    }
    outer = {
        "pos_embed.proj": "x_embedder.proj",
        "context_embedder": "context_embedder",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    places = {part: (target, k) for target, parts in fused.items() for k, part in enumerate(parts)}
    out, waiting = {}, {}
    for name, tensors in modules.items():
        if name in outer:
            if name == "norm_out.linear":  # the original holds shift before scale
                tensors = swap_halves(tensors)
            out[outer[name]] = tensors
            continue
        _, number, rest = name.split(".", 2)
        if (
            rest == "norm1_context.linear" and int(number) == config["num_layers"] - 1
        ):  # shift and scale alone, too
            tensors = swap_halves(tensors)
        if rest in single:
            out[f"joint_blocks.{number}.{single[rest]}"] = tensors
        else:
            target, place = places[rest]
            waiting.setdefault(f"joint_blocks.{number}.{target}", [None] * 3)[place] = tensors
    for name, parts in waiting.items():
        width = next(len(p["lora_up.weight"]) for p in parts if p is not None and "lora_up.weight" in p)
        out[name] = fuse_projections(parts, [width] * 3)
    return out


def flux_layout(modules: dict[str, dict], config: dict) -> dict[str, dict]:
    """The transformer's modules under the original checkpoint's names, where q, k, v (and a single block's MLP) are one layer."""
    double = """attn.to_out.0=img_attn.proj attn.to_add_out=txt_attn.proj ff.net.0.proj=img_mlp.0 ff.net.2=img_mlp.2
        ff_context.net.0.proj=txt_mlp.0 ff_context.net.2=txt_mlp.2 norm1.linear=img_mod.lin norm1_context.linear=txt_mod.lin"""
    single = "proj_out=linear2 norm.linear=modulation.lin"
    double, single = (dict(pair.split("=") for pair in pairs.split()) for pairs in (double, single))
    image, text = (
        ("attn.to_q", "attn.to_k", "attn.to_v"),
        ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    )
    layout = {
        "transformer_blocks": ("double_blocks", double, {"img_attn.qkv": image, "txt_attn.qkv": text}),
        "single_transformer_blocks": ("single_blocks", single, {"linear1": (*image, "proj_mlp")}),
    }
    embedders = {
        "timestep_embedder": "time_in",
        "text_embedder": "vector_in",
        "guidance_embedder": "guidance_in",
    }
    ends = {"linear_1": "in_layer", "linear_2": "out_layer"}
    outer = {
        f"time_text_embed.{e}.{n}": f"{o}.{end}" for e, o in embedders.items() for n, end in ends.items()
    }
    outer |= {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
    outer |= {"norm_out.linear": "final_layer.adaLN_modulation.1"}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    out, partial = {}, {}
    for name, tensors in modules.items():
        if name in outer:
            out[outer[name]] = (
                swap_halves(tensors) if name == "norm_out.linear" else tensors
            )  # shift first there
            continue
        group, number, rest = name.split(".", 2)
        blocks, alone, fused = layout[group]
        if rest in alone:
            out[f"{blocks}.{number}.{alone[rest]}"] = tensors
            continue
        target, parts = next(pair for pair in fused.items() if rest in pair[1])
        partial.setdefault(f"{blocks}.{number}.{target}", [None] * len(parts))[parts.index(rest)] = tensors
    return out | {
        n: fuse_projections(parts, ([width] * 3 + [4 * width])[: len(parts)]) for n, parts in partial.items()
    }


LAYOUTS = {
    "sdxl": sdxl_layout,
    "sd3": sd3_layout,
    "flux": flux_layout,
}  # kohya's names for SD 1.x/2.x are diffusers'


def kohya_layout(family: Family, modules: dict[str, dict], config: dict) -> dict[str, dict]:
    """A denoiser's modules {name: tensors} under the names of kohya's files. config: the denoiser's."""
    return LAYOUTS[family.name](modules, config) if family.name in LAYOUTS else modules
