"""Many repeats are planned in rounds, so that a plan of any length fits into memory."""

from __future__ import annotations

from collections import Counter

import pytest
from toy_parts import arguments

from lora_training.data.batches import BatchPlan
from lora_training.data.folders import Example

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(("count", "repeats"), [(7, 31), (1, 70), (100, 3), (64, 1)])
def test_many_repeats_are_planned_in_rounds(recipe, monkeypatch, count, repeats):
    monkeypatch.setattr(BatchPlan, "round_limit", 64)
    prior = ("--with_prior_preservation", "--class_prompt", "a")
    args = arguments(recipe, "--repeats", repeats, "--train_batch_size", 4, *prior)
    examples = [Example(str(i), ["a"], None, bucket=i % 3, size=(64, 64)) for i in range(count)]
    plan = BatchPlan(examples, args, 1, 5)
    assert sum(map(len, plan.epoch(0))) <= 2 * max(64, count)
    slots = [slot for number in range(plan.per_epoch) for slot in plan.share(number, 0)]
    places = Counter((slot.index, slot.repeat) for slot in slots if not slot.is_class)
    assert len(places) == count * repeats and set(places.values()) == {1}
    class_places = Counter((slot.index, slot.repeat) for slot in slots if slot.is_class)
    assert sum(class_places.values()) == count * repeats and set(class_places.values()) == {1}
