"""Layers of a LoRA that the base hasn't are named, in both spellings that diffusers reads by itself."""

from __future__ import annotations

import pytest
import torch
from conftest import FAMILIES, SAMPLE, run_here
from safetensors.torch import load_file, save_file

import infer_lora

pytestmark = pytest.mark.faults

DRAWING = (
    "--prompt",
    "a",
    "--num_inference_steps",
    "1",
    "--resolution.width",
    "64",
    "--resolution.height",
    "64",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "mine"
    assert run_here(FAMILIES["sd15"], output, "-d", SAMPLE, "--max_train_steps", 1) == 0
    return output


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "mine.safetensors"])
@pytest.mark.parametrize("renamed", [0, 3])
def test_layers_that_fit_nothing_are_named(trained, tmp_path, capfd, name, renamed):
    """A layer of block 7, which this UNet hasn't, was left out without a word."""
    tensors = load_file(trained / name)
    blocks = (
        ("down_blocks.0.", "down_blocks.7.") if "pytorch" in name else ("down_blocks_0_", "down_blocks_7_")
    )
    layers = sorted({key.split(".lora")[0].removesuffix(".alpha") for key in tensors if blocks[0] in key})
    for layer in layers[:renamed]:
        for key in [key for key in tensors if key.startswith(f"{layer}.")]:
            tensors[key.replace(*blocks)] = tensors.pop(key)
    file = tmp_path / "other.safetensors"
    save_file(tensors, file)
    flags = ("--paths.base_model_path", FAMILIES["sd15"].base, "--paths.infer_path", str(tmp_path / "o"))
    assert infer_lora.main([str(file), *flags, *DRAWING]) == 0
    printed = capfd.readouterr()
    told = [line for line in printed.out.splitlines() if "fit nothing in" in line]
    assert len(told) == bool(renamed)
    if renamed:
        assert f"warning: {renamed} of " in told[0] and layers[0].replace(*blocks) in told[0]


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
@pytest.mark.parametrize("command", ["convert_lora", "resize_lora", "merge_lora"])
def test_an_alpha_that_is_no_number_is_refused(trained, tmp_path, capsys, command, alpha):
    """It was converted, and drew black pictures elsewhere."""
    import importlib

    tensors = load_file(trained / "mine.safetensors")
    key = next(key for key in tensors if key.endswith(".alpha"))
    save_file(tensors | {key: torch.tensor(alpha)}, tmp_path / "a.safetensors")
    base = str(FAMILIES["sd15"].base)
    argv = {
        "convert_lora": [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--base", base],
        "resize_lora": [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--rank", "1"],
        "merge_lora": [base, str(tmp_path / "merged"), "--lora", str(tmp_path / "a.safetensors")],
    }[command]
    argv += ["--base", base] if command == "resize_lora" else []
    assert importlib.import_module(f"scripts.lora.{command}").main(argv) == 2
    assert f"its alpha is {alpha}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
