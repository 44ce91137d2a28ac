"""Which images stand in which batch."""

from __future__ import annotations

import bisect
import random
from collections import Counter
from dataclasses import dataclass
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
    a multiple of the processes, or up to the full batch where shapes must be fixed. Repeats beyond `at_once`
    images are shuffled in rounds.
    """

    at_once = 65536

    def __init__(
        self, examples: list[Example], args: argparse.Namespace, processes: int, class_images: int
    ) -> None:
        self.buckets = {i: e.bucket for i, e in enumerate(examples) if not e.held_out}
        self.sets = {i: examples[i].own or args for i in self.buckets}
        self.seed, self.processes, most = args.seed, processes, max(own.repeats for own in self.sets.values())
        self.size, self.fixed_shapes = args.train_batch_size * processes, args.compile or args.cuda_graphs
        self.class_images, self.prior_loss_weight = class_images, args.prior_loss_weight
        self.round, self.starts = (
            max(1, min(most, self.at_once // len(self.buckets))),
            [0],
        )  # starts: of each round
        for part in range(-(-most // self.round)):
            counts = Counter()
            for i, bucket in self.buckets.items():
                counts[bucket] += len(self.shown(i, part))
            self.starts.append(self.starts[-1] + sum(-(-n // self.size) for n in counts.values()))
        self.per_epoch = self.starts[-1]
        self.cached: tuple[tuple, list[list[Slot]]] = ((), [])

    def shown(self, index: int, part: int) -> range:
        """The repeats of an image in round `part`."""
        return range(part * self.round, min((part + 1) * self.round, self.sets[index].repeats))

    def epoch(self, epoch: int, part: int = 0) -> list[list[Slot]]:
        """The global batches of an epoch, in order; of its round `part`, if its repeats are many thousands."""
        if self.cached[0] == (epoch, part):
            return self.cached[1]
        rng = random.Random(stable_seed(self.seed, "order", epoch, *([part] if part else [])))
        order = [(i, r) for i in self.buckets for r in self.shown(i, part)]
        rng.shuffle(order)
        full, waiting = [], {}
        for index, repeat in order:
            group = waiting.setdefault(self.buckets[index], [])
            group.append((index, repeat))
            if len(group) == self.size:
                full.append(waiting.pop(self.buckets[index]))
        groups = full + list(waiting.values())
        rng.shuffle(groups)
        weights = {i: own.weight for i, own in self.sets.items()}
        batches = [
            [Slot(i, self.buckets[i], epoch, r, weights[i] / len(group)) for i, r in group]
            for group in groups
        ]
        if self.class_images:
            rounds, numbers = -(-len(order) // self.class_images), range(self.class_images)
            classes = [i for _ in range(rounds) for i in rng.sample(numbers, len(numbers))]
            shown = part * (self.round * len(self.buckets) + self.class_images)  # before this round, at most
            for batch in batches:
                weight = self.prior_loss_weight / len(batch)
                for _ in range(len(batch)):
                    batch.append(
                        Slot(classes.pop(), batch[0].bucket, epoch, shown + len(classes), weight, True)
                    )
        self.cached = ((epoch, part), batches)
        return batches

    def share(self, number: int, process: int) -> list[Slot]:
        """What `process` computes of the global batch `number`, counted over all epochs; instance images
        first.
        """
        epoch, place = divmod(number, self.per_epoch)
        part = bisect.bisect_right(self.starts, place) - 1
        batch = self.epoch(epoch, part)[place - self.starts[part]]
        out = []
        for kind in (False, True):
            slots = [s for s in batch if s.is_class == kind]
            if not slots:
                continue
            each = -(-(self.size if self.fixed_shapes else len(slots)) // self.processes)
            spare = [slots[k % len(slots)] for k in range(each * self.processes - len(slots))]
            filler = [Slot(s.index, s.bucket, s.epoch, s.repeat, 0.0, kind) for s in spare]
            out += (slots + filler)[process * each : (process + 1) * each]
        return out
