"""What was trained works elsewhere: converted, merged, inspected, and read by other tools' key lists."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, load_script, run_here
from safetensors.torch import load_file, save_file

from lora_training.inference.adapters import DIFFUSERS_KEY
from scripts.lora import convert_lora, inspect_lora, merge_lora, resize_lora
from scripts.lora.parts.lora_files import FileError, read_lora, to_kohya
from scripts.lora.parts.low_rank import doras_weight
from scripts.lora.parts.original_layout import BaseWeights, single_file
from scripts.parts.released_models import denoiser_config, meta_denoiser

pytestmark = pytest.mark.run


@pytest.fixture
def trained(family, shelf):
    """A short run with text encoder and alpha half the rank, shared by the tests of a family."""
    output = shelf / "exports" / family.name
    if not (output / "README.md").exists():
        flags = ("-d", SAMPLE, "--train_text_encoder", "--rank", 4, "--lora_alpha", 2, "--learning_rate", 2e-2)
        layers = ("--lora_layers", *family.lora_layers, "--trigger_word", "sks")
        assert run_here(family, output, *flags, *layers, "--max_train_steps", 4) == 0
    return output


def same_lora(a, b) -> bool:
    """Whether two LoRAs have the same layers with the same matrices and alphas."""
    first, second = ({(part, name): x for part, name, x in lora} for lora in (a, b))
    return first.keys() == second.keys() and all(
        torch.equal(x.down, second[k].down) and torch.equal(x.up, second[k].up) and x.alpha == second[k].alpha
        for k, x in first.items()
    )


def test_both_files_of_a_run_hold_the_same_lora(family, trained):
    own = read_lora(trained)
    other = read_lora(trained / f"{family.name}.safetensors", base=family.base)
    assert own.family == other.family == family.name
    assert same_lora(own, other)
    assert {x.alpha / x.rank for _, _, x in own} == {0.5}
    assert set(own.layers) >= {"text_encoder", load_script(family.script).DENOISER}


def test_conversion_there_and_back(family, trained, tmp_path, capsys):
    there, back = tmp_path / "comfy.safetensors", tmp_path / "back" / "pytorch_lora_weights.safetensors"
    assert convert_lora.main([str(trained), str(there), "--base", family.base]) == 0
    written, own = load_file(there), load_file(trained / f"{family.name}.safetensors")
    assert written.keys() == own.keys() and all(torch.equal(written[k], own[k]) for k in own)
    assert convert_lora.main([str(there), str(back), "--base", family.base]) == 0
    assert same_lora(read_lora(back), read_lora(trained))
    assert "for diffusers" in capsys.readouterr().out


def draw(kind, folder, family, lora=None, scale=1.0, embeddings=None):
    """One image, float, from a folder, with or without a LoRA."""
    pipeline = kind.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="x")
        pipeline.set_adapters(["x"], [scale])
    return pipeline(
        "a sks circle on a blue background", width=64, height=64, num_inference_steps=3, output_type="np",
        generator=torch.Generator().manual_seed(0), **dict(family.extra),
    ).images  # fmt: skip


def test_converted_file_draws_the_same_in_diffusers(family, studio, trained, tmp_path):
    back = tmp_path / "pytorch_lora_weights.safetensors"
    source = trained / f"{family.name}.safetensors"
    assert convert_lora.main([str(source), str(back), "--base", family.base]) == 0
    own = draw(studio.kind, family.base, family, trained / "pytorch_lora_weights.safetensors", 0.8)
    assert np.abs(draw(studio.kind, family.base, family, back, 0.8) - own).max() < 1e-4
    assert np.abs(draw(studio.kind, family.base, family) - own).max() > 0.02


def test_merged_folder_draws_what_base_and_lora_draw(family, studio, trained, tmp_path):
    target = tmp_path / "merged"
    words = [family.base, str(target), "--lora", str(trained), "0.8", "--dtype", "float32"]
    assert merge_lora.main(words) == 0
    own = draw(studio.kind, family.base, family, trained / "pytorch_lora_weights.safetensors", 0.8)
    assert np.abs(draw(studio.kind, target, family) - own).max() < 1e-4
    assert merge_lora.main([family.base, str(tmp_path / "half"), "--lora", str(trained), "0.8"]) == 0
    assert (tmp_path / "half" / "model_index.json").read_bytes() == (
        ROOT / family.base / "model_index.json"
    ).read_bytes()
    assert (
        np.abs(draw(studio.kind, tmp_path / "half", family) - own).max() < 0.15
    )  # stored in half precision, as the base


def test_single_file_merges_alike_from_folder_and_from_file(family, trained, tmp_path):
    base = tmp_path / "base.safetensors"
    save_file(single_file(family.name, ROOT / family.base), base)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    scaled = ["--lora", str(trained), "0.5", "--lora", str(trained / f"{family.name}.safetensors"), "-0.2"]
    assert merge_lora.main([family.base, str(one), *scaled, "--dtype", "float32"]) == 0
    assert merge_lora.main([str(base), str(two), *scaled, "--dtype", "float32", "--shape", family.base]) == 0
    a, b, before = load_file(one), load_file(two), load_file(base)
    assert a.keys() == b.keys() == before.keys()
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)
    assert any(not torch.equal(a[k], before[k].float()) for k in a)


def test_dora_merges_as_peft_applies_it(tmp_path):
    family = FAMILIES["sdxl"]
    import diffusers

    flags = ("-d", SAMPLE, "--use_dora", "--learning_rate", 2e-2, "--lora_layers", *family.lora_layers)
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert merge_lora.main([family.base, str(tmp_path / "m"), "--lora", str(tmp_path / "x"), "--dtype", "float32"]) == 0
    kind = diffusers.StableDiffusionXLPipeline
    own = draw(kind, family.base, family, tmp_path / "x" / "pytorch_lora_weights.safetensors")
    assert np.abs(draw(kind, tmp_path / "m", family) - own).max() < 1e-4
    assert np.abs(draw(kind, family.base, family) - own).max() > 0.01


# ------------------------------------------------------------------- the key lists of other tools, written from their formats


def unet_diffusers_layers(levels: int, layers: int, attention: dict[int, int]) -> set[str]:
    """Layers of a UNet as kohya's SD 1.x files name them. attention: {level from the top: transformer depth}."""

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
        out |= {f"joint_blocks_{n}_context_block_{k}" for k in ("attn_proj", "mlp_fc1", "mlp_fc2")} if n < 23 else set()
    return out


def flux_original_layers() -> set[str]:
    """FLUX.1-dev: 19 double blocks, 38 single ones."""
    out = {"img_in", "txt_in", "final_layer_linear", "final_layer_adaLN_modulation_1"}
    out |= {f"{e}_in_{n}_layer" for e in ("time", "vector", "guidance") for n in ("in", "out")}
    layers = ("attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin")
    out |= {f"double_blocks_{n}_{side}_{k}" for n in range(19) for side in ("img", "txt") for k in layers}
    return out | {f"single_blocks_{n}_{k}" for n in range(38) for k in ("linear1", "linear2", "modulation_lin")}


REAL_LAYERS = {
    "sd15": lambda: unet_diffusers_layers(4, 2, {0: 1, 1: 1, 2: 1}),
    "sdxl": sdxl_original_layers,
    "sd3": sd3_original_layers,
    "flux": flux_original_layers,
}


def test_every_layer_of_the_released_model_has_a_key_that_other_tools_know(family):
    """A LoRA on every linear and convolution layer of the real denoiser: no unknown key, each with matrices and alpha."""
    script = load_script(family.script)
    config = denoiser_config(family.name, None)
    kinds, state = (torch.nn.Linear, torch.nn.Conv2d), {}
    with torch.device("meta"):
        for name, module in meta_denoiser(family.name, config).named_modules():
            if isinstance(module, kinds):
                state[f"{name}.lora_A.weight"] = torch.empty(2, *module.weight.shape[1:])
                state[f"{name}.lora_B.weight"] = torch.empty(module.weight.shape[0], 2)
        out = script.kohya_state({script.DENOISER: state}, 1.0, config)
    modules = {key.split(".")[0] for key in out}
    assert all(f"{m}.{end}" in out for m in modules for end in ("alpha", "lora_down.weight", "lora_up.weight"))
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
    found = {k.split(".")[0] for k in load_file(trained / f"{family.name}.safetensors") if k.startswith("lora_te")}
    assert found and found <= known


# ------------------------------------- other trainers' files, at the released models' shapes, key by key from their formats

D, W = 3072, 1536  # widths of FLUX.1 and SD 3.5 medium
PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")


def three(block: str, *names: str, width: int = D, last: int = D) -> list[tuple[str, int]]:
    """Layers that stand under each other in one, with their heights."""
    return [(f"{block}.{name}", last if k == 3 else width) for k, name in enumerate(names)]


QKV, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
DOUBLE, SINGLE, JOINT = "transformer_blocks.7", "single_transformer_blocks.9", "transformer_blocks.5"
CLIP = "text_model.encoder.layers.3.self_attn.q_proj"
T5 = "encoder.block.2.layer.1.DenseReluDense.wi_1"
UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"
# {tool and family: (endings, {key: (columns, [(pipeline's layer, rows), …] in the order of the key's rows)})}
FILES = {
    "kohya-flux": (
        KOHYA,
        {
            "lora_unet_double_blocks_7_img_attn_qkv": (D, three(f"transformer.{DOUBLE}", *QKV)),
            "lora_unet_double_blocks_7_txt_attn_qkv": (D, three(f"transformer.{DOUBLE}", *ADDED)),
            "lora_unet_double_blocks_7_img_mlp_0": (D, [(f"transformer.{DOUBLE}.ff.net.0.proj", 4 * D)]),
            "lora_unet_double_blocks_7_txt_mod_lin": (D, [(f"transformer.{DOUBLE}.norm1_context.linear", 6 * D)]),
            "lora_unet_single_blocks_9_linear1": (D, three(f"transformer.{SINGLE}", *QKV, "proj_mlp", last=4 * D)),
            "lora_unet_single_blocks_9_linear2": (5 * D, [(f"transformer.{SINGLE}.proj_out", D)]),
            "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (768, [(f"text_encoder.{CLIP}", 768)]),
        },
    ),
    "bfl-flux": (
        PEFT,
        {
            "diffusion_model.double_blocks.7.img_attn.qkv": (D, three(f"transformer.{DOUBLE}", *QKV)),
            "diffusion_model.double_blocks.7.txt_attn.proj": (D, [(f"transformer.{DOUBLE}.attn.to_add_out", D)]),
            "diffusion_model.single_blocks.9.linear1": (D, three(f"transformer.{SINGLE}", *QKV, "proj_mlp", last=4 * D)),
            "diffusion_model.single_blocks.9.modulation.lin": (D, [(f"transformer.{SINGLE}.norm.linear", 3 * D)]),
        },
    ),
    "bfl-flux-bare": (PEFT, {"double_blocks.7.img_attn.qkv": (D, three(f"transformer.{DOUBLE}", *QKV))}),
    "x-flux": (
        ("down.weight", "up.weight"),
        {
            "double_blocks.7.processor.qkv_lora1": (D, three(f"transformer.{DOUBLE}", *QKV)),
            "double_blocks.7.processor.qkv_lora2": (D, three(f"transformer.{DOUBLE}", *ADDED)),
            "double_blocks.7.processor.proj_lora2": (D, [(f"transformer.{DOUBLE}.attn.to_add_out", D)]),
            "single_blocks.9.processor.qkv_lora": (D, three(f"transformer.{SINGLE}", *QKV)),
            "single_blocks.9.processor.proj_lora": (5 * D, [(f"transformer.{SINGLE}.proj_out", D)]),
        },
    ),
    "ai-toolkit-flux": (
        PEFT,
        {
            f"transformer.{DOUBLE}.attn.add_k_proj": (D, [(f"transformer.{DOUBLE}.attn.add_k_proj", D)]),
            f"transformer.{SINGLE}.proj_mlp": (D, [(f"transformer.{SINGLE}.proj_mlp", 4 * D)]),
            f"transformer.{SINGLE}.attn.to_q": (D, [(f"transformer.{SINGLE}.attn.to_q", D)]),
        },
    ),
    "onetrainer-flux": (
        KOHYA,
        {
            "lora_transformer_transformer_blocks_7_attn_to_out_0": (D, [(f"transformer.{DOUBLE}.attn.to_out.0", D)]),
            "lora_transformer_single_transformer_blocks_9_proj_mlp": (D, [(f"transformer.{SINGLE}.proj_mlp", 4 * D)]),
            "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (768, [(f"text_encoder.{CLIP}", 768)]),
        },
    ),
    "omi-flux": (
        KOHYA,
        {
            "transformer.double_blocks.7.img_attn.qkv.1": (D, [(f"transformer.{DOUBLE}.attn.to_k", D)]),
            "transformer.single_blocks.9.linear1.3": (D, [(f"transformer.{SINGLE}.proj_mlp", 4 * D)]),
            "transformer.img_in.proj": (64, [("transformer.x_embedder", D)]),
            f"clip_l.{CLIP}": (768, [(f"text_encoder.{CLIP}", 768)]),
        },
    ),
    "simpletuner-comfyui-flux": (
        (*PEFT, "alpha"),
        {f"diffusion_model.{SINGLE}.attn.to_k": (D, [(f"transformer.{SINGLE}.attn.to_k", D)])},
    ),
    "peft-flux": (PEFT, {f"base_model.model.{DOUBLE}.ff.net.2": (4 * D, [(f"transformer.{DOUBLE}.ff.net.2", D)])}),
    "kohya-sd3": (
        KOHYA,
        {
            "lora_unet_joint_blocks_5_x_block_attn_qkv": (W, three(f"transformer.{JOINT}", *QKV, width=W)),
            "lora_unet_joint_blocks_5_context_block_mlp_fc1": (W, [(f"transformer.{JOINT}.ff_context.net.0.proj", 4 * W)]),
            "lora_te2_text_model_encoder_layers_3_self_attn_q_proj": (1280, [(f"text_encoder_2.{CLIP}", 1280)]),
        },
    ),
    "onetrainer-sd3": (
        KOHYA,
        {
            "lora_transformer_transformer_blocks_5_attn_add_v_proj": (W, [(f"transformer.{JOINT}.attn.add_v_proj", W)]),
            "lora_transformer_transformer_blocks_5_attn2_to_q": (W, [(f"transformer.{JOINT}.attn2.to_q", W)]),
        },
    ),
    "omi-sd3": (
        KOHYA,
        {"transformer.joint_blocks.5.context_block.attn.qkv.0": (W, [(f"transformer.{JOINT}.attn.add_q_proj", W)])},
    ),
    "large-sd3": (
        KOHYA,
        {
            "lora_unet_joint_blocks_37_x_block_attn_qkv": (
                2432,
                three("transformer.transformer_blocks.37", *QKV, width=2432),
            )
        },
    ),
    "kohya-sdxl": (
        KOHYA,
        {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (2048, [(f"unet.{UNET}.to_k", 640)]),
            "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
                1280,
                [("unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj", 10240)],
            ),
            "lora_te2_text_model_encoder_layers_3_self_attn_q_proj": (1280, [(f"text_encoder_2.{CLIP}", 1280)]),
        },
    ),
    "onetrainer-sdxl": (
        KOHYA,
        {
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (2048, [(f"unet.{UNET}.to_k", 640)]),
            "lora_te2_text_projection": (1280, [("text_encoder_2.text_projection", 1280)]),
        },
    ),
    "omi-sdxl": (KOHYA, {"unet.input_blocks.4.1.transformer_blocks.0.attn2.to_out.0": (640, [(f"unet.{UNET}.to_out.0", 640)])}),
    "kohya-sd15": (
        KOHYA,
        {
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (768, [(f"unet.{UNET}.to_k", 640)]),
            "lora_te_text_model_encoder_layers_3_self_attn_q_proj": (768, [(f"text_encoder.{CLIP}", 768)]),
        },
    ),
    "kohya-sd2": (
        KOHYA,
        {
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (1024, [(f"unet.{UNET}.to_k", 640)]),
            "lora_te_text_model_encoder_layers_22_self_attn_q_proj": (
                1024,
                [("text_encoder.text_model.encoder.layers.22.self_attn.q_proj", 1024)],
            ),
        },
    ),
    "processors-sd15": (
        ("down.weight", "up.weight"),
        {
            f"unet.{UNET}.processor.to_out_lora": (640, [(f"unet.{UNET}.to_out.0", 640)]),
            f"{UNET}.processor.to_v_lora": (768, [(f"unet.{UNET}.to_v", 640)]),
        },
    ),
}  # fmt: skip


def foreign_file(tool: str, file, dtype=torch.float32, rank: int = 2) -> dict[str, torch.Tensor]:
    """Writes a file as this tool does; returns what the update of each layer makes of a few inputs, float64."""
    endings, keys = FILES[tool]
    state, updates, generator = {}, {}, torch.Generator().manual_seed(0)
    for key, (columns, layers) in keys.items():
        down = torch.randn(rank, columns, generator=generator).to(dtype)
        up = torch.randn(sum(rows for _, rows in layers), rank, generator=generator).to(dtype)
        state |= {f"{key}.{endings[0]}": down, f"{key}.{endings[1]}": up}
        scale = 1.0
        if len(endings) == 3:
            state[f"{key}.alpha"], scale = torch.tensor(0.5, dtype=dtype), 0.5 / rank
        row = 0
        for name, rows in layers:
            updates[name] = up[row : row + rows].double() @ (down.double() @ probe(columns)) * scale
            row += rows
    save_file(state, file)
    return updates


def probe(columns: int) -> torch.Tensor:
    return torch.randn(columns, 16, generator=torch.Generator().manual_seed(1)).double()


def error_of(file, updates: dict[str, torch.Tensor]) -> float:
    """The largest distance of a file's update from these, as a share of theirs."""
    found = {f"{part}.{name}": layer for part, name, layer in read_lora(file)}
    assert found.keys() == updates.keys()
    errors = []
    for name, update in updates.items():
        up, down = found[name].up.double(), found[name].down.double()
        own = up @ (down @ probe(down.shape[1])) * (found[name].alpha / found[name].rank)
        errors.append(((own - update).norm() / update.norm()).item())
    return max(errors)


@pytest.mark.parametrize("tool", FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_other_trainers_files_keep_their_update_both_ways(tool, dtype, tmp_path):
    """To diffusers and on to kohya's spelling and back, at the released models' shapes; what was fused doesn't grow."""
    source, first, second, third = (tmp_path / f"{n}.safetensors" for n in ("source", "a", "b", "c"))
    updates = foreign_file(tool, source, dtype)
    for a, b, to in ((source, first, "diffusers"), (first, second, "kohya"), (second, third, "diffusers")):
        assert convert_lora.main([str(a), str(b), "--to", to]) == 0
        assert error_of(b, updates) < 1e-6
    if tool.startswith("kohya"):
        assert sum(t.numel() for t in load_file(second).values()) == sum(t.numel() for t in load_file(source).values())


def test_infer_lora_leaves_to_diffusers_what_it_reads_right(family, trained):
    """What another trainer names otherwise is converted before it is loaded."""
    own = DIFFUSERS_KEY
    assert all(own.match(key) for key in load_file(trained / "pytorch_lora_weights.safetensors"))
    for tool, (endings, keys) in FILES.items():
        assert all(own.match(f"{key}.{endings[0]}") for key in keys) == (tool == "ai-toolkit-flux")


KEY, LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", f"{UNET}.to_k"  # (640, 2048) in SDXL
LOKR, QUERY = f"lycoris_{SINGLE.replace('.', '_')}_attn_to_q", f"{SINGLE}.attn.to_q"  # (3072, 3072) in FLUX.1


def factors(**shapes) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def loha() -> tuple[dict, torch.Tensor, str]:
    f = factors(hada_w1_a=(640, 3), hada_w1_b=(3, 2048), hada_w2_a=(640, 3), hada_w2_b=(3, 2048))
    update = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"]) / 3  # alpha 1
    return {f"{KEY}.{k}": v for k, v in f.items()} | {f"{KEY}.alpha": torch.tensor(1.0)}, update, LAYER


def lokr() -> tuple[dict, torch.Tensor, str]:
    f = factors(lokr_w1=(4, 4), lokr_w2_a=(768, 2), lokr_w2_b=(2, 768))
    update = torch.kron(f["lokr_w1"], f["lokr_w2_a"] @ f["lokr_w2_b"]) * 0.5  # alpha 1, rank 2
    return {f"{LOKR}.{k}": v for k, v in f.items()} | {f"{LOKR}.alpha": torch.tensor(1.0)}, update, QUERY


def convolution() -> tuple[dict, torch.Tensor, str]:
    """A LoHa with a core, on a 3 x 3 convolution."""
    f = factors(hada_w1_a=(2, 320), hada_w1_b=(2, 320), hada_t1=(2, 2, 3, 3))
    f |= factors(hada_w2_a=(2, 320), hada_w2_b=(2, 320), hada_t2=(2, 2, 3, 3))
    halves = [torch.einsum("abkl,ao,bi->oikl", f[f"hada_t{n}"], f[f"hada_w{n}_a"], f[f"hada_w{n}_b"]) for n in (1, 2)]
    key = "lora_unet_input_blocks_1_0_in_layers_2"
    return {f"{key}.{k}": v for k, v in f.items()}, halves[0] * halves[1], "down_blocks.0.resnets.0.conv1"


def difference() -> tuple[dict, torch.Tensor, str]:
    update = torch.randn(640, 5) @ torch.randn(5, 2048)
    return {f"{KEY}.diff": update}, update, LAYER


@pytest.mark.parametrize(("kind", "rank"), [(loha, 9), (lokr, 8), (convolution, 4), (difference, 5)])
def test_loha_lokr_and_differences_become_plain_loras(kind, rank, tmp_path, capsys):
    """At the rank that they have, nothing is lost; at half of it, as much as the line says."""
    tensors, update, layer = kind()
    save_file(tensors, tmp_path / "x.safetensors")
    for given in (rank, rank // 2):
        target = tmp_path / f"{given}.safetensors"
        assert convert_lora.main([str(tmp_path / "x.safetensors"), str(target), "--rank", str(given)]) == 0
        made = next(x for _, name, x in read_lora(target) if name == layer)
        lost = ((made.update() - update).norm() / update.norm()).item()
        said = capsys.readouterr().out
        printed = float(said.split("% of the update")[0].rsplit(" ", 1)[1]) / 100
        assert made.rank == given and printed == pytest.approx(lost, abs=1e-3)
        assert lost < 1e-4 if given == rank else lost > 0.01
    assert inspect_lora.main([str(tmp_path / "x.safetensors")]) in (0, 1)
    assert "(LoHa)" in capsys.readouterr().out or kind not in (loha, convolution)


def test_resized_lora_is_the_best_of_its_rank(family, trained, tmp_path, capsys):
    source, target = trained / f"{family.name}.safetensors", tmp_path / "small.safetensors"
    exact = {(part, name): x.update() for part, name, x in read_lora(source, base=family.base)}
    sizes = {}
    for flags in (["--rank", "2"], ["--keep", "0.9"], ["--keep", "1"]):
        assert resize_lora.main([str(source), str(target), *flags, "--base", family.base]) == 0
        small = {(part, name): x for part, name, x in read_lora(target, base=family.base)}
        assert small.keys() == exact.keys()
        lost = sum((small[k].update() - u).square().sum() for k, u in exact.items())
        share = (lost / sum(u.square().sum() for u in exact.values())).sqrt().item()
        said = capsys.readouterr().out
        printed = float(said.split("% of the update")[0].rsplit(" ", 1)[1]) / 100
        assert printed == pytest.approx(share, abs=1e-4)
        sizes[flags[1]] = (target.stat().st_size, share)
        assert all(
            t.shape[0] == 2 for k, t in load_file(target).items() if flags[1] == "2" and k.endswith("lora_down.weight")
        )
    assert sizes["1"][1] < 1e-5 and 0 < sizes["0.9"][1] < 0.33 and sizes["2"][0] < source.stat().st_size
    assert resize_lora.main([str(source), str(target)]) == 2
    assert resize_lora.main([str(source), str(source), "--rank", "2"]) == 2
    assert "name another target" in capsys.readouterr().err


@pytest.mark.families("flux", "sd3")
def test_dora_of_default_layers_is_written_for_other_tools(family, tmp_path, capsys):
    """Where the original holds layers as one, those without LoRA keep their norms; a plain LoRA of it is the way out."""
    output = tmp_path / "x"
    assert run_here(family, output, "-d", SAMPLE, "--use_dora", "--learning_rate", 2e-2) == 0
    assert "resize_lora.py" in capsys.readouterr().out
    own, other = read_lora(output), read_lora(output / "x.safetensors")
    weights = BaseWeights(ROOT / family.base, family.name, own.base.config)

    def merged(lora):
        return {(part, n): doras_weight(weights(part, n), x.update(), x) for part, n, x in lora}

    first, second = merged(own), merged(other)
    assert all(torch.equal(first[k], second[k]) for k in first) and len(second) > len(first)
    assert all(torch.allclose(second[k], weights(*k).float(), atol=1e-6) for k in second.keys() - first.keys())
    file, small = tmp_path / "alone.safetensors", tmp_path / "small.safetensors"
    shutil.copy(output / "x.safetensors", file)
    assert resize_lora.main([str(file), str(small), "--keep", "0.9999", "--base", family.base]) == 0
    plain = {(part, n): weights(part, n).float() + x.update() for part, n, x in read_lora(small)}
    total = sum((first[k] - weights(*k).float()).square().sum() for k in first)
    assert sum((plain[k] - first[k]).square().sum() for k in first) < 1e-3 * total
    assert convert_lora.main([str(output), str(tmp_path / "again.safetensors")]) == 0
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.allclose(again[k], t, atol=1e-6) for k, t in load_file(output / "x.safetensors").items())


def test_dora_of_the_first_lycoris_merges_by_columns(tmp_path, capsys):
    """dora_scale (1, in): diffusers has no place for it, merging does what its formula says."""
    base, name = FAMILIES["sd15"].base, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = BaseWeights(ROOT / base, "sd15", {})
    weight = weights("unet", name).float()
    down, up, scale = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2), torch.rand(1, weight.shape[1])
    key, file = f"lora_unet_{name.replace('.', '_')}", tmp_path / "x.safetensors"
    save_file({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": scale}, file)
    assert merge_lora.main([base, str(tmp_path / "m"), "--lora", str(file), "--dtype", "float32"]) == 0
    whole = weight + up @ down
    expected = whole * scale / whole.norm(dim=0, keepdim=True)
    merged = BaseWeights(tmp_path / "m", "sd15", {})("unet", name)
    assert torch.allclose(merged, expected, atol=1e-5)
    assert convert_lora.main([str(file), str(tmp_path / "y.safetensors"), "--base", base]) == 2
    assert "diffusers has no place for DoRA by columns; scripts/lora/resize_lora.py" in capsys.readouterr().err
    small = tmp_path / "z.safetensors"
    assert resize_lora.main([str(file), str(small), "--rank", "64", "--base", base]) == 0
    plain = read_lora(small, base=base).layers["unet"][name].update()
    assert (weight + plain - expected).norm() < 1e-4 * expected.norm()


def test_readme_says_how_exactly_other_tools_draw_dora():
    """ComfyUI divides by the norm of the base's rows, AUTOMATIC1111 by that of the new weight's columns, kohya's by nothing."""
    torch.manual_seed(0)
    rows = []
    for where, shape in (("as many inputs as outputs", (640, 640)), ("1280 outputs, 2048 inputs", (1280, 2048))):
        for size in (0.03, 0.1, 0.3):
            weight, update = torch.randn(shape), torch.randn(shape[0], 8) @ torch.randn(8, shape[1])
            whole = weight + update * (size * weight.norm() / update.norm())
            lengths = weight.norm(dim=1, keepdim=True) * (1 + 0.5 * size * torch.randn(shape[0], 1))
            exact = lengths * whole / whole.norm(dim=1, keepdim=True)
            drawn = (lengths * whole / weight.norm(dim=1, keepdim=True), lengths * whole / whole.norm(dim=0), whole)
            errors = [f"{((other - exact).norm() / (exact - weight).norm()).item():.0%}" for other in drawn]
            rows.append(f"| {where}, update {size:.0%} | exact | {' | '.join(errors)} |")
    readme = (ROOT / "README.md").read_text()
    assert not [row for row in rows if row not in readme], "\n".join(rows)


def test_convolutions_have_their_dora_scale_as_comfyui_multiplies_it():
    script = load_script("train_lora_sd15.py")
    name = "down_blocks.0.resnets.0.conv1"
    state = {f"{name}.lora_A.weight": torch.ones(2, 4, 3, 3), f"{name}.lora_B.weight": torch.ones(8, 2, 1, 1)}
    out = script.kohya_state({"unet": state | {f"{name}.lora_magnitude_vector": torch.ones(1, 8, 1, 1)}}, 1.0, {})
    assert out["lora_unet_down_blocks_0_resnets_0_conv1.dora_scale"].shape == (8, 1, 1, 1)


def test_foreign_file_with_one_pair_for_a_fused_layer(tmp_path):
    """kohya's own Flux training has one rank for q, k and v together: every part gets the down matrix and its rows."""
    d = 128
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{key}.lora_down.weight": torch.randn(4, d), f"{key}.lora_up.weight": torch.randn(3 * d, 4)}
    save_file(state | {f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", base=FAMILIES["flux"].base)
    whole = state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"] / 4
    for k, name in enumerate(("to_q", "to_k", "to_v")):
        layer = lora.layers["transformer"][f"transformer_blocks.0.attn.{name}"]
        assert torch.allclose(layer.update(), whole[k * d : (k + 1) * d], atol=1e-5)
    again = to_kohya(lora)
    update = again[f"{key}.lora_up.weight"] @ again[f"{key}.lora_down.weight"] / len(again[f"{key}.lora_down.weight"])
    assert torch.allclose(update * again[f"{key}.alpha"], whole, atol=1e-4)


def test_peft_adapter_folder(tmp_path):
    """adapter_model.safetensors with adapter_config.json, as peft itself writes them; rsLoRA's scale is kept."""
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(4, 320),
        f"base_model.model.{name}.lora_B.weight": torch.randn(320, 4),
    }
    (tmp_path / "peft").mkdir()
    save_file(state, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True}))
    layer = read_lora(tmp_path / "peft", family="sd15").layers["unet"][name]
    a, b = state.values()
    assert torch.allclose(layer.update(), b @ a * 8 / 4**0.5, atol=1e-4)


class Payload:
    def __reduce__(self):
        return (open, ("/tmp/lora_payload_was_run", "w"))


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt"])
def test_pickles_are_refused_unexecuted(name, tmp_path, capsys):
    import os

    if os.path.exists("/tmp/lora_payload_was_run"):
        os.remove("/tmp/lora_payload_was_run")
    file = tmp_path / name
    file.write_bytes(pickle.dumps({"x": Payload()}))
    base = FAMILIES["sd15"].base
    assert convert_lora.main([str(file), str(tmp_path / "y.safetensors")]) == 2
    assert inspect_lora.main([str(file)]) == 2
    assert merge_lora.main([base, str(tmp_path / "m"), "--lora", str(file)]) == 2
    assert (
        load_script("infer_lora.py").main(["--paths.base_model_path", base, "--paths.lora_weights_path", str(file)])
        == 2
    )
    assert "can run code" in capsys.readouterr().err
    if name == "x.ckpt":
        assert run_here(FAMILIES["sd15"], tmp_path / "t", "-d", SAMPLE, "-m", file) == 2
        assert load_script("infer_lora.py").main(["--paths.base_model_path", str(file)]) == 2
    assert not os.path.exists("/tmp/lora_payload_was_run")


def edited(source, target, change) -> None:
    """A copy of a LoRA file with its tensors changed."""
    from safetensors import safe_open

    with safe_open(source, "pt") as opened:
        metadata = opened.metadata()
    save_file({k: change(k, v.clone()).contiguous() for k, v in load_file(source).items()}, target, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (lambda k, v: v, 0, "sound"),
        (lambda k, v: v * 0 if "up" in k or "lora_B" in k else v, 1, "ZERO"),
        (lambda k, v: v * 1e-9 if "up" in k or "lora_B" in k else v, 1, "TOO FAINT"),
        (lambda k, v: v * 1e4 if "up" in k or "lora_B" in k else v, 1, "OUT OF SCALE"),
        (lambda k, v: v * float("nan") if "mid_block" in k and ("up" in k) else v, 1, "NOT FINITE"),
    ],
    ids=["sound", "zero", "faint", "huge", "nan"],
)
def test_inspect_says_why_a_lora_has_no_effect(shelf, tmp_path, capsys, change, code, words):
    family = FAMILIES["sd15"]
    output = shelf / "inspected"
    if not output.exists():
        assert run_here(family, output, "-d", SAMPLE, "--learning_rate", 1e-3, "--trigger_word", "sks") == 0
    file = tmp_path / "pytorch_lora_weights.safetensors"
    edited(output / "pytorch_lora_weights.safetensors", file, change)
    capsys.readouterr()
    plot = tmp_path / "plot.png"
    assert inspect_lora.main([str(file), "--plot", str(plot), "--base", family.base]) == code
    said = capsys.readouterr().out
    assert words in said and "family          sd15" in said and "rank            4" in said
    from PIL import Image

    assert plot.exists() and Image.open(plot).width == 900
    if words == "NOT FINITE":
        assert merge_lora.main([family.base, str(tmp_path / "m"), "--lora", str(file)]) == 2
        assert "not finite" in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_metadata_of_both_files_is_what_other_tools_read(family, trained, capsys):
    """AUTOMATIC1111 hides a LoRA whose ss_base_model_version is another model's, and shows tags and trigger words."""
    from safetensors import safe_open

    version, architecture = {
        "sd15": ("sd_v1", "stable-diffusion-v1"),
        "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        "sd3": ("medium", "stable-diffusion-3-medium"),
        "flux": ("flux1", "flux-1-dev"),
    }[family.name]
    for name in ("pytorch_lora_weights", family.name):
        with safe_open(trained / f"{name}.safetensors", "pt") as file:
            said = file.metadata()
        assert said["ss_base_model_version"] == version and said["modelspec.architecture"] == f"{architecture}/lora"
        assert said["modelspec.trigger_phrase"] == "sks" and said["ss_learning_rate"] == "0.02"
        assert said["ss_max_train_steps"] == "4" and said["ss_num_train_images"] == "12"
        (tags,) = json.loads(said["ss_tag_frequency"]).values()
        assert sum(tags.values()) == 12
        assert inspect_lora.main([str(trained / f"{name}.safetensors"), "--base", family.base]) in (0, 1)
        shown = capsys.readouterr().out
        assert (
            f"base_model_version {version}" in shown and "max_train_steps 4" in shown and "learning_rate 0.02" in shown
        )
    back = trained.parent / f"{family.name}_back.safetensors"
    assert convert_lora.main([str(trained / f"{family.name}.safetensors"), str(back), "--base", family.base]) == 0
    with safe_open(back, "pt") as file:
        assert file.metadata().items() >= {k: v for k, v in said.items() if k.startswith("ss_")}.items()


@pytest.mark.parametrize(
    ("name", "change", "version", "architecture"),
    [
        ("train_lora_sd15.py", {"cross_attention_dim": 1024}, "sd_v2", "stable-diffusion-v2-512"),
        ("train_lora_sd3.py", {"num_layers": 38, "dual_attention_layers": ()}, "5-large", "stable-diffusion-3-5-large"),
        ("train_lora_sd3.py", {"num_layers": 24, "dual_attention_layers": (0,)}, "5-medium", "stable-diffusion-3-5-medium"),
        ("train_dreambooth_lora_flux_advanced.py", {"guidance_embeds": False}, "flux1", "flux-1-schnell"),
    ],
)  # fmt: skip
def test_other_models_of_a_family_are_named_in_the_metadata(name, change, version, architecture):
    said = load_script(name).base_versions(change, {})
    assert said["ss_base_model_version"] == version and said["modelspec.architecture"] == f"{architecture}/lora"
    assert said["ss_v2"] == str(version == "sd_v2")


def test_inspect_names_trigger_words_and_text_encoders(family, trained, capsys):
    assert inspect_lora.main([str(trained / f"{family.name}.safetensors"), "--base", family.base]) in (0, 1)
    said = capsys.readouterr().out
    assert "trigger words   sks" in said and "text_encoder" in said and "alpha / rank    0.5" in said


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_unet_nowhere.lora_down.weight", "not a layer of"),
        ("lora_unet_conv_in.hada_w1_a", "LoHa"),
        ("lora_unet_conv_in.lokr_w1", "LoKr"),
        ("model.weight", "not a key of a LoRA"),
        ("lora_unet_conv_in.oft_blocks", "OFT can't be"),
        ("lora_unet_conv_in.a1.weight", "GLoRA can't be"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "a control LoRA"),
    ],
)
def test_other_adapters_are_named(key, words, tmp_path):
    state = {key: torch.ones(4, 4)}
    if key.endswith("lora_down.weight"):
        state[key.replace("down", "up")] = torch.ones(4, 4)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match=words):
        read_lora(tmp_path / "x.safetensors", base=FAMILIES["sd15"].base, family="sd15")


def test_a_lora_for_another_base_is_one_line(tmp_path, capsys):
    """Of another family, or of another width than the released model: named, with the way out."""
    wide = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 128)}
    wide["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"] = torch.ones(128, 2)
    save_file(wide, tmp_path / "flux.safetensors")
    assert convert_lora.main([str(tmp_path / "flux.safetensors"), str(tmp_path / "x.safetensors")]) == 2
    assert "has 3072; --base FOLDER" in capsys.readouterr().err
    name = "unet.mid_block.attentions.0.proj_in"
    save_file({f"{name}.lora.{k}.weight": torch.ones(4, 4) for k in ("up", "down")}, tmp_path / "sd.safetensors")
    words = [FAMILIES["flux"].base, str(tmp_path / "m"), "--lora", str(tmp_path / "sd.safetensors")]
    assert merge_lora.main(words) == 2
    assert "a LoRA with a unet does not fit flux" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [("clip_l", "t5xxl"), ("emb_params",)])
def test_embeddings_of_other_tools_are_read(keys, tmp_path, capsys):
    theirs = {key: torch.randn(2, 8) for key in keys}
    save_file(theirs, tmp_path / "a.safetensors")
    assert convert_lora.main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    assert "for diffusers" in capsys.readouterr().out
    ours = load_file(tmp_path / "b.safetensors")
    assert set(ours) == {"clip_l", "t5"} if len(keys) == 2 else {"clip_l"}
    assert torch.equal(ours["clip_l"], theirs[keys[0]])


def test_embeddings_for_comfyui_and_back(tmp_path):
    ours = {"clip_l": torch.randn(2, 8), "t5": torch.randn(2, 16)}
    save_file(ours, tmp_path / "a.safetensors")
    assert convert_lora.main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 0
    assert set(load_file(tmp_path / "b.safetensors")) == {"clip_l", "t5xxl"}
    assert convert_lora.main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors")]) == 0
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == ours.keys() and all(torch.equal(back[k], ours[k]) for k in ours)


@pytest.mark.parametrize(
    ("name", "suffix"), [("sd15", ".ckpt"), ("sd15", ".safetensors"), ("sdxl", ".safetensors"), ("sd3", ".safetensors")]
)
def test_single_file_base_trains_and_draws(name, suffix, tmp_path, monkeypatch):
    """A checkpoint in a folder of configurations: the run equals that on the diffusers folder, and pictures are drawn."""
    from conftest import losses

    family = FAMILIES[name]
    folder = tmp_path / "base"
    text = (
        "text_encoder*" if name != "sd3" else ""
    )  # both CLIPs of SD3's toy are of one width, which the reader goes by
    shutil.copytree(family.base, folder)
    for pattern in ("unet", "transformer", "vae", text):
        for part in folder.glob(pattern) if pattern else []:
            for weights in part.glob("*.safetensors"):
                weights.unlink()
    tensors = {k: v for k, v in single_file(name, ROOT / family.base).items() if text or not k.startswith("text_enc")}
    file = folder / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors}, file)
    else:
        save_file(tensors, file)
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ("-d", SAMPLE, "--max_train_steps", 2, "--cache_dir", tmp_path / "cache")
    assert run_here(family, tmp_path / "x", *flags, "-m", file) == 0
    assert run_here(family, tmp_path / "y", *flags) == 0
    assert losses(tmp_path / "x") == pytest.approx(losses(tmp_path / "y"), abs=1e-5)
    if suffix == ".safetensors":
        infer = load_script("infer_lora.py")
        words = ["--paths.base_model_path", str(file), "--paths.lora_weights_path", str(tmp_path / "x")]
        words += [
            "--paths.infer_path",
            str(tmp_path / "pictures"),
            "--prompt",
            "a red circle",
            "--num_inference_steps",
            "2",
        ]
        words += [
            "--num_generations",
            "1",
            "--adapter_scale",
            "1",
            "--resolution.width",
            "64",
            "--resolution.height",
            "64",
        ]
        assert infer.main(words) == 0
        assert list((tmp_path / "pictures").rglob("*.png"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_passed_on(tmp_path, capsys, value):
    """Of a LoRA and of embeddings: a converted file would only hide where they came from."""
    from conftest import FAMILIES

    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    files = {"lora": {f"{layer}.lora.down.weight": torch.ones(2, 48), f"{layer}.lora.up.weight": torch.ones(48, 2)}}
    files["emb"] = {"clip_l": torch.ones(2, 64)}
    for name, tensors in files.items():
        next(iter(tensors.values()))[0, 0] = value
        source, target = tmp_path / f"{name}.safetensors", tmp_path / f"{name}_out.safetensors"
        save_file(tensors, source)
        assert convert_lora.main([str(source), str(target), "--family", "sd15", "--base", FAMILIES["sd15"].base]) == 2
        assert "not finite" in capsys.readouterr().err and not target.exists()
