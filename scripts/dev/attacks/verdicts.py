"""What counts as a failure: how a job has ended, what it has left, how two runs differ."""

from __future__ import annotations

import json
import re
from pathlib import Path

from scripts.dev.attacks.forked_runs import JobResult

PROGRESS_LINE = re.compile(r"\d+%\||^\s*[\w ()./-]+:? \d\d:\d\d|^\s*$")  # progress bars, and empty lines
TRACEBACK = "Traceback (most recent call last)"
# what a one-line error has to name one of: a flag, a file, a value in quotes, or what was wrong with a result
NAMED = re.compile(r"--\w|/|\.\w\w|'|learned|finite|NaN")


def error_lines(err: str) -> list[str]:
    """The lines on stderr that are no progress."""
    return [line for line in re.split(r"[\r\n]", err) if not PROGRESS_LINE.search(line)]


def last_line(result: JobResult) -> str:
    """The last line that a job's processes have written to stderr."""
    lines = [line for err in result.err for line in error_lines(err)]
    return lines[-1][:300] if lines else ""


def find_failure(result: JobResult, allowed_codes: tuple[int, ...] = (0, 2)) -> str | None:
    """What was wrong with how a job ended, in a few words; None for nothing."""
    if result.timed_out:
        return "it hangs"
    for code, out, err in zip(result.codes, result.out, result.err, strict=True):
        if failure := find_process_failure(code, out, err, allowed_codes):
            return failure
    return None


def find_process_failure(code: int, out: str, err: str, allowed_codes: tuple[int, ...]) -> str | None:
    """The same for one process."""
    lines = error_lines(err)
    if TRACEBACK in out + err:
        return f"traceback: {' / '.join(lines[-9:])}"
    if own_fault := re.search("a fault of th[^;]*", err):
        return own_fault[0]
    # 1: a full or unusable disk, too little memory
    if code not in allowed_codes and not (code == 1 and re.search("out of memory|Is a directory", err)):
        return f"exit code {code}: {lines[-1] if lines else ''}"
    if code == 2 and not any(": error:" in line for line in lines):
        return f"exit code {code} without a line that says why"
    if code in (1, 2) and len(lines) > 1:
        return f"{len(lines)} lines: {lines[0]}"
    if code == 2 and not NAMED.search(lines[0].split("error:", 1)[1]):
        return f"it names nothing: {lines[0]}"
    return None


def find_damaged_result(folder: Path, files: list[Path] | None = None) -> str | None:
    """Which of a folder's published files, or of these, is not whole or has a weight that is not finite."""
    for file in files or sorted(folder.rglob("*")):
        is_cached, is_temporary = "cache" in file.parts, file.name.startswith(".") or ".part" in str(file)
        if is_cached or is_temporary or not file.is_file():
            continue
        try:
            if problem := check_file(file):
                return problem
        except Exception as error:
            return f"not whole: {file.name}: {error}"
    return None


def check_file(file: Path) -> str | None:
    """Which tensor of a file is not finite. Errors: whatever a reader raises for a file that is not whole."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    if file.suffix == ".safetensors":
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                return f"not finite: {name} of {file.name}"
    elif file.suffix == ".png":
        Image.open(file).load()
    elif file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    return None


def find_difference(first: Path, second: Path) -> str | None:
    """How the weights and losses of two runs differ, bit by bit; None if they don't."""
    import torch
    from safetensors.torch import load_file

    for file in [first / "pytorch_lora_weights.safetensors", *first.glob("*_emb.safetensors")]:
        other = second / file.name
        if not other.exists():
            return f"{other.name} is missing"
        a, b = load_file(file), load_file(other)
        if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in a):
            return f"{other.name} differs"
    return None if losses_of(first) == losses_of(second) else "the losses differ"


def losses_of(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of a run's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines) if "loss" in row]
