"""Other trainers' files, at the released models' shapes, key by key from their formats."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_loras import train_with_text_encoder

from lora_training.inference.adapters import DIFFUSERS_KEY
from lora_training.lora.reading import read_lora
from scripts.lora import convert_lora, inspect_lora

pytestmark = pytest.mark.run


@pytest.fixture
def trained(family, shelf):
    """A short run with text encoder and alpha half the rank, shared by the tests of a family."""
    return train_with_text_encoder(family, shelf)


D, W = 3072, 1536  # widths of FLUX.1 and SD 3.5 medium


PEFT = ("lora_A.weight", "lora_B.weight")


KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")


def three(block: str, *names: str, width: int = D, last: int = D) -> list[tuple[str, int]]:
    """Layers that stand under each other in one, with their heights."""
    return [(f"{block}.{name}", last if k == 3 else width) for k, name in enumerate(names)]


QKV, ADDED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)


DOUBLE, SINGLE, JOINT = "transformer_blocks.7", "single_transformer_blocks.9", "transformer_blocks.5"


CLIP = "text_model.encoder.layers.3.self_attn.q_proj"


T5 = "encoder.block.2.layer.1.DenseReluDense.wi_1"


UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


FILES = {
    "kohya-flux": (
        KOHYA,
        {
            "lora_unet_double_blocks_7_img_attn_qkv": (D, three(f"transformer.{DOUBLE}", *QKV)),
            "lora_unet_double_blocks_7_txt_attn_qkv": (D, three(f"transformer.{DOUBLE}", *ADDED)),
            "lora_unet_double_blocks_7_img_mlp_0": (D, [(f"transformer.{DOUBLE}.ff.net.0.proj", 4 * D)]),
            "lora_unet_double_blocks_7_txt_mod_lin": (
                D,
                [(f"transformer.{DOUBLE}.norm1_context.linear", 6 * D)],
            ),
            "lora_unet_single_blocks_9_linear1": (
                D,
                three(f"transformer.{SINGLE}", *QKV, "proj_mlp", last=4 * D),
            ),
            "lora_unet_single_blocks_9_linear2": (5 * D, [(f"transformer.{SINGLE}.proj_out", D)]),
            "lora_te1_text_model_encoder_layers_3_self_attn_q_proj": (768, [(f"text_encoder.{CLIP}", 768)]),
        },
    ),
    "bfl-flux": (
        PEFT,
        {
            "diffusion_model.double_blocks.7.img_attn.qkv": (D, three(f"transformer.{DOUBLE}", *QKV)),
            "diffusion_model.double_blocks.7.txt_attn.proj": (
                D,
                [(f"transformer.{DOUBLE}.attn.to_add_out", D)],
            ),
            "diffusion_model.single_blocks.9.linear1": (
                D,
                three(f"transformer.{SINGLE}", *QKV, "proj_mlp", last=4 * D),
            ),
            "diffusion_model.single_blocks.9.modulation.lin": (
                D,
                [(f"transformer.{SINGLE}.norm.linear", 3 * D)],
            ),
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
            "lora_transformer_transformer_blocks_7_attn_to_out_0": (
                D,
                [(f"transformer.{DOUBLE}.attn.to_out.0", D)],
            ),
            "lora_transformer_single_transformer_blocks_9_proj_mlp": (
                D,
                [(f"transformer.{SINGLE}.proj_mlp", 4 * D)],
            ),
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
    "peft-flux": (
        PEFT,
        {f"base_model.model.{DOUBLE}.ff.net.2": (4 * D, [(f"transformer.{DOUBLE}.ff.net.2", D)])},
    ),
    "kohya-sd3": (
        KOHYA,
        {
            "lora_unet_joint_blocks_5_x_block_attn_qkv": (W, three(f"transformer.{JOINT}", *QKV, width=W)),
            "lora_unet_joint_blocks_5_context_block_mlp_fc1": (
                W,
                [(f"transformer.{JOINT}.ff_context.net.0.proj", 4 * W)],
            ),
            "lora_te2_text_model_encoder_layers_3_self_attn_q_proj": (
                1280,
                [(f"text_encoder_2.{CLIP}", 1280)],
            ),
        },
    ),
    "onetrainer-sd3": (
        KOHYA,
        {
            "lora_transformer_transformer_blocks_5_attn_add_v_proj": (
                W,
                [(f"transformer.{JOINT}.attn.add_v_proj", W)],
            ),
            "lora_transformer_transformer_blocks_5_attn2_to_q": (W, [(f"transformer.{JOINT}.attn2.to_q", W)]),
        },
    ),
    "omi-sd3": (
        KOHYA,
        {
            "transformer.joint_blocks.5.context_block.attn.qkv.0": (
                W,
                [(f"transformer.{JOINT}.attn.add_q_proj", W)],
            )
        },
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
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (
                2048,
                [(f"unet.{UNET}.to_k", 640)],
            ),
            "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
                1280,
                [("unet.mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj", 10240)],
            ),
            "lora_te2_text_model_encoder_layers_3_self_attn_q_proj": (
                1280,
                [(f"text_encoder_2.{CLIP}", 1280)],
            ),
        },
    ),
    "onetrainer-sdxl": (
        KOHYA,
        {
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (
                2048,
                [(f"unet.{UNET}.to_k", 640)],
            ),
            "lora_te2_text_projection": (1280, [("text_encoder_2.text_projection", 1280)]),
        },
    ),
    "omi-sdxl": (
        KOHYA,
        {
            "unet.input_blocks.4.1.transformer_blocks.0.attn2.to_out.0": (
                640,
                [(f"unet.{UNET}.to_out.0", 640)],
            )
        },
    ),
    "kohya-sd15": (
        KOHYA,
        {
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (
                768,
                [(f"unet.{UNET}.to_k", 640)],
            ),
            "lora_te_text_model_encoder_layers_3_self_attn_q_proj": (768, [(f"text_encoder.{CLIP}", 768)]),
        },
    ),
    "kohya-sd2": (
        KOHYA,
        {
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k": (
                1024,
                [(f"unet.{UNET}.to_k", 640)],
            ),
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
}


def foreign_file(tool: str, file, dtype=torch.float32, rank: int = 2) -> dict[str, torch.Tensor]:
    """Writes a file as this tool does; returns what the update of each layer makes of a few inputs,
    float64.
    """
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
    """To diffusers and on to kohya's spelling and back, at the released models' shapes; what was fused
    doesn't grow.
    """
    source, first, second, third = (tmp_path / f"{n}.safetensors" for n in ("source", "a", "b", "c"))
    updates = foreign_file(tool, source, dtype)
    for a, b, to in ((source, first, "diffusers"), (first, second, "kohya"), (second, third, "diffusers")):
        assert convert_lora.main([str(a), str(b), "--to", to]) == 0
        assert error_of(b, updates) < 1e-6
    if tool.startswith("kohya"):
        assert sum(t.numel() for t in load_file(second).values()) == sum(
            t.numel() for t in load_file(source).values()
        )


def test_infer_lora_leaves_to_diffusers_what_it_reads_right(family, trained):
    """What another trainer names otherwise is converted before it is loaded."""
    own = DIFFUSERS_KEY
    assert all(own.match(key) for key in load_file(trained / "pytorch_lora_weights.safetensors"))
    for tool, (endings, keys) in FILES.items():
        assert all(own.match(f"{key}.{endings[0]}") for key in keys) == (tool == "ai-toolkit-flux")


KEY, LAYER = (
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
    f"{UNET}.to_k",
)  # (640, 2048) in SDXL


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
    halves = [
        torch.einsum("abkl,ao,bi->oikl", f[f"hada_t{n}"], f[f"hada_w{n}_a"], f[f"hada_w{n}_b"])
        for n in (1, 2)
    ]
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
        lost = ((made.delta() - update).norm() / update.norm()).item()
        said = capsys.readouterr().out
        printed = float(said.split("% of the update")[0].rsplit(" ", 1)[1]) / 100
        assert made.rank == given and printed == pytest.approx(lost, abs=1e-3)
        assert lost < 1e-4 if given == rank else lost > 0.01
    assert inspect_lora.main([str(tmp_path / "x.safetensors")]) in (0, 1)
    assert "(LoHa)" in capsys.readouterr().out or kind not in (loha, convolution)
