"""Optimizers over flat buffers, against the libraries' own, and with arguments of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import QUICKEST, SAMPLE, run_here
from safetensors.torch import load_file
from small_models import (
    Attention,
    with_lora,
)

from lora_training.memory.lora_products import fuse_lora
from lora_training.optim.nonblocking import nonblocking_prodigy
from lora_training.optim.optimizers import make_optimizer

pytestmark = pytest.mark.unit


ARGS = SimpleNamespace(
    adam_beta1=0.9, adam_beta2=0.99, adam_epsilon=1e-8, lr_warmup_steps=0, prodigy_beta3=None
)
ARGS.loraplus_lr_ratio, ARGS.optimizer_args = 1.0, {}
ARGS.prodigy_decouple, ARGS.prodigy_use_bias_correction, ARGS.prodigy_safeguard_warmup = True, True, True


def trained_by(name: str, make, steps: int = 6):
    """Weights after some steps with an optimizer over the flat buffer, and with `make`'s."""
    out = []
    for flat in (True, False):
        torch.manual_seed(0)
        model, part = with_lora(Attention())
        ARGS.optimizer = name
        if flat:
            part.allocate()
            fuse_lora(model)
            optimizer = make_optimizer(part, ARGS)
        else:
            optimizer = make(part)
        for seed in range(steps):
            torch.manual_seed(seed)
            model(torch.randn(2, 5, 16)).square().mean().backward()
            optimizer.step()
            part.gradients.zero_()
        assert not torch.equal(part.weights.detach(), part.initial)
        out.append(part.weights.detach().clone())
    return out


def test_optimizers_equal_the_libraries():
    from bitsandbytes.optim import AdamW8bit
    from prodigyopt import Prodigy
    from transformers.optimization import Adafactor

    common = {"lr": 1e-3, "weight_decay": 0.01}

    adam = common | {"betas": (0.9, 0.99), "eps": 1e-8}
    corrected = {"use_bias_correction": True, "safeguard_warmup": True}
    fixed = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
    optimizers = {
        "adamw": lambda part: torch.optim.AdamW(list(part.parameters.values()), **adam),
        "prodigy": lambda part: Prodigy([part.weights], **adam, **corrected),
        "adamw8bit": lambda part: AdamW8bit([part.weights], **adam),
        "adafactor": lambda part: Adafactor(part.parameters.values(), **common, **fixed),
    }
    for name, make in optimizers.items():
        torch.testing.assert_close(*trained_by(name, make))


def test_prodigy_finds_the_same_step_size_from_a_small_start():
    """d grows over many steps as the library's does, and a part without gradients stays."""
    from prodigyopt import Prodigy

    results = []
    for optimizer_class in (nonblocking_prodigy(Prodigy), Prodigy):
        torch.manual_seed(0)
        weights = torch.nn.Parameter(torch.randn(64))
        optimizer = optimizer_class([weights], lr=1.0, weight_decay=0.01)
        for step in range(60):
            weights.grad = (weights.detach() - 1) * (step > 0)
            optimizer.step()
        results.append((weights.detach(), float(optimizer.param_groups[0]["d"])))
    (weights, d), (library_weights, library_d) = results
    assert library_d > 1e-3
    torch.testing.assert_close(weights, library_weights, rtol=1e-4, atol=1e-5)
    assert abs(d / library_d - 1) < 1e-4


LORA = "pytorch_lora_weights.safetensors"
OPTIMIZERS = {  # flags: how large a first step is, or the message
    ("--optimizer", "torch.optim.RMSprop", "--optimizer_args", "alpha=0.75"): 2e-4,
    ("--optimizer", "adamw", "--optimizer_args", "lr=3e-4", "amsgrad=True"): 3e-4,
    ("--optimizer", "torch.optim.Nix"): "--optimizer torch.optim.Nix can't train here: module",
    (
        "--optimizer=torch.optim.SGD",
        "--optimizer_args",
        "betas=(0,1)",
    ): "--optimizer_args betas: torch.optim.SGD has no",
    ("--optimizer_args", "eps"): "--optimizer_args eps is not key=value",
    ("--optimizer", "lion"): "dotted name",
    ("--optimizer", "prodigy", "--loraplus_lr_ratio", "4"): "one rate for all",
}


@pytest.mark.parametrize("flags", OPTIMIZERS, ids=" ".join)
def test_any_optimizer_with_its_own_arguments(flags, tmp_path, capsys):
    usual = ("-d", SAMPLE, "--max_train_steps", 1, "--upcast_before_saving", "--adam_weight_decay", 0)
    expected = OPTIMIZERS[flags]
    try:
        code = run_here(QUICKEST, tmp_path, *usual, *flags)
    except SystemExit as stop:
        code = stop.code
    if isinstance(expected, str):
        assert code == 2 and expected in capsys.readouterr().err
        return
    again = (*usual, "-o", tmp_path / "again", "--config", tmp_path / "config.yaml")
    assert code == 0 and run_here(QUICKEST, tmp_path, *again) == 0
    for folder in (tmp_path, tmp_path / "again"):
        steps = [v.abs().max().item() for k, v in load_file(folder / LORA).items() if ".lora_B." in k]
        assert max(steps) == pytest.approx(expected, rel=0.02)


def test_b_matrices_learn_at_a_rate_of_their_own(tmp_path):
    """AdamW's first step is as large as the rate, whatever the gradient."""
    flags = ("-d", SAMPLE, "--learning_rate", 1e-4, "--loraplus_lr_ratio", 16, "--max_train_steps", 1)
    assert run_here(QUICKEST, tmp_path, *flags, "--upcast_before_saving", "--adam_weight_decay", 0) == 0
    steps = [v.abs().max().item() for k, v in load_file(tmp_path / LORA).items() if ".lora_B." in k]
    assert max(steps) == pytest.approx(1.6e-3, rel=0.01)
