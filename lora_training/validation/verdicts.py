"""Which step to take, from the probes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.files import read_metrics

if TYPE_CHECKING:
    from lora_training.training.run import Run


def verdict(run: Run) -> dict | None:
    """Which step to take and why, from the probes in metrics.jsonl; None if none of them gave numbers.

    Returns {"step": int, "text": str, "warnings": [str], "rows": [probe rows]}. A step's worth is the share
    that it has of what was learned at most, times the square of what it has kept, 1 - forgotten.
    docs/probes.md shows that this agrees with a judge of the pictures.
    """
    rows = [row for row in read_metrics(run.args.output_dir) if isinstance(row.get("learned"), float)]
    rows = [
        row for row in rows if all(isinstance(value, int | float) for value in row.values())
    ]  # none is NaN
    if not rows:
        return None
    seen = "learned_held_out" if "learned_held_out" in rows[-1] else "learned"
    most = max(row[seen] for row in rows)
    worth = [max(0.0, row[seen]) / max(most, 1e-9) * (1 - min(1.0, row["forgotten"])) ** 2 for row in rows]
    last, faint = rows[-1], most < 0.005
    clearly = not faint and worth[-1] < 0.85 * max(worth)
    best = rows[worth.index(max(worth))] if clearly else last
    text = f"take step {best['step']}, the last: nothing speaks for an earlier one"
    if best is not last:
        less = 1 - best["forgotten"] / last["forgotten"] if last["forgotten"] else 0.0
        text = f"take step {best['step']} of {run.max_steps}: {best[seen] / most:.0%} of what was learned"
        text += f", and {less:.0%} less forgotten" if less > 0 else ""
    warnings = []
    if last["learned"] < -0.005 or (
        not faint and last["learned"] < 0.5 * max(row["learned"] for row in rows)
    ):
        warnings.append("the loss has risen far above its best: the --learning_rate is too high")
    elif faint:
        warnings.append(
            "hardly anything was learned: a higher --learning_rate, more steps, or captions with the trigger word"
        )
    if "held_out_loss" in last:
        low = min(rows, key=lambda row: row["held_out_loss"])
        if last["held_out_loss"] > 1.02 * low["held_out_loss"]:
            warnings.append(
                f"the loss on held-out images has risen since step {low['step']}: from there on, pictures are memorised"
            )
    if best["forgotten"] > 0.5 and most > 0.02:
        warnings.append(
            f"control prompts have changed half as much as trained ones ({', '.join(run.control_prompts[:2])}): the LoRA bleeds;"
            " a lower --learning_rate, prior preservation, or captions that say more"
        )
    return {"step": best["step"], "text": text, "warnings": warnings, "rows": rows}
