"""What was trained works elsewhere: LoRA files converted between the tools' spellings, both ways."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SAMPLE, run_here
from safetensors.torch import load_file, save_file
from trained_loras import draw, train_with_text_encoder

import infer_lora
from lora_training import families
from lora_training.errors import UserError
from lora_training.lora.reading import read_lora
from lora_training.lora.writing import kohya_tensors
from scripts.lora import convert_lora, inspect_lora, merge_lora

pytestmark = pytest.mark.run


@pytest.fixture
def trained(family, shelf):
    """A short run with text encoder and alpha half the rank, shared by the tests of a family."""
    return train_with_text_encoder(family, shelf)


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
    assert set(own.layers) >= {"text_encoder", families.FAMILIES[family.name].denoiser}


def test_conversion_there_and_back(family, trained, tmp_path, capsys):
    there, back = tmp_path / "comfy.safetensors", tmp_path / "back" / "pytorch_lora_weights.safetensors"
    assert convert_lora.main([str(trained), str(there), "--base", family.base]) == 0
    written, own = load_file(there), load_file(trained / f"{family.name}.safetensors")
    assert written.keys() == own.keys() and all(torch.equal(written[k], own[k]) for k in own)
    assert convert_lora.main([str(there), str(back), "--base", family.base]) == 0
    assert same_lora(read_lora(back), read_lora(trained))
    assert "for diffusers" in capsys.readouterr().out


def test_converted_file_draws_the_same_in_diffusers(family, studio, trained, tmp_path):
    back = tmp_path / "pytorch_lora_weights.safetensors"
    source = trained / f"{family.name}.safetensors"
    assert convert_lora.main([str(source), str(back), "--base", family.base]) == 0
    own = draw(studio.kind, family.base, family, trained / "pytorch_lora_weights.safetensors", 0.8)
    assert np.abs(draw(studio.kind, family.base, family, back, 0.8) - own).max() < 1e-4
    assert np.abs(draw(studio.kind, family.base, family) - own).max() > 0.02


def test_foreign_file_with_one_pair_for_a_fused_layer(tmp_path):
    """kohya's own Flux training has one rank for q, k and v together: every part gets the down matrix and
    its rows.
    """
    d = 128
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    state = {f"{key}.lora_down.weight": torch.randn(4, d), f"{key}.lora_up.weight": torch.randn(3 * d, 4)}
    save_file(state | {f"{key}.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    lora = read_lora(tmp_path / "x.safetensors", base=FAMILIES["flux"].base)
    whole = state[f"{key}.lora_up.weight"] @ state[f"{key}.lora_down.weight"] / 4
    for k, name in enumerate(("to_q", "to_k", "to_v")):
        layer = lora.layers["transformer"][f"transformer_blocks.0.attn.{name}"]
        assert torch.allclose(layer.delta(), whole[k * d : (k + 1) * d], atol=1e-5)
    again = kohya_tensors(lora)
    update = (
        again[f"{key}.lora_up.weight"]
        @ again[f"{key}.lora_down.weight"]
        / len(again[f"{key}.lora_down.weight"])
    )
    assert torch.allclose(update * again[f"{key}.alpha"], whole, atol=1e-4)


def test_peft_adapter_folder(tmp_path):
    """adapter_model.safetensors with adapter_config.json, as peft itself writes them; rsLoRA's scale is
    kept.
    """
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {
        f"base_model.model.{name}.lora_A.weight": torch.randn(4, 320),
        f"base_model.model.{name}.lora_B.weight": torch.randn(320, 4),
    }
    (tmp_path / "peft").mkdir()
    save_file(state, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(
        json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True})
    )
    layer = read_lora(tmp_path / "peft", family="sd15").layers["unet"][name]
    a, b = state.values()
    assert torch.allclose(layer.delta(), b @ a * 8 / 4**0.5, atol=1e-4)


class Payload:
    def __reduce__(self):
        return (open, ("/tmp/lora_payload_was_run", "w"))


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt"])
def test_pickles_are_refused_unexecuted(name, tmp_path, capsys):
    if os.path.exists("/tmp/lora_payload_was_run"):
        os.remove("/tmp/lora_payload_was_run")
    file = tmp_path / name
    file.write_bytes(pickle.dumps({"x": Payload()}))
    base = FAMILIES["sd15"].base
    assert convert_lora.main([str(file), str(tmp_path / "y.safetensors")]) == 2
    assert inspect_lora.main([str(file)]) == 2
    assert merge_lora.main([base, str(tmp_path / "m"), "--lora", str(file)]) == 2
    assert infer_lora.main(["--paths.base_model_path", base, "--paths.lora_weights_path", str(file)]) == 2
    assert "can run code" in capsys.readouterr().err
    if name == "x.ckpt":
        assert run_here(FAMILIES["sd15"], tmp_path / "t", "-d", SAMPLE, "-m", file) == 2
        assert infer_lora.main(["--paths.base_model_path", str(file)]) == 2
    assert not os.path.exists("/tmp/lora_payload_was_run")


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
    with pytest.raises(UserError, match=words):
        read_lora(tmp_path / "x.safetensors", base=FAMILIES["sd15"].base, family="sd15")


def test_a_lora_for_another_base_is_one_line(tmp_path, capsys):
    """Of another family, or of another width than the released model: named, with the way out."""
    wide = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 128)}
    wide["lora_unet_double_blocks_0_img_attn_proj.lora_up.weight"] = torch.ones(128, 2)
    save_file(wide, tmp_path / "flux.safetensors")
    assert convert_lora.main([str(tmp_path / "flux.safetensors"), str(tmp_path / "x.safetensors")]) == 2
    assert "has 3072; --base FOLDER" in capsys.readouterr().err
    name = "unet.mid_block.attentions.0.proj_in"
    save_file(
        {f"{name}.lora.{k}.weight": torch.ones(4, 4) for k in ("up", "down")}, tmp_path / "sd.safetensors"
    )
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_not_passed_on(tmp_path, capsys, value):
    """Of a LoRA and of embeddings: a converted file would only hide where they came from."""
    from conftest import FAMILIES

    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    files = {
        "lora": {f"{layer}.lora.down.weight": torch.ones(2, 48), f"{layer}.lora.up.weight": torch.ones(48, 2)}
    }
    files["emb"] = {"clip_l": torch.ones(2, 64)}
    for name, tensors in files.items():
        next(iter(tensors.values()))[0, 0] = value
        source, target = tmp_path / f"{name}.safetensors", tmp_path / f"{name}_out.safetensors"
        save_file(tensors, source)
        assert (
            convert_lora.main([str(source), str(target), "--family", "sd15", "--base", FAMILIES["sd15"].base])
            == 2
        )
        assert "not finite" in capsys.readouterr().err and not target.exists()
