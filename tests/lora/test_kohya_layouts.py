"""A LoRA with the names of the original checkpoints, as other tools read it."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT
from toy_parts import empty_denoiser

from lora_training.families import FAMILIES, FLUX, SD3, SDXL
from lora_training.lora.formats import kohya_state

pytestmark = pytest.mark.unit


def lora_on(shapes: dict[str, tuple], rank: int) -> dict:
    """A LoRA with peft's keys, by layer name and (out, in)."""
    state = {}
    for name, (rows, columns, *_) in shapes.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, columns)
        state[f"{name}.lora_B.weight"] = torch.randn(rows, rank)
    return state


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_kohya_keys_carry_each_alpha(family):
    """Every layer that a LoRA can have gets its own alpha, and no two layers the same key."""
    config = ROOT / "assets" / f"toy_{family.name}" / family.denoiser / "config.json"
    config = json.loads(config.read_text())
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    modules = empty_denoiser(config).named_modules()
    shapes = {name: module.weight.shape for name, module in modules if isinstance(module, kinds)}
    text = {f"encoder.layers.0.self_attn.q_proj.lora_{m}.weight": torch.ones(4, 8) for m in "AB"}
    states = {family.denoiser: lora_on(shapes, 4), "text_encoder": text}
    out = kohya_state(family, states, 2.0, config)
    layers = {key.split(".")[0] for key in out}
    ends = ("alpha", "lora_down.weight", "lora_up.weight")
    assert all(f"{layer}.{end}" in out for layer in layers for end in ends)
    assert len(out) == 3 * len(layers) and all("." not in layer for layer in layers)
    prefix = family.kohya_prefixes["text_encoder"]
    assert out[f"{prefix}_text_model_encoder_layers_0_self_attn_q_proj.alpha"] == 2
    if family.name in ("sd15", "sdxl"):  # no projections are fused
        assert len(layers) == len(shapes) + 1
        assert all(value == 2 for key, value in out.items() if key.endswith("alpha"))


def test_sdxl_keys_are_those_of_the_original_checkpoint():
    """Spot checks with the released model's layer counts (two a level), from kohya's public key lists."""
    config = {
        "layers_per_block": 2,
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    }
    pairs = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        ),
        "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
        "down_blocks.0.resnets.1.conv1": "input_blocks_2_0_in_layers_2",
        "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2": (
            "middle_block_1_transformer_blocks_9_ff_net_2"
        ),
        "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "up_blocks.0.attentions.2.transformer_blocks.0.attn2.to_out.0": (
            "output_blocks_2_1_transformer_blocks_0_attn2_to_out_0"
        ),
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "up_blocks.1.attentions.0.proj_out": "output_blocks_3_1_proj_out",
        "up_blocks.2.resnets.0.conv_shortcut": "output_blocks_6_0_skip_connection",
    }
    state = {f"{k}.lora_{m}.weight": torch.ones(1, 1) for k in pairs for m in "AB"}
    out = kohya_state(SDXL, {"unet": state}, 1.0, config)
    assert {k.split(".")[0] for k in out} == {f"lora_unet_{v}" for v in pairs.values()}


def test_sd3_fused_keys_give_the_same_update():
    """q, k and v as one layer with the names of the original checkpoint change weights by the same update."""
    names = {"attn.to_q": 0, "attn.to_k": 1, "attn.to_v": 2}
    state = {}
    for name in ("attn.to_q", "attn.to_v", "attn.to_out.0", "ff.net.2"):  # no LoRA on k
        state[f"transformer_blocks.3.{name}.lora_A.weight"] = torch.randn(4, 16)
        state[f"transformer_blocks.3.{name}.lora_B.weight"] = torch.randn(16, 4)
    out = kohya_state(SD3, {"transformer": state}, 2.0, {"num_layers": 24})
    expected = {"x_block_attn_qkv", "x_block_attn_proj", "x_block_mlp_fc2"}
    assert {k.split(".")[0] for k in out} == {f"lora_unet_joint_blocks_3_{e}" for e in expected}
    key = "lora_unet_joint_blocks_3_x_block_attn_qkv"
    down, up, alpha = (out[f"{key}.{k}"] for k in ("lora_down.weight", "lora_up.weight", "alpha"))
    update = up @ down * (alpha / len(down))
    for name, row in names.items():
        part = update[row * 16 : (row + 1) * 16]
        if name == "attn.to_k":
            assert not part.any()
        else:
            a, b = (state[f"transformer_blocks.3.{name}.lora_{m}.weight"] for m in "AB")
            assert torch.allclose(part, b @ a * (2.0 / 4), atol=1e-5)


def test_flux_file_for_other_tools_reads_back_as_the_same_lora():
    """At the real model's width, through diffusers' own reader of kohya's Flux files; alpha half the rank."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    d, layers = 3072, {}
    for k in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj"):
        layers[f"transformer_blocks.18.{k}"] = (d, d)
    layers |= {
        "transformer_blocks.18.attn.add_v_proj": (d, d),
        "transformer_blocks.18.attn.to_add_out": (d, d),
    }
    layers |= {
        "transformer_blocks.0.ff.net.0.proj": (4 * d, d),
        "transformer_blocks.0.ff_context.net.2": (d, 4 * d),
    }
    layers |= {f"single_transformer_blocks.37.attn.to_{k}": (d, d) for k in "qkv"}
    layers |= {
        "single_transformer_blocks.37.proj_mlp": (4 * d, d),
        "single_transformer_blocks.37.proj_out": (d, 5 * d),
    }
    state = lora_on(layers, 2)
    config = {"num_attention_heads": 24, "attention_head_dim": 128}
    out = kohya_state(FLUX, {"transformer": state}, 1.0, config)
    names = {k.split(".")[0].removeprefix("lora_unet_") for k in out}
    double = {
        f"double_blocks_18_{e}" for e in ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj")
    }
    double |= {"double_blocks_0_img_mlp_0", "double_blocks_0_txt_mlp_2"}
    assert names == double | {"single_blocks_37_linear1", "single_blocks_37_linear2"}
    back = _convert_kohya_flux_lora_to_diffusers(dict(out))
    for name in layers:
        a, b = (state[f"{name}.lora_{m}.weight"] for m in "AB")
        a2, b2 = (back[f"transformer.{name}.lora_{m}.weight"] for m in "AB")
        x = torch.randn(a.shape[1])
        assert torch.allclose(b2 @ (a2 @ x), b @ (a @ x) / 2, atol=1e-3), name


def test_flux_fuses_what_is_there_and_keeps_dora():
    config = {"num_attention_heads": 2, "attention_head_dim": 4}
    block = "single_transformer_blocks.0"
    state = lora_on({f"{block}.attn.to_k": (8, 8), f"{block}.proj_mlp": (32, 8)}, 2)
    out = kohya_state(FLUX, {"transformer": state}, 2.0, config)
    up, down = (out[f"lora_unet_single_blocks_0_linear1.lora_{w}.weight"] for w in ("up", "down"))
    update = up @ down * (out["lora_unet_single_blocks_0_linear1.alpha"] / len(down))
    expected = torch.zeros(56, 8)
    for name, rows in (("attn.to_k", slice(8, 16)), ("proj_mlp", slice(24, 56))):
        expected[rows] = state[f"{block}.{name}.lora_B.weight"] @ state[f"{block}.{name}.lora_A.weight"]
    assert torch.allclose(update, expected, atol=1e-5)
    dora = state | {
        f"{block}.{n}.lora_magnitude_vector": torch.ones(r) for n, r in (("attn.to_k", 8), ("proj_mlp", 32))
    }
    with pytest.raises(ValueError, match="DoRA on some"):
        kohya_state(FLUX, {"transformer": dora}, 2.0, config)
