"""Which images stand in which batch: a pure function of seed and position."""

from __future__ import annotations

import bisect
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lora_training.seeds import stable_seed

if TYPE_CHECKING:
    import argparse

    from lora_training.data.folders import Example


@dataclass(frozen=True)
class Slot:
    """One place in a batch: which image, in which repeat of which epoch, with which weight in the loss."""

    index: int
    bucket: int
    epoch: int
    repeat: int
    weight: float
    is_class: bool = False


class BatchPlan:
    """Which images stand in which batch: a pure function of seed and position, the same on every process.

    A global batch holds images of one bucket, batch size x processes of them or what is left of the bucket,
    so no image is dropped. Loss weights sum to 1 over a global batch (class images: to the prior loss
    weight), so gradients are summed over processes. Missing places are filled with copies of weight 0: up to
    a multiple of the processes, or up to the full batch where shapes must be fixed. An epoch of more than
    `round_limit` images is shuffled in rounds of some repeats each.
    """

    round_limit = 65536

    def __init__(
        self, examples: list[Example], args: argparse.Namespace, processes: int, class_images: int
    ) -> None:
        self.buckets = {i: e.bucket for i, e in enumerate(examples) if not e.held_out}
        self.sets = {i: examples[i].set_args or args for i in self.buckets}
        self.seed, self.processes = args.seed, processes
        self.size = args.train_batch_size * processes
        self.fixed_shapes = args.compile or args.cuda_graphs
        self.class_images, self.prior_loss_weight = class_images, args.prior_loss_weight
        repeats = max(set_args.repeats for set_args in self.sets.values())
        self.round_repeats = max(1, min(repeats, self.round_limit // len(self.buckets)))
        self.round_starts = [0]  # the number of the first batch of each round
        for number in range(-(-repeats // self.round_repeats)):
            self.round_starts.append(self.round_starts[-1] + self.count_batches(number))
        self.per_epoch = self.round_starts[-1]
        self.cached: tuple[tuple, list[list[Slot]]] = ((), [])

    def count_batches(self, round_number: int) -> int:
        """The number of global batches in a round."""
        counts = Counter()
        for index, bucket in self.buckets.items():
            counts[bucket] += len(self.repeats_in(index, round_number))
        return sum(-(-count // self.size) for count in counts.values())

    def repeats_in(self, index: int, round_number: int) -> range:
        """The repeats of an image that a round shows."""
        start = round_number * self.round_repeats
        return range(start, min(start + self.round_repeats, self.sets[index].repeats))

    def epoch(self, epoch: int, round_number: int = 0) -> list[list[Slot]]:
        """The global batches of an epoch, in order, or of one of its rounds where there are several."""
        if self.cached[0] == (epoch, round_number):
            return self.cached[1]
        rng = random.Random(stable_seed(self.seed, "order", epoch, *([round_number] if round_number else [])))
        order = [(index, repeat) for index in self.buckets for repeat in self.repeats_in(index, round_number)]
        rng.shuffle(order)
        groups = self.group_by_bucket(order)
        rng.shuffle(groups)
        batches = [
            [
                Slot(index, self.buckets[index], epoch, repeat, self.sets[index].weight / len(group))
                for index, repeat in group
            ]
            for group in groups
        ]
        if self.class_images:
            # repeats of class images before this round, at most
            first_repeat = round_number * (self.round_repeats * len(self.buckets) + self.class_images)
            self.add_class_images(batches, len(order), first_repeat, rng)
        self.cached = ((epoch, round_number), batches)
        return batches

    def group_by_bucket(self, order: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """(image, repeat) pairs in groups of one bucket and up to the batch's size: full ones first."""
        full, open_groups = [], {}
        for index, repeat in order:
            group = open_groups.setdefault(self.buckets[index], [])
            group.append((index, repeat))
            if len(group) == self.size:
                full.append(open_groups.pop(self.buckets[index]))
        return full + list(open_groups.values())

    def add_class_images(self, batches: list[list[Slot]], count: int, first_repeat: int, rng) -> None:
        """Adds as many class images to each batch as it has images; none comes again before all have come."""
        numbers = range(self.class_images)
        rounds = -(-count // self.class_images)
        classes = [i for _ in range(rounds) for i in rng.sample(numbers, len(numbers))]
        for batch in batches:
            bucket, epoch, weight = batch[0].bucket, batch[0].epoch, self.prior_loss_weight / len(batch)
            for _ in range(len(batch)):
                index = classes.pop()
                batch.append(Slot(index, bucket, epoch, first_repeat + len(classes), weight, True))

    def share(self, number: int, process: int) -> list[Slot]:
        """What `process` computes of the global batch `number` of all epochs; instance images come first."""
        epoch, position = divmod(number, self.per_epoch)
        round_number = bisect.bisect_right(self.round_starts, position) - 1
        batch = self.epoch(epoch, round_number)[position - self.round_starts[round_number]]
        share = []
        for is_class in (False, True):
            slots = [slot for slot in batch if slot.is_class == is_class]
            if not slots:
                continue
            each = -(-(self.size if self.fixed_shapes else len(slots)) // self.processes)
            copies = [slots[k % len(slots)] for k in range(each * self.processes - len(slots))]
            slots += [replace(slot, weight=0.0) for slot in copies]
            share += slots[process * each : (process + 1) * each]
        return share
