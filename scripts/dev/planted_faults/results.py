"""Results of planted faults: stored as they come, and as a Markdown table."""

from __future__ import annotations

import json
from pathlib import Path

from scripts.dev.planted_faults.fault import Fault
from scripts.dev.result_files import replace_between

MARKS = ("<!-- planted faults: begin -->", "<!-- planted faults: end -->")


def read_results(file: Path) -> dict[str, dict]:
    """{fault: its last result} of a file of results."""
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {row["fault"]: row for row in rows}


def results_table(results: dict[str, dict], faults: tuple[Fault, ...]) -> str:
    """The results in the order of the list."""
    tried = [fault for fault in faults if fault.name in results]
    rows = ["| where | part | fault | the test that saw it |", "| --- | --- | --- | --- |"]
    for fault in tried:
        test = short_name(results[fault.name]["caught"])
        rows.append(f"| `{fault.files}` | {fault.part} | {fault.name} | {test} |")
    caught = sum(bool(results[fault.name]["caught"]) for fault in tried)
    return f"{caught} of {len(tried)} planted faults are caught.\n\n" + "\n".join(rows)


def short_name(node: str) -> str:
    """room/test_file.py::test_name[case] -> `test_name`."""
    return "`" + node.split("::")[1].split("[")[0] + "`" if "::" in node else "**none**"


def write_table(page: Path, table: str) -> None:
    """Puts the table between its marks in a page; without them, at its end."""
    text = page.read_text(encoding="utf-8") if page.is_file() else "# Reliability\n"
    if MARKS[0] not in text:
        text = f"{text.rstrip()}\n\n## Planted faults\n\n{MARKS[0]}\n{MARKS[1]}\n"
    page.write_text(replace_between(text, MARKS, table), encoding="utf-8")
