"""Batches prepared ahead of the training step, and their way to the device."""

from __future__ import annotations

import contextlib
import math
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from lora_training.data.samples import TrainingData, collate
from lora_training.errors import UserError
from lora_training.libraries import silence_image_libraries
from lora_training.signals import STOP_SIGNALS
from lora_training.tensors import move_to_device

if TYPE_CHECKING:
    from lora_training.data.batches import BatchPlan


@contextlib.contextmanager
def batches_ahead(data: TrainingData, plan: BatchPlan, numbers: range, accelerator, workers: int):
    """Gives an iterator over this process's share of the global batches `numbers`, on the device.

    A thread prepares the next one while this one is trained on. workers: processes that prepare images.
    Errors: UserError if one of these has died.
    """
    loader = torch.utils.data.DataLoader(
        data,
        batch_sampler=(plan.share(number, accelerator.process_index) for number in numbers),
        collate_fn=pack_batch,
        num_workers=workers,
        worker_init_fn=initialize_worker,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # one of its own keeps the global one untouched
    )
    packed = iter(loader)

    def prepared_batches(pool: ThreadPoolExecutor):
        upcoming = pool.submit(next, packed)
        for number in numbers:
            batch = unpack_batch(result_of(upcoming), accelerator.device)
            if number != numbers[-1]:
                upcoming = pool.submit(next, packed)
            yield batch

    try:
        with ThreadPoolExecutor(1) as pool:
            yield prepared_batches(pool)
    finally:
        if workers:  # else Python waits at its end for them, who answer no signal
            packed._shutdown_workers()


def result_of(upcoming) -> dict:
    """The batch that a thread has prepared. Errors: UserError if a worker process has died."""
    try:
        return upcoming.result()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = "a process that prepares images has died (out of memory?)"
        raise UserError(f"{what}: fewer --dataloader_num_workers") from None


def initialize_worker(number: int) -> None:
    """Readies a process that prepares images. The main process alone answers signals."""
    silence_image_libraries()
    for name in STOP_SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def pack_batch(items: list[dict]) -> dict:
    """Items of one bucket -> {captions, buffers, layout}: one flat buffer, and one copy, for each type of
    tensor.
    """
    batch = collate(items)
    layout = {name: (str(v.dtype), v.shape) for name, v in batch.items() if name != "captions"}
    names_by_dtype: dict[str, list[str]] = {}
    for name, (dtype, _) in layout.items():
        names_by_dtype.setdefault(dtype, []).append(name)
    buffers = {
        dtype: torch.cat([batch[name].flatten() for name in names]) for dtype, names in names_by_dtype.items()
    }
    return {"captions": batch["captions"], "buffers": buffers, "layout": layout}


def unpack_batch(packed: dict, device) -> dict:
    """What `pack_batch` made -> the batch, as `collate` gives it, on the device."""
    buffers, batch = move_to_device(packed["buffers"], device), {"captions": packed["captions"]}
    for name, (dtype, shape) in packed["layout"].items():
        size = math.prod(shape)
        values, buffers[dtype] = buffers[dtype].split([size, len(buffers[dtype]) - size])
        batch[name] = values.view(shape)
    return batch
