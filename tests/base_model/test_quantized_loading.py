"""A base that is quantised while it is read."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from small_models import (
    KINDS,
    flux_inputs,
    tiny_flux,
)

from lora_training.base_model.quantized import load_quantized
from lora_training.errors import UserError
from lora_training.memory.frozen_linear import FrozenLinear

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_load_quantized(tmp_path, kind, shards):
    torch.manual_seed(0)
    model = tiny_flux()
    size = sum(p.numel() * 4 for p in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 1000 if shards > 1 else "10GB")
    loaded = load_quantized(FluxTransformer2DModel, tmp_path, kind, torch.bfloat16, "cpu")
    layers = {n for n, m in loaded.named_modules() if isinstance(m, FrozenLinear)}
    assert {"transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.norm.linear"} <= layers
    assert not any(n in layers for n in ("x_embedder", "context_embedder", "proj_out", "norm_out.linear"))
    assert loaded.dtype == torch.bfloat16
    assert not any(p.requires_grad or p.is_meta for p in loaded.parameters())
    for name in layers:
        dense = model.get_submodule(name)
        bound = {"fp8": 0.04, "int8": 0.02, "nf4": 0.15}[kind]
        assert (loaded.get_submodule(name).weight.float() - dense.weight).norm() / dense.weight.norm() < bound
    inputs = flux_inputs()
    with torch.no_grad():
        first = model(**inputs).sample
        second = loaded(**{name: value.bfloat16() for name, value in inputs.items()}).sample.float()
    assert torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), 0) > 0.97


def test_load_quantized_says_what_is_missing(tmp_path):
    tiny_flux().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state.pop("transformer_blocks.0.norm1.linear.bias")
    save_file(state, file)
    with pytest.raises(UserError, match=r"norm1\.linear\.bias"):
        load_quantized(FluxTransformer2DModel, tmp_path, "int8", torch.bfloat16, "cpu")


LOADING = """
import ctypes, re, sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from lora_training.base_model.quantized import load_quantized


def status(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+)", text)[1]) * 1024


def main(argv):
    ctypes.CDLL(None).mallopt(-3, 100_000)  # M_MMAP_THRESHOLD: what is freed is given back
    torch.ones(512, 512) @ torch.ones(512, 512)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model = load_quantized(FluxTransformer2DModel, Path(argv[0]), "int8", torch.bfloat16, "cpu")
    print(status("VmHWM") - before)
"""


@pytest.mark.xdist_group("processes")
def test_load_quantized_holds_one_file_at_a_time(tmp_path):
    """Resident memory rises by no more than a file, the result and some rows in float32."""
    from ready_process import start

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=16, num_layers=0, num_single_layers=16, attention_head_dim=16, num_attention_heads=32,
            joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    size = sum(p.numel() * 2 for p in model.parameters())
    model.save_pretrained(tmp_path / "base", max_shard_size=size // 8)
    del model
    (tmp_path / "loading.py").write_text(LOADING)
    log = tmp_path / "log"
    process = start(tmp_path / "loading.py", [tmp_path / "base", ROOT], {}, log, tmp_path)
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    peak = int(log.read_text().splitlines()[-1])
    assert size // 2 < peak < size * (1 / 2 + 1 / 8) + (40 << 20)
