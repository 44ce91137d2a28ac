"""Times the steps of a training program by the bar that it moves, and ends it when they are counted."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from unittest.mock import patch

STEPS = 100_003  # what every program is told to train; the bar of this length is that of its steps


class Measured(BaseException):
    """Ends a program whose steps are counted; no `except Exception` holds it up."""


class Clock:
    """Lets `warm_up` steps pass, times `steps` of them with one wait before and one after, and ends the program.

    trace: a file for torch's profile of three steps; phases: also time what a step consists of.
    """

    def __init__(self, device, warm_up: int, steps: int, phases: bool = False, trace: Path | None = None) -> None:
        self.device, self.warm_up, self.steps, self.trace = device, warm_up, steps, trace
        self.stamps: list | None = [] if phases else None
        self.count, self.found, self.profile, self.born = 0, {}, None, time.perf_counter()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Waits until the GPU has done all that it was given."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def stamp(self, name: str) -> None:
        """Notes the moment in which a phase begins, on the GPU's own clock where there is one."""
        import torch

        if self.stamps is None or not self.warm_up <= self.count <= self.warm_up + self.steps:
            return
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            event.record()
        self.stamps.append((name, event))

    def tick(self) -> None:
        """After each step."""
        import torch

        self.count += 1
        self.stamp("prepare")
        if self.count == 1:
            self.wait()
            self.found["first_step_s"] = round(time.perf_counter() - self.born, 2)
        if self.count == self.warm_up:
            self.wait()
            if self.on_gpu:
                self.found["loading_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()
        if self.count == self.warm_up + self.steps:
            self.wait()
            self.found["ms"] = (time.perf_counter() - self.began) / self.steps * 1e3
            if self.on_gpu:
                self.found["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                self.found["reserved_GiB"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
            if self.stamps:
                self.found["phases_ms"] = self.phases()
            if not self.trace:
                raise Measured
            self.profile = torch.profiler.profile().__enter__()
        if self.profile and self.count == self.warm_up + self.steps + 3:
            self.wait()
            self.profile.__exit__(None, None, None)
            self.profile.export_chrome_trace(str(self.trace))
            order = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
            table = self.profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
            self.trace.with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
            raise Measured

    def phases(self) -> dict[str, float]:
        """The median milliseconds of each phase, in a step's order."""
        took: dict[str, list[float]] = {}
        for (name, begin), (_, end) in zip(self.stamps, self.stamps[1:], strict=False):
            took.setdefault(name, []).append(begin.elapsed_time(end) if self.on_gpu else (end - begin) * 1e3)
        return {name: round(statistics.median(values), 3) for name, values in took.items()}


@contextlib.contextmanager
def watching(clock: Clock):
    """While inside, the clock ticks with each bar of STEPS steps, and has the phases stamped."""
    import torch
    import tqdm.std
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    plain = tqdm.std.tqdm.update

    def update(bar, n: int = 1):
        if bar.total == STEPS:
            clock.tick()
        return plain(bar, n)

    backward = torch.autograd.backward

    def stamped(*args, **named):
        clock.stamp("backward")
        result = backward(*args, **named)
        clock.stamp("clip")
        return result

    hooks = [
        register_optimizer_step_pre_hook(lambda *_: clock.stamp("optimizer")),
        register_optimizer_step_post_hook(lambda *_: clock.stamp("rest")),
    ]
    phases = patch.object(torch.autograd, "backward", stamped) if clock.stamps is not None else contextlib.nullcontext()
    try:
        with patch.object(tqdm.std.tqdm, "update", update), phases:
            yield
    finally:
        for hook in hooks:
            hook.remove()
