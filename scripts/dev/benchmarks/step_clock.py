"""Times the steps of a training program by its progress bar, and ends it when they are counted."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch

STEPS = 100_003  # what every program is to train; the bar of this length is that of its steps
TRACED_STEPS = 3


class StepsTimed(BaseException):
    """Ends a program whose steps are counted; no `except Exception` holds it up."""


class Clock:
    """Lets `warm_up` steps pass, times `steps` of them with one wait before and one after, ends the program.

    trace: a file for torch's profile of three steps; phases: also time what a step consists of.
    """

    def __init__(
        self, device: torch.device, warm_up: int, steps: int, phases: bool = False, trace: Path | None = None
    ) -> None:
        self.device, self.warm_up, self.steps, self.trace = device, warm_up, steps, trace
        self.stamps: list | None = [] if phases else None
        self.count, self.results, self.profile = 0, {}, None
        self.created, self.began = time.perf_counter(), 0.0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Waits until the GPU has done all its work."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def stamp(self, phase: str) -> None:
        """Records the moment in which a phase begins, by the GPU's clock where there is one."""
        if self.stamps is None or not self.warm_up <= self.count <= self.warm_up + self.steps:
            return
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else time.perf_counter()
        if self.on_gpu:
            event.record()
        self.stamps.append((phase, event))

    def tick(self) -> None:
        """To be called after each step. Errors: StepsTimed after the last one."""
        self.count += 1
        self.stamp("prepare")
        if self.count == 1:
            self.wait()
            self.results["first_step_s"] = round(time.perf_counter() - self.created, 2)
        if self.count == self.warm_up:
            self.begin()
        if self.count == self.warm_up + self.steps:
            self.end()
            if not self.trace:
                raise StepsTimed
            self.profile = torch.profiler.profile().__enter__()
        if self.profile and self.count == self.warm_up + self.steps + TRACED_STEPS:
            self.write_trace()
            raise StepsTimed

    def begin(self) -> None:
        """Starts the timing."""
        self.wait()
        if self.on_gpu:
            self.results["loading_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()

    def end(self) -> None:
        """Records milliseconds per step, peak memory and phases."""
        self.wait()
        self.results["ms"] = (time.perf_counter() - self.began) / self.steps * 1e3
        if self.on_gpu:
            self.results["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            self.results["reserved_GiB"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        if self.stamps:
            self.results["phases_ms"] = self.phases()

    def write_trace(self) -> None:
        """Writes torch's profile, and a table of its operations beside it."""
        self.wait()
        self.profile.__exit__(None, None, None)
        self.profile.export_chrome_trace(str(self.trace))
        order = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        averages = self.profile.key_averages()
        table = averages.table(sort_by=order, row_limit=40, max_name_column_width=80)
        self.trace.with_suffix(".txt").write_text(table + "\n", encoding="utf-8")

    def phases(self) -> dict[str, float]:
        """The median milliseconds of each phase, in a step's order."""
        times: dict[str, list[float]] = {}
        for (phase, begin), (_, end) in zip(self.stamps, self.stamps[1:], strict=False):
            elapsed = begin.elapsed_time(end) if self.on_gpu else (end - begin) * 1e3
            times.setdefault(phase, []).append(elapsed)
        return {phase: round(statistics.median(values), 3) for phase, values in times.items()}


@contextlib.contextmanager
def watching(clock: Clock):
    """While inside, the clock ticks with each bar of STEPS steps, and has the phases stamped."""
    import tqdm.std
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    plain_update, plain_backward = tqdm.std.tqdm.update, torch.autograd.backward

    def update(bar, n: int = 1):
        if bar.total == STEPS:
            clock.tick()
        return plain_update(bar, n)

    def backward(*tensors, **options):
        clock.stamp("backward")
        result = plain_backward(*tensors, **options)
        clock.stamp("clip")
        return result

    hooks = [
        register_optimizer_step_pre_hook(lambda *_: clock.stamp("optimizer")),
        register_optimizer_step_post_hook(lambda *_: clock.stamp("rest")),
    ]
    with_phases = clock.stamps is not None
    phases = patch.object(torch.autograd, "backward", backward) if with_phases else contextlib.nullcontext()
    try:
        with patch.object(tqdm.std.tqdm, "update", update), phases:
            yield
    finally:
        for hook in hooks:
            hook.remove()
