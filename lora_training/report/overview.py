"""The top of a run's page: how far it came, its numbers, and which step to take."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from lora_training.html_page import finding_box, number_cards
from lora_training.report.formatting import format_duration, format_whole_percent
from lora_training.report.layout import ADVISED_TAG, NumberCell, section, table
from lora_training.report.plots import format_value, smoothed
from lora_training.report.run_folder import as_float, is_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from lora_training.report.run_folder import RunFolder

VERDICT_EXPLANATION = (
    '<p class="under below">Learned: how much better than the base alone the training pictures are predicted.'
    " Forgotten: how far prompts that nothing should change have moved. The step to take has learned nearly"
    " all there is, and forgotten little.</p>\n"
)


def heading(run: RunFolder) -> str:
    """Name, base, and how far the run came."""
    total = run.settings.values.get("max_train_steps")
    of_total = f" of {total:,}" if is_number(total) and total > run.last_step else ""
    notes = ["finished" if run.is_finished else "not finished", f"{run.last_step:,}{of_total} steps"]
    base = run.settings.values.get("pretrained_model_name_or_path")
    notes += [f"base {base}"] if base else []
    return f'<h1>{escape(run.name)}</h1><div class="dim">{escape(" · ".join(notes))}</div>\n'


def summary_cards(run: RunFolder) -> str:
    """The numbers that are asked for first."""
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
    return number_cards(cards)


def training_seconds(run: RunFolder) -> float:
    """How long the steps took, from the seconds per step that each log has."""
    total, last_step = 0.0, 0
    for step, seconds in run.metrics.get("seconds_per_step", []):
        total += seconds * (step - last_step) if math.isfinite(seconds) else 0
        last_step = step
    return total


def verdict_section(run: RunFolder) -> str:
    """Which step to take and why, the warnings, and the numbers behind it."""
    verdict = run.verdict
    warnings = list_of(verdict.get("warnings"))
    rows = [row for row in list_of(verdict.get("rows")) if isinstance(row, dict)]
    text = verdict.get("text")
    pieces = [f'<div class="verdict">{escape(str(text))}</div>\n'] if text else []
    pieces += [finding_box(str(warning)) for warning in warnings]
    skipped = run.last_value("skipped_steps")
    if skipped and math.isfinite(skipped):
        pieces.append(
            finding_box(f"{skipped:.0f} steps were left out: their loss or gradient was not finite")
        )
    if rows:
        pieces.append(VERDICT_EXPLANATION)
    return section("verdict", "Which step to take", "", *pieces, probe_table(rows, run.advised_step))


def list_of(value: object) -> list:
    """A list from a JSON file; empty for what is none."""
    return value if isinstance(value, list) else []


def probe_table(rows: list[dict], advised_step: int | None) -> str:
    """The probes' numbers at each step, the advised one highlighted."""
    columns: list[tuple[str, Callable[[float], str]]]
    columns = [("learned", format_whole_percent), ("forgotten", format_whole_percent)]
    if any("held_out_loss" in row for row in rows):
        columns.append(("held_out_loss", format_value))
    is_advised = [advised_step is not None and row.get("step") == advised_step for row in rows]
    cells = []
    for row, advised in zip(rows, is_advised, strict=True):
        step = escape(str(row.get("step"))) + (ADVISED_TAG if advised else "")
        cells.append([step, *(probe_cell(row.get(name), formatter) for name, formatter in columns)])
    titles = {"held_out_loss": "held-out loss"}
    return table(["step", *(titles.get(name, name) for name, _ in columns)], cells, is_advised)


def probe_cell(value: object, formatter: Callable[[float], str]) -> NumberCell:
    """A number of verdict.json; what is no number as it is."""
    number = as_float(value)
    if number is not None:
        return NumberCell(formatter(number))
    return NumberCell("" if value is None else escape(str(value)))
