"""Losses and rates, written a step late so that the GPU is never waited for."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lora_training.console import print_status, progress
from lora_training.errors import UserError
from lora_training.files import atomic_write, last_checkpoint_note, read_metrics

if TYPE_CHECKING:
    from lora_training.optim.parts import TrainedPart
    from lora_training.training.run import Run


class MetricsLogger:
    """Collects losses on the device, and writes metrics.jsonl and trackers: a step late, so that the GPU is
    never waited for.
    """

    def __init__(self, run: Run, first_step: int) -> None:
        self.run, self.loss, self.since, self.began = run, None, first_step, time.perf_counter()
        self.pending: list[tuple] = []  # rows whose numbers are on their way
        self.seconds, self.unwritten = [], []  # of each log's steps; lines for metrics.jsonl
        self.file = Path(run.args.output_dir) / "metrics.jsonl"
        if run.accelerator.is_main_process:
            kept = [
                row for row in read_metrics(run.args.output_dir) if first_step and row["step"] <= first_step
            ]
            with atomic_write(self.file) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def add(self, loss) -> None:
        """Takes one batch's share of the loss, without waiting for it."""
        self.loss = loss if self.loss is None else self.loss + loss

    def log(self, step: int, norm, active: list[TrainedPart], bar) -> None:
        """Writes the row of the log before, and sends the mean loss since then on its way to the host."""
        run, steps = self.run, step - self.since
        found = [
            d for p in active if (d := p.optimizer_settings().get("d")) is not None
        ]  # Prodigy's estimates, on the device
        numbers = torch.stack([self.loss / steps, norm, run.guard.bad_run, run.guard.bad_total, *found])
        if run.accelerator.num_processes > 1:
            numbers[0] = run.accelerator.reduce(numbers[0], reduction="sum")
        arriving = numbers.to("cpu", non_blocking=numbers.is_cuda)
        event = torch.Event(numbers.device) if numbers.is_cuda else None
        if event:
            event.record()
        row = {"step": step, "epoch": step * run.args.gradient_accumulation_steps / run.plan.per_epoch}
        self.write_arrived()
        self.seconds.append((time.perf_counter() - self.began) / steps)
        rates = {f"lr_{p.name}": p.current_lr for p in active}
        self.pending.append((row, rates | {"seconds_per_step": self.seconds[-1]}, arriving, event, bar))
        if event is None:  # not on a GPU: nothing to wait for
            self.write_arrived()
        self.loss, self.since, self.began = None, step, time.perf_counter()

    def write_pending(self) -> None:
        """Waits for all rows that are on their way, and writes them."""
        if any(event for *_, event, _ in self.pending):
            torch.cuda.synchronize()
        self.write_arrived()

    def write_arrived(self) -> None:
        """Writes the rows whose numbers have arrived. Errors: UserError after ten losses that aren't finite."""
        while self.pending and (self.pending[0][3] is None or self.pending[0][3].query()):
            self.write_row(*self.pending.pop(0))

    def write_row(self, row: dict, rates: dict, arrived, event, bar) -> None:
        """Writes the row of one log."""
        loss, norm, bad_run, bad_total, *found = arrived.tolist()
        for name, d in zip(rates, found, strict=False):  # the rates come first
            rates[name] *= d
        skipped = {"skipped_steps": int(bad_total)} if bad_total else {}
        self.write(row | {"loss": loss, "grad_norm": norm} | rates | skipped)
        bar.set_postfix({"loss": f"{loss:.4f}"}, refresh=False)
        if bad_run:
            print_status(f"warning: step {row['step']}: the loss is {loss}; the step is left out")
        if bad_run >= 10:
            advice = "try --mixed_precision bf16 or a lower --learning_rate"
            kept = last_checkpoint_note(Path(self.run.args.output_dir))
            raise UserError(f"the loss has not been finite for {int(bad_run)} steps: {advice}{kept}")

    def write(self, row: dict) -> None:
        """Appends a row to metrics.jsonl and sends it to the trackers.

        Windows' spreadsheets lock the file: then later.
        """
        finite = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in row.items()}
        if self.run.accelerator.is_main_process:
            self.unwritten.append(json.dumps(finite) + "\n")
            with contextlib.suppress(PermissionError), self.file.open("a", encoding="utf-8") as stream:
                stream.writelines(self.unwritten)
                self.unwritten.clear()
        self.run.accelerator.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def pause(self) -> None:
        """Leaves the time since the last log out of the step times."""
        self.began = time.perf_counter()

    def close(self) -> None:
        """Writes what is pending, and prints the median step time."""
        self.write_pending()
        if self.seconds:
            print_status(f"median {sorted(self.seconds)[len(self.seconds) // 2]:.3f} s per step")


def start_trackers(run: Run) -> None:
    """Starts the trackers with the settings as their configuration; the hub token is not among them."""
    args = run.args
    if not run.accelerator.log_with:
        return
    inner = ("hub_token", "settings", "defaults", "sets", "command_line_flags", "family", "script")
    public = {k: v for k, v in vars(args).items() if k not in inner}
    config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in public.items()}
    own = {"wandb": {"name": args.run_name or Path(args.output_dir).resolve().name, "dir": args.output_dir}}
    with progress("starting the trackers"):
        run.accelerator.init_trackers(f"lora-{args.family.name}", config=config, init_kwargs=own)
