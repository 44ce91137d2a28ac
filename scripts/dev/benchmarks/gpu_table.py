"""What measure_gpu.py has measured, as lines and as a Markdown table."""

from __future__ import annotations

from pathlib import Path

from lora_training.errors import UserError
from scripts.dev.benchmarks.cases import FLUX, parse_case
from scripts.dev.result_files import replace_between
from scripts.dev.step_counter.records import read_counts

PEAK_TFLOPS = {  # dense bf16, by the makers' data sheets
    **{"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "B200": 2250, "L40S": 362, "RTX 5090": 209},
    **{"RTX 4090": 165, "RTX 3090": 71, "RTX 4080": 97},
}
EXPECTED = {  # milliseconds on an H100, thought out from the counts before anything was measured
    "sd15:512:1": 12,
    "sd15:512:4": 25,
    "sdxl:1024:1": 60,
    "sdxl:1024:1:gradient_checkpointing": 85,
    "sd3:1024:1": 75,
    "flux:1024:1": 400,
    FLUX: 560,
    f"{FLUX},quantize_base=fp8": 400,
}
PROGRAMS = ("ours", "plain", "example")
MARKS = "<!-- measured -->\n", "<!-- end of what was measured -->\n"
COLUMNS = (
    *("case", "ms: ours / plain loop / example", "plain / ours", "TFLOP/s", "MFU"),
    *("GiB: ours / plain / example", "cosine to bf16", "cosine to plain", "expected ms"),
)


def counted_tflop(family: str, size: int) -> float | None:
    """Of one picture's forward and backward pass at rank 4, without what checkpointing computes twice."""
    programs = read_counts(tiny=False).get(f"{family}:{size}:1")
    return programs["project"]["flop"] / 1e12 if programs else None


def peak_tflops(machine: dict) -> float | None:
    """The card's bf16 peak by its data sheet, else what its large product reached."""
    peaks = (peak for name, peak in PEAK_TFLOPS.items() if name in machine["name"])
    return next(peaks, machine.get("matmul_TFLOPs"))


def row_line(row: dict) -> str:
    """A row in one line, for the terminal."""
    parts = [row["case"]]
    for program in PROGRAMS:
        if results := row.get(program):
            memory = f", {results['GiB']} GiB" if "GiB" in results else ""
            outcome = results["error"] if "error" in results else f"{results['ms']:.1f} ms{memory}"
            parts.append(f"{program} {outcome}")
            if "phases_ms" in results:
                phases = ", ".join(f"{name} {ms:.1f}" for name, ms in results["phases_ms"].items())
                parts.append(f"({phases})")
    for name in ("cosine", "cosine_to_plain"):
        if row["ours"].get(name) is not None:
            parts.append(f"{name.replace('_', ' ')} {row['ours'][name]}")
    return " | ".join(parts)


def results_table(state: dict) -> str:
    """Everything measured as Markdown: the card, how it was measured, a row for each case."""
    lines = [
        describe_measurement(state["machine"], state["settings"]),
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- " * len(COLUMNS) + "|",
    ]
    return "\n".join(lines + [table_row(row, state["machine"]) for row in state["rows"]]) + "\n"


def describe_measurement(machine: dict, settings: dict) -> str:
    """On what, and how, was measured."""
    packages = ("python", "torch", "diffusers", "peft", "accelerate")
    versions = ", ".join(f"{name} {machine[name]}" for name in packages)
    card = machine["name"]
    if "matmul_TFLOPs" in machine:
        product = f"{machine['matmul_TFLOPs']} TFLOP/s in a product of 8192 x 8192 matrices in bf16"
        card += f" ({machine['GiB']} GiB; {product})"
    runs = f"{settings['repeats']} alternating runs of {settings['steps']} steps after {settings['warm_up']}"
    return f"{card}; {versions}; {runs}."


def table_row(row: dict, machine: dict) -> str:
    """A case's row."""
    project, programs = row["ours"], [row.get(program) for program in PROGRAMS]
    if "error" in project:
        return f"| {row['case']} | {project['error']} |" + " |" * (len(COLUMNS) - 2)
    family, size, batch, _ = parse_case(row["case"])
    work, peak = counted_tflop(family, size), peak_tflops(machine)
    speed = work * batch / project["ms"] * 1e3 if work else None
    speedup = row["plain"]["ms"] / project["ms"] if "ms" in row.get("plain", {}) else None
    cells = [
        row["case"],
        " / ".join(format_result(results, "ms", ".1f") for results in programs),
        "–" if speedup is None else f"{speedup:.2f}",
        "–" if speed is None else f"{speed:.0f}",
        "–" if speed is None or peak is None else f"{speed / peak:.0%}",
        " / ".join(format_result(results, "GiB", ".1f") for results in programs),
        format_result(project, "cosine", ".4f"),
        format_result(project, "cosine_to_plain", ".4f"),
        str(EXPECTED.get(row["case"], "–")),
    ]
    return f"| {' | '.join(cells)} |"


def format_result(results: dict | None, name: str, format_spec: str) -> str:
    """A number of a program's results for the table, or why it's missing."""
    if results is None or results.get(name) is None:
        return "out of memory" if results and results.get("error") == "out of memory" else "–"
    return format(results[name], format_spec)


def write_table(file: Path, text: str) -> None:
    """Puts the table between the marks of a page. Errors: UserError if it has none."""
    page = file.read_text(encoding="utf-8")
    if any(page.count(mark) != 1 for mark in MARKS) or page.index(MARKS[0]) > page.index(MARKS[1]):
        raise UserError(f"--table {file}: has no {MARKS[0].strip()} … {MARKS[1].strip()} for it")
    file.write_text(replace_between(page, MARKS, text), encoding="utf-8")
