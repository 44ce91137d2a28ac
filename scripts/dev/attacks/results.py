"""Results of attacks: stored as they come, and as a Markdown table."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from lora_training.families import FAMILIES
from scripts.dev.result_files import replace_between

MARKS = ("<!-- attacks: begin -->", "<!-- attacks: end -->")
COLUMNS = (
    *("what", "family", "cases", "done (0)"),
    *("one-line error, input (2)", "one-line error, machine (1)", "failed"),
)


def read_results(file: Path, seed: int) -> dict[str, dict]:
    """{case: its result with this seed} of a file of results."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {row["name"]: row for row in map(json.loads, lines) if row["seed"] == seed}


def results_table(rows: list[dict], kinds: list[str]) -> str:
    """What was run, how it ended, and what failed, by kind and family."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    for kind in kinds:
        for family in FAMILIES:
            results = [row for row in rows if row["family"] == family and row["name"].startswith(kind)]
            if results:
                lines.append(table_row(kind, family, results))
    return "\n".join(lines)


def table_row(kind: str, family: str, results: list[dict]) -> str:
    """One row; kills are counted too."""
    codes, failed = Counter(row["code"] for row in results), sum(bool(row["wrong"]) for row in results)
    kills = sum(len(row.get("kills", ())) for row in results)
    what = f"{kind} ({kills})" if kills else kind
    cells = (what, family, len(results), codes[0], codes[2], codes[1], failed)
    return f"| {' | '.join(map(str, cells))} |"


def write_table(page: Path, table: str) -> None:
    """Puts the table between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(replace_between(text, MARKS, table), encoding="utf-8")
