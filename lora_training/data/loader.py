"""Batches prepared ahead of the training step."""

from __future__ import annotations

import contextlib
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from lora_training.data.samples import collate
from lora_training.errors import UserError
from lora_training.libraries import silence_image_libraries
from lora_training.signals import STOP_SIGNALS
from lora_training.tensors import move_to_device

if TYPE_CHECKING:
    from lora_training.training.run import Run


@contextlib.contextmanager
def batches_ahead(run: Run, first_step: int):
    """Batches from step `first_step` on, on the device; a thread prepares the next one while this one is
    trained on.
    """
    accumulation = run.args.gradient_accumulation_steps
    start, stop = first_step * accumulation, run.max_steps * accumulation
    loader = torch.utils.data.DataLoader(
        run.data,
        batch_sampler=(
            run.plan.share(number, run.accelerator.process_index) for number in range(start, stop)
        ),
        collate_fn=pack_batch,
        num_workers=run.args.dataloader_num_workers,
        worker_init_fn=initialize_worker,
        pin_memory=run.accelerator.device.type == "cuda",
        generator=torch.Generator(),  # one of its own keeps the global one untouched
    )
    batches, device = iter(loader), run.accelerator.device

    def upcoming(pool):
        prepared = pool.submit(next, batches)
        for number in range(start, stop):
            try:
                batch = unpack_batch(prepared.result(), device)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise UserError(
                    "a process that prepares images has died (out of memory?): fewer --dataloader_num_workers"
                ) from None
            if number + 1 < stop:
                prepared = pool.submit(next, batches)
            yield batch

    try:
        with ThreadPoolExecutor(1) as pool:
            yield upcoming(pool)
    finally:
        if run.args.dataloader_num_workers:  # else Python waits at its end for them, who answer no signal
            batches._shutdown_workers()


def initialize_worker(number: int) -> None:
    """Readies a process that prepares images: the libraries, where it doesn't have them from the main process
    (Windows, macOS), which alone answers signals.
    """
    silence_image_libraries()
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def pack_batch(items: list[dict]) -> dict:
    """Items of one bucket -> a batch that takes one copy to the device for each type of tensor: {captions,
    buffers, layout}.
    """
    batch = collate(items)
    layout = {name: (str(v.dtype), v.shape) for name, v in batch.items() if name != "captions"}
    kinds = {kind: [n for n, (own, _) in layout.items() if own == kind] for kind, _ in layout.values()}
    buffers = {kind: torch.cat([batch[name].flatten() for name in names]) for kind, names in kinds.items()}
    return {"captions": batch["captions"], "buffers": buffers, "layout": layout}


def unpack_batch(packed: dict, device) -> dict:
    """What `pack_batch` made -> the batch, as `collate` gives it, on the device."""
    buffers, batch = move_to_device(packed["buffers"], device), {"captions": packed["captions"]}
    for name, (kind, shape) in packed["layout"].items():
        batch[name], buffers[kind] = buffers[kind].split(
            [math.prod(shape), len(buffers[kind]) - math.prod(shape)]
        )
        batch[name] = batch[name].view(shape)
    return batch
