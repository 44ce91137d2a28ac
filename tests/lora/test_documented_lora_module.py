"""The snippets of a LoRA-from-scratch module's document, as they stand there, on a toy.

What differs is their paths, and that all of them import from lora.
"""

from __future__ import annotations

import inspect
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import lora
from lora_training.lora.single_file import single_file

pytestmark = pytest.mark.unit
TOY = ROOT / "assets" / "toy_sd15"


@pytest.fixture(scope="module")
def ckpt_path(tmp_path_factory):
    """A .ckpt as v1-5-pruned-emaonly.ckpt is one, with the configurations of a toy beside it."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(TOY, home / "data", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"state_dict": single_file("sd15", TOY)}, home / "data" / "v1-5-pruned-emaonly.ckpt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        yield str(home / "data" / "v1-5-pruned-emaonly.ckpt")


@pytest.fixture(scope="module")
def models(ckpt_path):
    from lora import preload_models_with_lora

    models = preload_models_with_lora(
        ckpt_path=ckpt_path,
        device="cpu",
        lora_rank=4,
        lora_alpha=1.0,
        lora_dropout=0.0,
        apply_to_diffusion=True,
        apply_to_clip=False,
    )
    assert lora.lora_layers(models["diffusion"]) and not lora.lora_layers(models["clip"])
    return models


def parameters_of(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_names_and_parameters_are_the_documented_ones():
    loading = ["ckpt_path", "device", "lora_rank", "lora_alpha", "lora_dropout"]
    loading += ["apply_to_diffusion", "apply_to_clip"]
    assert parameters_of(lora.preload_models_with_lora) == loading
    layer = ["in_features", "out_features", "bias", "rank", "alpha", "dropout"]
    assert parameters_of(lora.LoRALinear) == layer
    assert parameters_of(lora.generate)[:3] == ["prompt", "models", "uncond_prompt"]
    assert parameters_of(lora.apply_lora_to_model)[:5] == [
        "model",
        "rank",
        "alpha",
        "dropout",
        "target_modules",
    ]
    assert lora.load_models is lora.preload_models_with_lora
    assert (lora.save_lora, lora.load_lora) == (lora.save_models_lora, lora.load_lora_into_models)


def test_training_saving_loading_and_drawing(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from lora import get_lora_parameters

    for param in models["diffusion"].parameters():
        param.requires_grad = False
    lora_params = get_lora_parameters(models["diffusion"])
    for param in lora_params:
        param.requires_grad = True
    optimizer = torch.optim.AdamW(lora_params, lr=1e-4)

    def your_loss_function(batch, models):
        text = torch.zeros(1, 77, models["diffusion"].config.cross_attention_dim)
        return models["diffusion"](batch, 500, text).sample.pow(2).mean()

    for group in optimizer.param_groups:
        group["lr"] = 0.05  # two steps are to be seen
    dataloader = [torch.randn(1, 16, 8, 8) for _ in range(2)]
    for batch in dataloader:
        optimizer.zero_grad()
        loss = your_loss_function(batch, models)
        loss.backward()
        optimizer.step()

    from lora import save_models_lora

    save_models_lora(models, "my_lora_weights.pt")
    trained = [param.detach().clone() for param in lora_params]
    assert len(load_file("my_lora_weights.pt")) == len(trained)  # safetensors under that name
    for param in lora_params:
        param.data.zero_()

    from lora import load_lora_into_models

    models = load_lora_into_models(models, "my_lora_weights.pt")
    assert all(torch.equal(param, value) for param, value in zip(lora_params, trained, strict=True))

    from lora import generate, set_lora_enabled

    other = {"n_inference_steps": 2, "seed": 42}
    set_lora_enabled(models["diffusion"], enabled=True)
    output = generate(
        prompt="a beautiful landscape",
        uncond_prompt="",
        models=models,
        **other,
    )
    set_lora_enabled(models["diffusion"], enabled=False)
    base_output = generate(prompt="...", models=models, **other)
    set_lora_enabled(models["diffusion"], enabled=True)
    lora_output = generate(prompt="...", models=models, **other)
    assert output.size == lora_output.size == (64, 64)
    assert np.abs(np.asarray(base_output, dtype=int) - np.asarray(lora_output, dtype=int)).max() > 0


def test_a_picture_without_guidance_and_of_another_size(models):
    options = {"n_inference_steps": 2, "seed": 42}
    plain, guided = (lora.generate("a red circle", models, do_cfg=on, **options) for on in (False, True))
    assert np.asarray(plain).tolist() != np.asarray(guided).tolist()
    wide = lora.generate("a red circle", models, uncond_prompt="blue", width=96, height=64, **options)
    assert wide.size == (96, 64)


def test_merging_into_the_base(ckpt_path):
    from lora import merge_lora_weights, preload_models_with_lora

    models = preload_models_with_lora(ckpt_path, "cpu", lora_rank=8, lora_alpha=16)
    merge_lora_weights(models["diffusion"])
    assert not lora.lora_layers(models["diffusion"]) and models["pipeline"].unet is models["diffusion"]


def test_layers_that_are_named_and_a_layer_by_itself():
    model = lora.denoiser_without_weights(str(TOY))
    from lora import apply_lora_to_model

    model = apply_lora_to_model(model, rank=8, alpha=1.0, target_modules=["q_proj", "v_proj"])
    assert {name.rpartition(".")[2] for name in lora.lora_layers(model)} == {"to_q", "to_v"}
    assert {layer.scaling["default"] for layer in lora.lora_layers(model).values()} == {1 / 8}

    from lora import LoRALinear

    layer = LoRALinear(in_features=768, out_features=768, bias=True, rank=8, alpha=16.0, dropout=0.1)
    assert isinstance(layer, lora.LoRALayer) and layer(torch.randn(2, 768)).shape == (2, 768)
    assert lora.count_parameters(layer) == {"lora": 8 * 2 * 768, "base": 769 * 768}
    assert LoRALinear(4, 3, bias=False).get_base_layer().bias is None
