"""The top of a run's page: how far it came, its numbers, and which step to take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from lora_training.report.formatting import format_duration, format_whole_percent
from lora_training.report.plots import format_value, smoothed
from lora_training.report.run_folder import as_float, is_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_training.report.run_folder import RunFolder


class ProbedStep(NamedTuple):
    """What the probes have measured at a step."""

    step: object
    numbers: list[str]
    is_advised: bool


class Verdict(NamedTuple):
    """What is said about the steps. columns: the names of the numbers in each row."""

    text: object
    warnings: list
    columns: list[str]
    rows: list[ProbedStep]


def progress_notes(run: RunFolder) -> list[str]:
    """How far the run came, and its base."""
    total = run.data.get("steps", run.settings.values.get("max_train_steps"))
    of_total = f" of {total:,}" if is_number(total) and total > run.last_step else ""
    notes = ["finished" if run.is_finished else "not finished", f"{run.last_step:,}{of_total} steps"]
    base = run.settings.values.get("pretrained_model_name_or_path")
    return notes + ([f"base {base}"] if base else [])


def summary_cards(run: RunFolder) -> list[tuple[str, str]]:
    """The numbers that are asked for first, and what they count."""
    cards = [(f"{run.last_step:,}", "steps")]
    if is_number(run.data.get("images")):
        cards.append((f"{run.data['images']:,}", "images"))
    for name in ("learned", "forgotten"):
        values = dict(run.metrics.get(name, []))
        step = run.advised_step if run.advised_step in values else max(values, default=0)
        if step and math.isfinite(values.get(step, math.nan)):
            cards.append((f"{100 * values[step]:.0f}%", f"{name} at step {step:,}"))
    if loss := smoothed(run.metrics.get("loss", [])):
        cards.append((format_value(float(f"{loss[-1][1]:.3g}")), "loss, smoothed"))
    if seconds := training_seconds(run):
        cards.append((format_duration(seconds), "of training"))
    memory = [value for _, value in run.metrics.get("memory_gib", []) if math.isfinite(value)]
    if memory:
        cards.append((f"{max(memory):.1f}", "GiB of memory"))
    return cards


def training_seconds(run: RunFolder) -> float:
    """How long the steps took, from the seconds per step that each log has."""
    total, last_step = 0.0, 0
    for step, seconds in run.metrics.get("seconds_per_step", []):
        total += seconds * (step - last_step) if math.isfinite(seconds) else 0
        last_step = step
    return total


def read_verdict(run: RunFolder) -> Verdict:
    """Which step to take and why, the warnings, and the numbers behind it."""
    warnings = list(list_of(run.verdict.get("warnings")))
    skipped = run.last_value("skipped_steps")
    if skipped and math.isfinite(skipped):
        warnings.append(f"{skipped:.0f} steps were left out: their loss or gradient was not finite")
    rows = [row for row in list_of(run.verdict.get("rows")) if isinstance(row, dict)]
    formats: dict[str, Callable[[float], str]]
    formats = {"learned": format_whole_percent, "forgotten": format_whole_percent}
    if any("held_out_loss" in row for row in rows):
        formats["held_out_loss"] = format_value
    probed = []
    for row in rows:
        numbers = [probe_text(row.get(name), formatter) for name, formatter in formats.items()]
        is_advised = run.advised_step is not None and row.get("step") == run.advised_step
        probed.append(ProbedStep(row.get("step"), numbers, is_advised))
    columns = [name.replace("held_out", "held-out").replace("_", " ") for name in formats]
    return Verdict(run.verdict.get("text"), warnings, columns, probed)


def list_of(value: object) -> list:
    """A list from a JSON file; empty for what is none."""
    return value if isinstance(value, list) else []


def probe_text(value: object, formatter: Callable[[float], str]) -> str:
    """A number of verdict.json; what is no number as it is."""
    number = as_float(value)
    if number is not None:
        return formatter(number)
    return "" if value is None else str(value)
