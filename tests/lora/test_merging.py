"""LoRAs merged into bases: what the merged one draws, single files, and what is no base."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import FAMILIES, ROOT, SAMPLE, run_here
from safetensors.torch import load_file, save_file
from single_files import Payload
from trained_loras import draw, save_small_lora, train_with_text_encoder

from lora_training.files import read_safetensors_header
from lora_training.lora.reading import read_lora
from lora_training.lora.single_file import BaseWeights, single_file
from scripts.bases import unpack_checkpoint
from scripts.lora import convert_lora, merge_lora, resize_lora

pytestmark = pytest.mark.run


@pytest.fixture
def trained(family, shelf):
    """A short run with text encoder and alpha half the rank, shared by the tests of a family."""
    return train_with_text_encoder(family, shelf)


@pytest.fixture(scope="module")
def small_lora(tmp_path_factory) -> Path:
    return save_small_lora(tmp_path_factory.mktemp("lora"))


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
    flags = ("-d", SAMPLE, "--use_dora", "--learning_rate", 2e-2, "--lora_layers", *family.lora_layers)
    assert run_here(family, tmp_path / "x", *flags) == 0
    assert (
        merge_lora.main(
            [family.base, str(tmp_path / "m"), "--lora", str(tmp_path / "x"), "--dtype", "float32"]
        )
        == 0
    )
    kind = diffusers.StableDiffusionXLPipeline
    own = draw(kind, family.base, family, tmp_path / "x" / "pytorch_lora_weights.safetensors")
    assert np.abs(draw(kind, tmp_path / "m", family) - own).max() < 1e-4
    assert np.abs(draw(kind, family.base, family) - own).max() > 0.01


def test_dora_of_the_first_lycoris_merges_by_columns(tmp_path, capsys):
    """dora_scale (1, in): diffusers has no place for it, merging does what its formula says."""
    base, name = FAMILIES["sd15"].base, "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = BaseWeights(ROOT / base, "sd15", {})
    weight = weights("unet", name).float()
    down, up, scale = (
        torch.randn(2, weight.shape[1]),
        torch.randn(weight.shape[0], 2),
        torch.rand(1, weight.shape[1]),
    )
    key, file = f"lora_unet_{name.replace('.', '_')}", tmp_path / "x.safetensors"
    save_file(
        {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.dora_scale": scale}, file
    )
    assert merge_lora.main([base, str(tmp_path / "m"), "--lora", str(file), "--dtype", "float32"]) == 0
    whole = weight + up @ down
    expected = whole * scale / whole.norm(dim=0, keepdim=True)
    merged = BaseWeights(tmp_path / "m", "sd15", {})("unet", name)
    assert torch.allclose(merged, expected, atol=1e-5)
    assert convert_lora.main([str(file), str(tmp_path / "y.safetensors"), "--base", base]) == 2
    assert (
        "diffusers has no place for DoRA by columns; scripts/lora/resize_lora.py" in capsys.readouterr().err
    )
    small = tmp_path / "z.safetensors"
    assert resize_lora.main([str(file), str(small), "--rank", "64", "--base", base]) == 0
    plain = read_lora(small, base=base).layers["unet"][name].delta()
    assert (weight + plain - expected).norm() < 1e-4 * expected.norm()


def test_a_ckpt_base_is_merged_as_a_safetensors_one(small_lora, tmp_path):
    """With numbers that are no tensors beside them, and tensors that share memory, as old checkpoints have
    them.
    """
    sd15, merged = FAMILIES["sd15"], []
    tensors = single_file("sd15", ROOT / sd15.base)
    save_file(tensors, tmp_path / "a.safetensors")
    shared = torch.zeros(10)
    state = tensors | {"model_ema.x": shared[:5], "model_ema.y": shared[5:]}
    torch.save({"state_dict": state, "global_step": 470000, "epoch": 3}, tmp_path / "a.ckpt")
    torch.save(tensors, tmp_path / "bare.ckpt")
    for name in ("a.safetensors", "a.ckpt", "bare.ckpt"):
        target = tmp_path / f"merged_{name}.safetensors"
        words = [str(tmp_path / name), str(target), "--lora", str(small_lora), "--shape", sd15.base]
        assert merge_lora.main(words) == 0
        merged.append(load_file(target))
    first = merged[0]
    assert any(not torch.equal(first[k], tensors[k]) for k in tensors)
    for other in merged[1:]:
        assert all(torch.equal(first[k], other[k]) for k in tensors)


@pytest.mark.parametrize("family", [(), ("--family", "sd15")])
@pytest.mark.parametrize(
    "name", ["pickle.ckpt", "cut.ckpt", "empty.ckpt", "list.ckpt", "cut.safetensors", "x.bin", "gone.ckpt"]
)
def test_what_is_no_base_is_not_merged(name, family, small_lora, tmp_path, capsys):
    file, trace = tmp_path / name, tmp_path / "was_run"
    tensors = {"input_blocks.0.0.weight": torch.ones(3, 3)}
    if name == "pickle.ckpt":
        file.write_bytes(pickle.dumps({"state_dict": {"input_blocks.0.0.weight": Payload(trace)}}))
    elif name == "list.ckpt":
        torch.save([1, 2], file)
    elif name != "gone.ckpt":
        torch.save(tensors, file) if name.endswith(".ckpt") else save_file(tensors, file)
        file.write_bytes(file.read_bytes()[: 0 if "empty" in name else 100])
    words = [
        str(file),
        str(tmp_path / "out.safetensors"),
        "--lora",
        str(small_lora),
        "--shape",
        FAMILIES["sd15"].base,
    ]
    assert merge_lora.main([*words, *family]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"merge_lora.py: error: {file}")
    assert not trace.exists() and [f.name for f in tmp_path.glob("*out*")] == []


@pytest.mark.parametrize("scale", ["nan", "inf", "1e400", "much"])
def test_a_scale_is_a_number(scale, small_lora, tmp_path, capsys):
    assert (
        merge_lora.main([FAMILIES["sd15"].base, str(tmp_path / "out"), "--lora", str(small_lora), scale]) == 2
    )
    assert "the scale is not" in capsys.readouterr().err


def velocity_base(folder: Path) -> Path:
    """A copy of SD 1.5's toy whose scheduler is that of velocity prediction with zero terminal SNR."""
    shutil.copytree(ROOT / FAMILIES["sd15"].base, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes | {"timestep_spacing": "trailing"}))
    return folder


def test_what_a_base_predicts_goes_with_it(small_lora, tmp_path):
    """Folder -> file -> file -> folder: ComfyUI and A1111 draw noise where these marks are lost."""
    base, one, two = (
        velocity_base(tmp_path / "base"),
        tmp_path / "one.safetensors",
        tmp_path / "two.safetensors",
    )
    assert merge_lora.main([str(base), str(one), "--lora", str(small_lora)]) == 0
    shape = ["--shape", str(base)]
    assert merge_lora.main([str(one), str(two), "--lora", str(small_lora), *shape]) == 0
    for file in (one, two):
        assert {"v_pred", "ztsnr"} <= load_file(file).keys()
        assert read_safetensors_header(file)[0]["modelspec.prediction_type"] == "v"
    layout = ["--layout", str(ROOT / FAMILIES["sd15"].base)]
    assert unpack_checkpoint.main([str(two), str(tmp_path / "back"), *layout]) == 0
    schedule = json.loads((tmp_path / "back" / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["prediction_type"] == "v_prediction" and schedule["rescale_betas_zero_snr"]


def test_what_a_file_states_of_itself_goes_with_it_but_for_its_hashes(small_lora, tmp_path):
    base, target = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    stated = {"modelspec.prediction_type": "v", "modelspec.author": "someone", "sshs_model_hash": "1"}
    shape = ROOT / FAMILIES["sd15"].base
    save_file(single_file("sd15", shape), base, metadata=stated | {"modelspec.hash_sha256": "0x1"})
    assert merge_lora.main([str(base), str(target), "--lora", str(small_lora), "--shape", str(shape)]) == 0
    expected = {"format": "pt", "modelspec.prediction_type": "v", "modelspec.author": "someone"}
    assert read_safetensors_header(target)[0] == expected


@pytest.mark.parametrize(
    ("dtype", "scale", "least", "most"),
    [
        (torch.float8_e4m3fn, 1, 0.5, 1.1),
        (torch.float8_e5m2, 3, 0.5, 1.1),
        (torch.bfloat16, 1, 0.02, 0.4),
        (torch.float16, 1, 0.001, 0.05),
        (torch.float32, 1, 0, 1e-4),
    ],
)
def test_the_share_of_an_update_that_is_rounded_away_is_told(tmp_path, capsys, dtype, scale, least, most):
    """An update of 1 or 3% merged into fp8 was nearly lost, in silence."""
    tensors = single_file("sd15", ROOT / FAMILIES["sd15"].base)
    cast = {key: value.to(dtype) if value.dim() > 1 else value for key, value in tensors.items()}
    save_file(cast, tmp_path / "base.safetensors")
    lora = relative_lora(tmp_path / "lora.safetensors", 0.01 * scale)
    command = [str(tmp_path / "base.safetensors"), str(tmp_path / "merged.safetensors"), "--lora", str(lora)]
    assert merge_lora.main([*command, "--shape", str(ROOT / FAMILIES["sd15"].base)]) == 0
    told = capsys.readouterr().out
    share = float(re.search(r"rounding took ([\d.]+)% of the update", told)[1]) / 100
    assert least <= share <= most, told
    assert ("warning: the result won't draw" in told) == (share > 0.1)


def relative_lora(file: Path, size: float) -> Path:
    """A LoRA on SD 1.5's toy whose updates are `size` of the norm of each layer's weight."""
    base = load_file(ROOT / FAMILIES["sd15"].base / "unet" / "diffusion_pytorch_model.safetensors")
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for key, weight in base.items():
        if "attn1" in key and weight.dim() == 2:
            down = torch.randn(4, weight.shape[1], generator=generator)
            up = torch.randn(weight.shape[0], 4, generator=generator)
            up *= size * weight.float().norm() / (up @ down).norm()
            name = key.removesuffix(".weight")
            tensors |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": up}
    save_file(tensors, file)
    return file
