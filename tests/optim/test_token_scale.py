"""The rows of new tokens keep the size of their table, whatever the optimizer."""

from __future__ import annotations

import pytest
import torch
from toy_parts import arguments

from lora_training.optim.optimizers import prepare_parts
from lora_training.optim.parts import TrainedPart, averaged_weights

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "adafactor", "schedulefree"])
def test_new_tokens_keep_the_size_of_their_table(recipe, optimizer):
    """After each step a table's rows are scaled by (std0 / std) ** 0.1, which a LoRA's weights never are."""
    rate = 1 if optimizer == "prodigy" else 1e-3
    args = arguments(recipe, "--optimizer", optimizer, "--learning_rate", rate, "--max_train_steps", 3)
    generator = torch.Generator().manual_seed(0)
    initial = {key: torch.randn(2, 64, generator=generator) * 0.02 for key in ("clip_l", "t5")}
    parts = {}
    for name in ("embeddings", "denoiser"):
        parameters = {key: torch.nn.Parameter(rows.clone()) for key, rows in initial.items()}
        parts[name] = TrainedPart(name, parameters, rate, 0.0, 200)
        prepare_parts([parts[name]], args)
    for number in range(60):
        push = torch.randn(256, generator=generator) + torch.linspace(-1, 1, 256)
        for part in parts.values():
            part.gradients.copy_(push)
            part.step()
        if number == 0:
            rows = {name: part.views(part.weights.detach()) for name, part in parts.items()}
            for key, free in rows["denoiser"].items():
                scale = (initial[key].std() / free.std()) ** 0.1
                assert torch.allclose(rows["embeddings"][key], free * scale)
    with averaged_weights(list(parts.values())):
        rows = {name: part.views(part.weights.detach())["t5"] for name, part in parts.items()}
        growth = {name: (table.std() / initial["t5"].std()).log().abs() for name, table in rows.items()}
    assert growth["embeddings"] < 0.6 * growth["denoiser"]
