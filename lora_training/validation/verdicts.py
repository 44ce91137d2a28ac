"""Which step to take, from the probes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.files import read_metrics

if TYPE_CHECKING:
    from lora_training.training.run import Run

NOTHING_LEARNED = 0.005  # a share of the loss so small that it tells nothing
CLEARLY_WORSE = 0.85  # of the best step's worth; below it the last step is not advised


def make_verdict(run: Run) -> dict | None:
    """Which step to take and why, from the probes in metrics.jsonl; None if none of them gave numbers.

    Returns {"step": int, "text": str, "warnings": [str], "rows": [probe rows]}. docs/probes.md shows that the
    advice agrees with a judge of the pictures.
    """
    rows = read_probe_rows(run.args.output_dir)
    if not rows:
        return None
    name = "learned_held_out" if "learned_held_out" in rows[-1] else "learned"
    most_learned = max(row[name] for row in rows)
    best, last = choose_row(rows, name), rows[-1]
    text = f"take step {best['step']}, the last: nothing speaks for an earlier one"
    if best is not last:
        share = best[name] / most_learned
        text = f"take step {best['step']} of {run.max_steps}: {share:.0%} of what was learned"
        less_forgotten = 1 - best["forgotten"] / last["forgotten"] if last["forgotten"] else 0.0
        if less_forgotten > 0:
            text += f", and {less_forgotten:.0%} less forgotten"
    warnings = learning_warnings(rows, most_learned)
    if best["forgotten"] > 0.5 and most_learned > 0.02:
        prompts = ", ".join(run.control_prompts[:2])
        warnings.append(
            f"control prompts have changed half as much as trained ones ({prompts}): the LoRA bleeds;"
            " a lower --learning_rate, prior preservation, or captions that say more"
        )
    return {"step": best["step"], "text": text, "warnings": warnings, "rows": rows}


def read_probe_rows(output: str) -> list[dict]:
    """The probes' rows of metrics.jsonl whose values are all finite; others are text in the file."""
    rows = [row for row in read_metrics(output) if isinstance(row.get("learned"), float)]
    return [row for row in rows if all(isinstance(value, int | float) for value in row.values())]


def choose_row(rows: list[dict], name: str) -> dict:
    """The row of the step to take: the last, unless an earlier one is clearly worth more.

    A step's worth is the share that it has of what was learned at most, times the square of what it has
    kept, 1 - forgotten. name: of the value that says what was learned.
    """
    most_learned = max(row[name] for row in rows)
    worths = []
    for row in rows:
        share = max(0.0, row[name]) / max(most_learned, 1e-9)
        worths.append(share * (1 - min(1.0, row["forgotten"])) ** 2)
    if most_learned < NOTHING_LEARNED or worths[-1] >= CLEARLY_WORSE * max(worths):
        return rows[-1]
    return rows[worths.index(max(worths))]


def learning_warnings(rows: list[dict], most_learned: float) -> list[str]:
    """What the probes say is wrong with the training. most_learned: the most in any row, held-out or not."""
    warnings, last = [], rows[-1]
    learned_little = most_learned < NOTHING_LEARNED
    lost_half = last["learned"] < 0.5 * max(row["learned"] for row in rows)
    if last["learned"] < -NOTHING_LEARNED or (lost_half and not learned_little):
        warnings.append("the loss has risen far above its best: the --learning_rate is too high")
    elif learned_little:
        advice = "a higher --learning_rate, more steps, or captions with the trigger word"
        warnings.append(f"hardly anything was learned: {advice}")
    if "held_out_loss" in last:
        lowest = min(rows, key=lambda row: row["held_out_loss"])
        if last["held_out_loss"] > 1.02 * lowest["held_out_loss"]:
            memorised = "from there on, pictures are memorised"
            warnings.append(f"the loss on held-out images has risen since step {lowest['step']}: {memorised}")
    return warnings
