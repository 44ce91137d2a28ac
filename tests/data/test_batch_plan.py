"""Which image stands in which batch, epoch and process, and with which weight."""

from __future__ import annotations

from collections import Counter

import pytest
from toy_parts import arguments, examples_in

from lora_training.data.batches import BatchPlan
from lora_training.data.examples import hold_out
from lora_training.data.folders import Example

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_image_is_trained_once_per_epoch_whatever_the_batch(recipe, batch, processes):
    args = arguments(recipe, "--train_batch_size", batch, "--repeats", 2)
    plan = BatchPlan(examples_in([0, 0, 1, 0, 2, 1, 0]), args, processes, 0)
    for epoch in (0, 1):
        seen, buckets = Counter(), set()
        for number in range(epoch * plan.per_epoch, (epoch + 1) * plan.per_epoch):
            shares = [plan.share(number, p) for p in range(processes)]
            assert len({len(s) for s in shares}) == 1  # no process waits for another
            slots = [s for share in shares for s in share if s.weight > 0]
            assert sum(s.weight for s in slots) == pytest.approx(1)
            assert len({s.bucket for share in shares for s in share}) == 1
            buckets |= {s.bucket for s in slots}
            seen.update((s.index, s.repeat) for s in slots)
        assert seen == Counter((i, r) for i in range(7) for r in range(2))
        assert buckets == {0, 1, 2}


def test_processes_share_what_one_process_does(recipe):
    images = examples_in([0] * 5 + [1] * 4)
    one = BatchPlan(images, arguments(recipe, "--train_batch_size", 4), 1, 0)
    two = BatchPlan(images, arguments(recipe, "--train_batch_size", 2), 2, 0)
    for number in range(2 * one.per_epoch):
        joined = [s for p in range(2) for s in two.share(number, p) if s.weight]
        assert joined == one.share(number, 0)


def test_order_differs_between_epochs_and_seeds(recipe):
    images = examples_in([0] * 12)
    plans = [BatchPlan(images, arguments(recipe, "--seed", s), 1, 0) for s in (5, 6)]
    orders = [[b[0].index for b in plan.epoch(e)] for plan in plans for e in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_prior_preservation_weighs_each_half_on_its_own(recipe, batch):
    flags = ("--with_prior_preservation", "--class_prompt", "x", "--prior_loss_weight", 0.3)
    plan = BatchPlan(examples_in([0] * 7), arguments(recipe, *flags, "--train_batch_size", batch), 2, 4)
    drawn = Counter()
    for number in range(plan.per_epoch):
        slots = [s for p in range(2) for s in plan.share(number, p)]
        assert sum(s.weight for s in slots if not s.is_class) == pytest.approx(1)
        assert sum(s.weight for s in slots if s.is_class) == pytest.approx(0.3)
        drawn.update(s.index for s in slots if s.is_class and s.weight)
    assert set(drawn) == {0, 1, 2, 3} and max(drawn.values()) - min(drawn.values()) <= 1


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_held_out_images_are_never_trained_on(recipe, share):
    args = arguments(recipe, "--validation_split", share, "--repeats", 2, "--train_batch_size", 3)
    examples = [Example(f"{i}", ["a"], None, size=(64, 64)) for i in range(20)]
    hold_out(examples, args)
    held = {i for i, e in enumerate(examples) if e.held_out}
    assert len(held) == 20 * share
    plan = BatchPlan(examples, args, 2, 0)
    slots = [s for number in range(3 * plan.per_epoch) for p in range(2) for s in plan.share(number, p)]
    assert {s.index for s in slots} == set(range(20)) - held
