"""Work divided between the processes of a run."""

from __future__ import annotations

import torch

from lora_training.console import progress


def distribute(what: str, keys: list, compute) -> dict:
    """{key: its value}; each value is computed by one process, and sent to all.

    compute: a list of keys -> their values. what: the title of the progress bar.
    """
    is_distributed = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if is_distributed else 0
    processes = torch.distributed.get_world_size() if is_distributed else 1
    results = {}
    with progress(what, len(keys)) as bar:
        for begin in range(0, len(keys), 16 * processes):
            share = keys[begin + rank : begin + 16 * processes : processes]
            shares = [dict(zip(share, compute(share), strict=True))] * processes
            if is_distributed:
                torch.distributed.all_gather_object(shares, shares[rank])
            for values in shares:
                results.update(values)
            bar.update(min(16 * processes, len(keys) - begin))
    return results
