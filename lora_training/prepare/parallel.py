"""Work on many pictures by threads, a few at a time in memory."""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from lora_training.console import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def in_parallel(work: Callable, items: list, workers: int, title: str) -> Iterator[tuple]:
    """Yields (item, work(item)) in order, computed by threads a few items ahead, with a progress bar."""
    with ThreadPoolExecutor(workers) as pool, progress(title, len(items), unit=" images") as bar:
        pending = deque()
        try:
            for item in items:
                pending.append((item, pool.submit(work, item)))
                if len(pending) > 2 * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
                    bar.update()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
                bar.update()
        finally:
            for _, future in pending:
                future.cancel()
