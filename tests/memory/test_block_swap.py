"""Blocks whose weights lie in the CPU's memory give the same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import (
    FLUX_TARGETS,
    KINDS,
    flux_pair,
    gradients_of,
    tiny_flux,
    with_lora,
)

from lora_training.errors import UserError
from lora_training.memory.block_swap import swap_blocks
from lora_training.memory.checkpointing import enable_checkpointing
from lora_training.memory.frozen_linear import FrozenLinear

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_swapped_blocks_give_the_same_gradients(tmp_path, kind, checkpointing):
    """Whether autograd keeps weights or not: one block, some, all; and two slots hold all of them."""
    plain, swapped, inputs = flux_pair(kind, tmp_path)
    results = []
    for number, model in ((0, plain), *((n, copy.deepcopy(swapped)) for n in (1, 3, 4))):
        if number:
            swap_blocks(model, number, torch.device("cpu"))
        model, part = with_lora(model.train(), targets=FLUX_TARGETS)
        if checkpointing:
            enable_checkpointing(model, (), dropout=False)
        results.append((number, model, gradients_of(model, inputs, part)))
    expected = results[0][2]
    assert expected[0].abs().max() > 0 and torch.equal(expected[0], expected[2])
    for number, model, gradients in results[1:]:
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
        layers = [m for m in model.modules() if isinstance(m, FrozenLinear) and m.stored.numel() == 0]
        assert len({id(layer.fetch.func.__self__) for layer in layers}) == 1
        swap = layers[0].fetch.func.__self__
        assert len(swap.copies) == number
        slot_views = [view for block in swap.copies for _, *views in block for view in views]
        assert len({view.untyped_storage().data_ptr() for view in slot_views}) == 2


def test_swapped_blocks_are_fetched_once_a_pass(tmp_path):
    """Of N blocks a step copies 2 (N - 2): forwards and backwards, but for those that are still there."""
    model, _, inputs = flux_pair(None, tmp_path)
    swap_blocks(model, 4, torch.device("cpu"))
    swap = next(m for m in model.modules() if isinstance(m, FrozenLinear)).fetch.func.__self__
    model, part = with_lora(model.train(), targets=FLUX_TARGETS)
    enable_checkpointing(model, (), dropout=False)
    model(**inputs).sample.sum().backward()
    numbers, copy_block = [], swap.copy
    swap.copy = lambda number, slot: numbers.append(number) or copy_block(number, slot)
    model(**inputs).sample.sum().backward()
    assert numbers == [2, 3, 1, 0]


def test_more_blocks_than_there_are():
    with pytest.raises(UserError, match="--blocks_to_swap 9: the model has 4 blocks"):
        swap_blocks(tiny_flux(2), 9, torch.device("cpu"))


def test_encoders_whose_blocks_come_in_one_by_one():
    import transformers as t

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = t.CLIPTextModel(t.CLIPTextConfig(**sizes, vocab_size=99, projection_dim=32))
    t5 = t.T5EncoderModel(t.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2, vocab_size=99))
    ids = torch.randint(0, 90, (2, 7))
    for encoder in (clip, t5):
        encoder.requires_grad_(False).eval()
        before = encoder(ids)[0]
        swap_blocks(encoder, None, torch.device("cpu"))
        layers = [m for m in encoder.modules() if isinstance(m, FrozenLinear)]
        assert len(layers) >= 18 and not any(layer.stored.numel() for layer in layers)
        torch.testing.assert_close(encoder(ids)[0], before, rtol=1e-4, atol=1e-5)
