"""counts.json, what was counted before: kept, compared with, and shown as a table.

{"released": {case: {program: record}}, "tiny": {case: {"project": record}}}; a record has kernels by phase,
waits by place, and sums of the rest. Those of the toys' sizes have kernels by place as well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from collections import Counter
from pathlib import Path

COUNTS = Path(__file__).with_name("counts.json")
SUMS = ("traffic", "flop", "casts", "copies")  # kept without what they consist of
NUMBERS = ("peak", "resident", "trained")
UNITS = {"traffic": (1e9, "GB"), "flop": (1e12, "TFLOP"), "peak": (2**30, "GiB"), "resident": (2**30, "GiB")}
COMPARED = ("kernels", "waits", "traffic", "flop", "casts", "copies", "peak", "resident")
PLACES_SHOWN = 5
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate")  # whose versions are kept
TITLES = {"project": "**ours**", "diffusers": "diffusers' example"}  # of programs, where their names aren't


def read_counts(tiny: bool) -> dict[str, dict[str, dict]]:
    """{case: {program: record}} of one of the two parts of counts.json."""
    return json.loads(COUNTS.read_text(encoding="utf-8"))["tiny" if tiny else "released"]


def write_counts(tiny: bool, counts: dict[str, dict[str, dict]]) -> None:
    """Writes one of the two parts of counts.json."""
    everything = json.loads(COUNTS.read_text(encoding="utf-8"))
    everything["tiny" if tiny else "released"] = counts
    COUNTS.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


def make_record(counts: dict, with_places: bool) -> dict:
    """What is kept of a count."""
    installed = {package for package in PACKAGES if importlib.util.find_spec(package)}  # a peer has no peft
    versions = {package: importlib.metadata.version(package) for package in sorted(installed)}
    record = {"kernels": counts["kernels"], "waits": counts["waits"]}
    record |= {name: sum(counts[name].values()) for name in SUMS}
    record |= {name: counts[name] for name in NUMBERS}
    return record | ({"places": counts["places"]} if with_places else {"versions": versions})


def total(record: dict, name: str) -> int:
    """One number of a record."""
    return sum(record[name].values()) if isinstance(record[name], dict) else record[name]


def describe(name: str, number: int) -> str:
    """A number with its unit."""
    divisor, unit = UNITS.get(name, (1, ""))
    return f"{number / divisor:.4g} {unit}" if unit else f"{number:,}"


def list_growth(before: dict, now: dict) -> list[str]:
    """A line for each count that has grown; under kernels and waits, one for each place where they have."""
    lines = []
    for name in COMPARED:
        numbers = total(before, name), total(now, name)
        if numbers[1] <= numbers[0]:
            continue
        lines.append(f"{name}: {numbers[0]:,} -> {numbers[1]:,} ({describe(name, numbers[1] - numbers[0])})")
        places = {"kernels": "places", "waits": "waits"}.get(name)
        if places in now and places in before:
            growth = Counter(now[places])
            growth.subtract(before[places])
            grown = [(place, number) for place, number in growth.most_common(PLACES_SHOWN) if number > 0]
            lines += [f"  {number:+,} {place}" for place, number in grown]
    return lines


def describe_record(record: dict) -> str:
    """A record on one line, and its waits below."""
    kernels = ", ".join(f"{phase} {number:,}" for phase, number in record["kernels"].items())
    numbers = ", ".join(f"{name} {describe(name, total(record, name))}" for name in COMPARED[1:])
    waits = [
        f"    waits {number:,} x {place}" for place, number in list(record["waits"].items())[:PLACES_SHOWN]
    ]
    return "\n".join([f"  kernels {total(record, 'kernels'):,} ({kernels}); {numbers}", *waits])


def short(number: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def comparison_table(counts: dict[str, dict[str, dict]]) -> str:
    """A Markdown table of the cases that were counted with several programs; a row for each program."""
    rows = [
        "| case | program | kernels | waits | GB | TFLOP | GiB | trained |",
        "| --- | --- | " + "--- | " * 6,
    ]
    rows[1] = rows[1].rstrip()
    for case, programs in counts.items():
        if len(programs) < 2:
            continue
        for name, record in programs.items():
            cells = [case, TITLES.get(name, name)]
            cells += [f"{total(record, column):,}" for column in ("kernels", "waits")]
            cells += [short(record["traffic"] / 1e9), short(record["flop"] / 1e12)]
            cells += [f"{record['peak'] / 2**30:.2f}", f"{record['trained'] / 1e6:.2f} M"]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
