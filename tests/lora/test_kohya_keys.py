"""The key lists of other tools, written from their formats, and what metadata they read."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from trained_loras import train_with_text_encoder

from lora_training import families
from lora_training.base_model.released_models import denoiser_config, empty_denoiser
from lora_training.lora.formats import kohya_state
from lora_training.lora.metadata import base_versions
from scripts.lora import convert_lora, inspect_lora

pytestmark = pytest.mark.run


@pytest.fixture
def trained(family, shelf):
    """A short run with text encoder and alpha half the rank, shared by the tests of a family."""
    return train_with_text_encoder(family, shelf)


def unet_diffusers_layers(levels: int, layers: int, attention: dict[int, int]) -> set[str]:
    """Layers of a UNet as kohya's SD 1.x files name them. attention: {level from the top: transformer
    depth}.
    """

    def resnet(start):
        return {f"{start}_{n}" for n in ("conv1", "conv2", "time_emb_proj", "conv_shortcut")}

    def transformer(start, depth):
        inner = [f"attn{a}_{n}" for a in (1, 2) for n in ("to_q", "to_k", "to_v", "to_out_0")] + [
            "ff_net_0_proj",
            "ff_net_2",
        ]
        blocks = {f"{start}_transformer_blocks_{d}_{n}" for d in range(depth) for n in inner}
        return blocks | {f"{start}_proj_in", f"{start}_proj_out"}

    out = {"conv_in", "conv_out", "time_embedding_linear_1", "time_embedding_linear_2"}
    for level in range(levels):
        for side, count, place in (("down", layers, level), ("up", layers + 1, levels - 1 - level)):
            for k in range(count):
                out |= resnet(f"{side}_blocks_{place}_resnets_{k}")
                if level in attention:
                    out |= transformer(f"{side}_blocks_{place}_attentions_{k}", attention[level])
        out |= {f"down_blocks_{level}_downsamplers_0_conv", f"up_blocks_{level}_upsamplers_0_conv"}
    depth = attention[max(attention)]
    return (
        out
        | resnet("mid_block_resnets_0")
        | resnet("mid_block_resnets_1")
        | transformer("mid_block_attentions_0", depth)
    )


def sdxl_original_layers() -> set[str]:
    """SDXL's UNet as its checkpoint names it: 9 input blocks, a middle, 9 output blocks; depth 2 and 10."""
    res = ("in_layers_2", "out_layers_3", "emb_layers_1", "skip_connection")
    inner = [f"attn{a}_{n}" for a in (1, 2) for n in ("to_q", "to_k", "to_v", "to_out_0")] + [
        "ff_net_0_proj",
        "ff_net_2",
    ]

    def attention(start, depth):
        return {f"{start}_transformer_blocks_{d}_{n}" for d in range(depth) for n in inner} | {
            f"{start}_proj_in",
            f"{start}_proj_out",
        }

    out = {"input_blocks_0_0", "out_2", "time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2"}
    out |= {"input_blocks_3_0_op", "input_blocks_6_0_op", "output_blocks_2_2_conv", "output_blocks_5_2_conv"}
    for n in (1, 2, 4, 5, 7, 8):
        out |= {f"input_blocks_{n}_0_{r}" for r in res}
    for n in range(9):
        out |= {f"output_blocks_{n}_0_{r}" for r in res}
    for n, depth in ((4, 2), (5, 2), (7, 10), (8, 10)):
        out |= attention(f"input_blocks_{n}_1", depth)
    for n in range(6):
        out |= attention(f"output_blocks_{n}_1", 10 if n < 3 else 2)
    return out | {f"middle_block_{m}_{r}" for m in (0, 2) for r in res} | attention("middle_block_1", 10)


def sd3_original_layers() -> set[str]:
    """SD 3.5 medium: 24 joint blocks, dual attention in the first 13, a last context block without output."""
    out = {"x_embedder_proj", "context_embedder", "final_layer_linear", "final_layer_adaLN_modulation_1"}
    out |= {f"{e}_embedder_mlp_{n}" for e in "ty" for n in (0, 2)}
    for n in range(24):
        out |= {f"joint_blocks_{n}_x_block_{k}" for k in ("attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2")}
        out |= {f"joint_blocks_{n}_context_block_{k}" for k in ("attn_qkv", "adaLN_modulation_1")}
        out |= {f"joint_blocks_{n}_x_block_adaLN_modulation_1"}
        out |= {f"joint_blocks_{n}_x_block_attn2_{k}" for k in ("qkv", "proj")} if n < 13 else set()
        out |= (
            {f"joint_blocks_{n}_context_block_{k}" for k in ("attn_proj", "mlp_fc1", "mlp_fc2")}
            if n < 23
            else set()
        )
    return out


def flux_original_layers() -> set[str]:
    """FLUX.1-dev: 19 double blocks, 38 single ones."""
    out = {"img_in", "txt_in", "final_layer_linear", "final_layer_adaLN_modulation_1"}
    out |= {f"{e}_in_{n}_layer" for e in ("time", "vector", "guidance") for n in ("in", "out")}
    layers = ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
    out |= {f"double_blocks_{n}_{side}_{k}" for n in range(19) for side in ("img", "txt") for k in layers}
    return out | {
        f"single_blocks_{n}_{k}" for n in range(38) for k in ("linear1", "linear2", "modulation_lin")
    }


REAL_LAYERS = {
    "sd15": lambda: unet_diffusers_layers(4, 2, {0: 1, 1: 1, 2: 1}),
    "sdxl": sdxl_original_layers,
    "sd3": sd3_original_layers,
    "flux": flux_original_layers,
}


def test_every_layer_of_the_released_model_has_a_key_that_other_tools_know(family):
    """A LoRA on every linear and convolution layer of the real denoiser: no unknown key, each with matrices
    and alpha.
    """
    facts = families.FAMILIES[family.name]
    config = denoiser_config(family.name, None)
    kinds, state = (torch.nn.Linear, torch.nn.Conv2d), {}
    with torch.device("meta"):
        for name, module in empty_denoiser(family.name, config).named_modules():
            if isinstance(module, kinds):
                state[f"{name}.lora_A.weight"] = torch.empty(2, *module.weight.shape[1:])
                state[f"{name}.lora_B.weight"] = torch.empty(module.weight.shape[0], 2)
        out = kohya_state(facts, {facts.denoiser: state}, 1.0, config)
    modules = {key.split(".")[0] for key in out}
    assert all(
        f"{m}.{end}" in out for m in modules for end in ("alpha", "lora_down.weight", "lora_up.weight")
    )
    known = {f"lora_unet_{name}" for name in REAL_LAYERS[family.name]()}
    assert not modules - known
    exceptions = {"conv_shortcut", "skip_connection", "samplers_0_conv"}  # not every block has these
    assert not {k for k in known - modules if not any(e in k for e in exceptions)}


def test_text_encoder_keys_are_known_to_other_tools(family, trained):
    known = {
        f"{prefix}_text_model_encoder_layers_{n}_{layer}"
        for prefix in {"sd15": ("lora_te",), "flux": ("lora_te1",)}.get(family.name, ("lora_te1", "lora_te2"))
        for n in range(3)
        for layer in ("mlp_fc1", "mlp_fc2", *(f"self_attn_{k}_proj" for k in ("q", "k", "v", "out")))
    }
    found = {
        k.split(".")[0] for k in load_file(trained / f"{family.name}.safetensors") if k.startswith("lora_te")
    }
    assert found and found <= known


def test_convolutions_have_their_dora_scale_as_comfyui_multiplies_it():
    name = "down_blocks.0.resnets.0.conv1"
    state = {f"{name}.lora_A.weight": torch.ones(2, 4, 3, 3), f"{name}.lora_B.weight": torch.ones(8, 2, 1, 1)}
    out = kohya_state(
        families.SD15, {"unet": state | {f"{name}.lora_magnitude_vector": torch.ones(1, 8, 1, 1)}}, 1.0, {}
    )
    assert out["lora_unet_down_blocks_0_resnets_0_conv1.dora_scale"].shape == (8, 1, 1, 1)


def test_readme_says_how_exactly_other_tools_draw_dora():
    """ComfyUI divides by the norm of the base's rows, AUTOMATIC1111 by that of the new weight's columns,
    kohya's by nothing.
    """
    torch.manual_seed(0)
    rows = []
    for where, shape in (
        ("as many inputs as outputs", (640, 640)),
        ("1280 outputs, 2048 inputs", (1280, 2048)),
    ):
        for size in (0.03, 0.1, 0.3):
            weight, update = torch.randn(shape), torch.randn(shape[0], 8) @ torch.randn(8, shape[1])
            whole = weight + update * (size * weight.norm() / update.norm())
            lengths = weight.norm(dim=1, keepdim=True) * (1 + 0.5 * size * torch.randn(shape[0], 1))
            exact = lengths * whole / whole.norm(dim=1, keepdim=True)
            drawn = (
                lengths * whole / weight.norm(dim=1, keepdim=True),
                lengths * whole / whole.norm(dim=0),
                whole,
            )
            errors = [f"{((other - exact).norm() / (exact - weight).norm()).item():.0%}" for other in drawn]
            rows.append(f"| {where}, update {size:.0%} | exact | {' | '.join(errors)} |")
    page = (ROOT / "docs" / "lora-files.md").read_text(encoding="utf-8")
    assert not [row for row in rows if row not in page], "\n".join(rows)


def test_metadata_of_both_files_is_what_other_tools_read(family, trained, capsys):
    """AUTOMATIC1111 hides a LoRA whose ss_base_model_version is another model's, and shows tags and trigger
    words.
    """
    version, architecture = {
        "sd15": ("sd_v1", "stable-diffusion-v1"),
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        "sd3": ("medium", "stable-diffusion-3-medium"),
        "flux": ("flux1", "flux-1-dev"),
    }[family.name]
    for name in ("pytorch_lora_weights", family.name):
        with safe_open(trained / f"{name}.safetensors", "pt") as file:
            said = file.metadata()
        assert (
            said["ss_base_model_version"] == version
            and said["modelspec.architecture"] == f"{architecture}/lora"
        )
        assert said["modelspec.trigger_phrase"] == "sks" and said["ss_learning_rate"] == "0.02"
        assert said["ss_max_train_steps"] == "4" and said["ss_num_train_images"] == "12"
        (tags,) = json.loads(said["ss_tag_frequency"]).values()
        assert sum(tags.values()) == 12
        assert inspect_lora.main([str(trained / f"{name}.safetensors"), "--base", family.base]) in (0, 1)
        shown = capsys.readouterr().out
        assert (
            f"base_model_version {version}" in shown
            and "max_train_steps 4" in shown
            and "learning_rate 0.02" in shown
        )
    back = trained.parent / f"{family.name}_back.safetensors"
    assert (
        convert_lora.main([str(trained / f"{family.name}.safetensors"), str(back), "--base", family.base])
        == 0
    )
    with safe_open(back, "pt") as file:
        assert file.metadata().items() >= {k: v for k, v in said.items() if k.startswith("ss_")}.items()


@pytest.mark.parametrize(
    ("name", "change", "version", "architecture"),
    [
        ("sd15", {"cross_attention_dim": 1024}, "sd_v2", "stable-diffusion-v2-512"),
        (
            "sd3",
            {"num_layers": 38, "dual_attention_layers": ()},
            "5-large",
            "stable-diffusion-3-5-large",
        ),
        (
            "sd3",
            {"num_layers": 24, "dual_attention_layers": (0,)},
            "5-medium",
            "stable-diffusion-3-5-medium",
        ),
        ("flux", {"guidance_embeds": False}, "flux1", "flux-1-schnell"),
    ],
)
def test_other_models_of_a_family_are_named_in_the_metadata(name, change, version, architecture):
    said = base_versions(families.FAMILIES[name], change, {})
    assert (
        said["ss_base_model_version"] == version and said["modelspec.architecture"] == f"{architecture}/lora"
    )
    assert said["ss_v2"] == str(version == "sd_v2")
