"""Losses and learning rates, written a step late so that the GPU is never waited for."""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from lora_training.console import print_status, progress
from lora_training.errors import UserError, one_line
from lora_training.files import atomic_write, last_checkpoint_note, output_name, read_metrics
from lora_training.training.output_folder import WANDB_RUN

if TYPE_CHECKING:
    import argparse

    from lora_training.optim.parts import TrainedPart
    from lora_training.training.run import Run

MAX_BAD_STEPS = 10  # steps in a row with a loss that isn't finite, after which a run ends
# settings that are no setting of the training, or secret
INTERNAL_SETTINGS = (
    "hub_token",
    "notify",
    "settings",
    "defaults",
    "sets",
    "command_line_flags",
    "family",
    "script",
    "lora_targets",
)


class PendingRow(NamedTuple):
    """A row of metrics.jsonl whose numbers are on their way from the GPU."""

    row: dict  # step and epoch
    rates: dict  # learning rates by part, and seconds per step
    # on the CPU: loss, gradient norm, non-finite steps in a row and in all, Prodigy's estimates
    numbers: torch.Tensor
    event: torch.Event | None  # recorded after the copy; None where there is no GPU
    bar: progress

    def has_arrived(self) -> bool:
        """Whether the numbers can be read without waiting."""
        return self.event is None or self.event.query()


class MetricsLogger:
    """Collects losses on the device, and writes metrics.jsonl and trackers.

    A row is written a step late, so that the GPU is never waited for.
    """

    def __init__(self, run: Run, first_step: int) -> None:
        self.run = run
        self.loss_sum: torch.Tensor | None = None  # since the last log
        self.last_logged_step = first_step
        self.timer_start = time.perf_counter()
        self.step_seconds: list[float] = []  # mean seconds per step, for each log
        self.pending: list[PendingRow] = []
        self.unwritten_lines: list[str] = []
        self.file = Path(run.args.output_dir) / "metrics.jsonl"
        if run.accelerator.is_main_process:
            self.drop_rows_after(first_step)

    def drop_rows_after(self, step: int) -> None:
        """Rewrites metrics.jsonl with its rows up to a step; with none at step 0."""
        rows = read_metrics(self.run.args.output_dir) if step else []
        lines = [json.dumps(row) + "\n" for row in rows if row["step"] <= step]
        with atomic_write(self.file) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def add(self, loss: torch.Tensor) -> None:
        """Takes one batch's share of the loss, without waiting for it."""
        self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss

    def log(self, step: int, grad_norm: torch.Tensor, active: list[TrainedPart], bar: progress) -> None:
        """Writes the row of the log before, and sends the mean loss since then on its way to the CPU."""
        run, steps = self.run, step - self.last_logged_step
        numbers = self.stack_numbers(steps, grad_norm, active)
        on_cpu = numbers.to("cpu", non_blocking=numbers.is_cuda)
        event = torch.Event(numbers.device) if numbers.is_cuda else None
        if event:
            event.record()
        self.write_arrived()
        seconds = (time.perf_counter() - self.timer_start) / steps
        self.step_seconds.append(seconds)
        row = {"step": step, "epoch": step * run.args.gradient_accumulation_steps / run.plan.per_epoch}
        rates = {f"lr_{part.name}": part.current_lr for part in active}
        rates["seconds_per_step"] = seconds
        self.pending.append(PendingRow(row, rates, on_cpu, event, bar))
        if event is None:
            self.write_arrived()
        self.loss_sum, self.last_logged_step = None, step
        self.timer_start = time.perf_counter()

    def stack_numbers(self, steps: int, grad_norm: torch.Tensor, active: list[TrainedPart]) -> torch.Tensor:
        """The numbers of a PendingRow, on the device; the loss is the mean of `steps` steps."""
        run, guard = self.run, self.run.guard
        numbers = [self.loss_sum / steps, grad_norm, guard.bad_run, guard.bad_total]
        estimates = [part.step_size_estimate() for part in active]
        numbers += [estimate for estimate in estimates if estimate is not None]
        stacked = torch.stack(numbers)
        if run.accelerator.num_processes > 1:
            stacked[0] = run.accelerator.reduce(stacked[0], reduction="sum")
        return stacked

    def write_pending(self) -> None:
        """Waits for all rows that are on their way, and writes them."""
        if any(pending.event for pending in self.pending):
            torch.cuda.synchronize()
        self.write_arrived()

    def write_arrived(self) -> None:
        """Writes the rows whose numbers have arrived.

        Errors: UserError after MAX_BAD_STEPS losses that aren't finite.
        """
        while self.pending and self.pending[0].has_arrived():
            self.write_row(self.pending.pop(0))

    def write_row(self, pending: PendingRow) -> None:
        """Writes the row of one log, and warns of a loss that isn't finite. Errors: as `write_arrived`."""
        loss, grad_norm, bad_run, bad_total, *estimates = pending.numbers.tolist()
        row, rates = pending.row, pending.rates
        # learning rates come first in `rates`; Prodigy multiplies them by its estimates
        for name, estimate in zip(rates, estimates, strict=False):
            rates[name] *= estimate
        skipped = {"skipped_steps": int(bad_total)} if bad_total else {}
        self.write(row | {"loss": loss, "grad_norm": grad_norm} | rates | skipped)
        pending.bar.set_postfix({"loss": f"{loss:.4f}"}, refresh=False)
        if bad_run:
            print_status(f"warning: step {row['step']}: the loss is {loss}; the step is left out")
        if bad_run >= MAX_BAD_STEPS:
            advice = "try --mixed_precision bf16 or a lower --learning_rate"
            checkpoint = last_checkpoint_note(Path(self.run.args.output_dir))
            raise UserError(f"the loss has not been finite for {int(bad_run)} steps: {advice}{checkpoint}")

    def write(self, row: dict) -> None:
        """Appends a row to metrics.jsonl and sends it to the trackers.

        Numbers that aren't finite become text in the file. Where Windows has it locked for a spreadsheet, the
        row is written with a later one.
        """
        finite = {name: str(value) if is_infinite(value) else value for name, value in row.items()}
        if self.run.accelerator.is_main_process:
            self.unwritten_lines.append(json.dumps(finite) + "\n")
            with contextlib.suppress(PermissionError), self.file.open("a", encoding="utf-8") as stream:
                stream.writelines(self.unwritten_lines)
                self.unwritten_lines.clear()
        values = {name: value for name, value in row.items() if name != "step"}
        self.run.accelerator.log(values, step=row["step"])

    def restart_timer(self) -> None:
        """Leaves the time since the last log out of the step times."""
        self.timer_start = time.perf_counter()

    def close(self) -> None:
        """Writes what is pending, and prints the median step time."""
        self.write_pending()
        if self.step_seconds:
            median = sorted(self.step_seconds)[len(self.step_seconds) // 2]
            print_status(f"median {median:.3f} s per step")


def is_infinite(value: object) -> bool:
    """Whether a value is a number that JSON can't spell: infinite or NaN."""
    return isinstance(value, float) and not math.isfinite(value)


def start_trackers(run: Run, first_step: int) -> None:
    """Starts the trackers with the settings as their configuration; the hub token is not among them.

    TensorBoard forgets what other runs have logged in the same folder from `first_step` on. Errors: UserError
    for a tracker that can't start.
    """
    args = run.args
    if not run.accelerator.log_with:
        return
    settings = {name: value for name, value in vars(args).items() if name not in INTERNAL_SETTINGS}
    config = {
        name: value if isinstance(value, int | float | str) else str(value)
        for name, value in settings.items()
    }
    run_name = args.run_name or output_name(args.output_dir)
    options = {
        "wandb": {"name": run_name, "dir": args.output_dir},
        "tensorboard": {"purge_step": first_step + 1 if first_step else 0},
    }
    if {"wandb", "all"} & set(args.report_to.split(",")) and run.accelerator.is_main_process:
        options["wandb"] |= {"id": wandb_run(args), "resume": "allow"}
    try:
        with progress("starting the trackers"):
            run.accelerator.init_trackers(f"lora-{args.family.name}", config=config, init_kwargs=options)
    except Exception as error:  # of any kind, by tracker: its server can't be reached, or refuses the login
        if isinstance(error, OSError) and error.errno:
            raise
        way_out = "--report_to tensorboard needs no server"
        raise UserError(f"--report_to {args.report_to} can't start: {one_line(error)}; {way_out}") from None


def wandb_run(args: argparse.Namespace) -> str:
    """The name by which W&B knows a run, so that a resumed one goes on in the same curves."""
    file = Path(args.output_dir) / WANDB_RUN
    if not file.is_file():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
