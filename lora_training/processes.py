"""Work divided between the processes of a run."""

from __future__ import annotations

import torch

from lora_training.console import progress


def distribute(what: str, places: list, compute) -> dict:
    """{place: what `compute`, given a list of places, has for it}; each is computed by one process, and given
    to all.
    """
    many = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if many else (0, 1)
    out = {}
    with progress(what, len(places)) as bar:
        for begin in range(0, len(places), 16 * world):
            share = places[begin + rank : begin + 16 * world : world]
            everyone = [dict(zip(share, compute(share), strict=True))] * world
            if many:
                torch.distributed.all_gather_object(everyone, everyone[rank])
            out.update(pair for found in everyone for pair in found.items())
            bar.update(min(16 * world, len(places) - begin))
    return out
