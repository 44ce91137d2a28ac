"""Plants faults in a copy of the training scripts, one at a time, and sees whether the quick tests catch them.

    python scripts/measuring/plant_faults.py                          # all of them; hours on one core
    python scripts/measuring/plant_faults.py --only "l1 loss" "T5 first"
    python scripts/measuring/plant_faults.py --check                  # do the faults' texts still stand in the scripts?

The faults are data, in parts/planted_faults.py. For each, the tests named there run until the first fails; a fault that none
sees is a hole in the tests, and the exit status is 1. Results are added to --results as they come, so that an interrupted
run goes on; --table puts them into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.measuring.parts.planted_faults import FAULTS, Fault
from scripts.parts.training_scripts import ROOT, SCRIPTS

SEAM = "# ==== From here on, the four training scripts are the same, line for line ===="
MARKS = ("<!-- planted faults: begin -->", "<!-- planted faults: end -->")


class FaultError(Exception):
    """What is wrong with a fault, or with this run, in one line."""


def planted(fault: Fault, root: Path) -> dict[Path, str]:
    """{script: its text with the fault}. Errors: FaultError if the old text doesn't stand there exactly once."""
    out = {}
    for family in SCRIPTS if fault.where == "shared" else [fault.where]:
        file = root / SCRIPTS[family]
        own, seam, shared = file.read_text(encoding="utf-8").partition(SEAM)
        text = shared if fault.where == "shared" else own
        if text.count(fault.old) != 1:
            raise FaultError(
                f"{fault.name}: {fault.old!r} stands {text.count(fault.old)} times in {file.name}, not once"
            )
        text = text.replace(fault.old, fault.new)
        whole = own + seam + text if fault.where == "shared" else text + seam + shared
        out[file] = whole
    return out


def copy_repository(target: Path) -> None:
    """Copies what git knows of, as it stands in the working tree."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def run_tests(tests: str, folder: Path) -> tuple[bool, str]:
    """(whether they pass, the first that fails) of a file of tests/ with its options. Errors: FaultError."""
    file, *options = shlex.split(tests)
    words = [f"tests/{file}", *options, "-q", "-x", "--tb=no", "-rfE", "-n", "0", "-o", "addopts="]
    words += ["-p", "no:warnings", "-p", "no:cacheprovider"]
    plain = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *words]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=plain, timeout=1800)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode not in (0, 1) or (result.returncode == 1 and failed is None):
        raise FaultError(f"{tests}: pytest ended with {result.returncode}: {' '.join(result.stdout.split())[-300:]}")
    return result.returncode == 0, failed.group(1).removeprefix("tests/") if failed else ""


def attempt(fault: Fault, folder: Path) -> dict[str, object]:
    """Plants one fault in a copy, runs its tests, and takes it out again."""
    began, caught = time.perf_counter(), ""
    changed = planted(fault, folder)
    originals = {file: file.read_text(encoding="utf-8") for file in changed}
    try:
        for file, text in changed.items():
            compile(text, f"{file.name} with {fault.name!r}", "exec")
            file.write_text(text, encoding="utf-8")
        for tests in fault.tests:
            passed, caught = run_tests(tests, folder)
            if not passed:
                break
    finally:
        for file, text in originals.items():
            file.write_text(text, encoding="utf-8")
    return {"fault": fault.name, "caught": caught, "seconds": round(time.perf_counter() - began)}


def table(found: dict[str, dict]) -> str:
    """The results as a table of Markdown, in the order of the list."""
    rows = ["| where | part | fault | the test that saw it |", "| --- | --- | --- | --- |"]
    known = [fault for fault in FAULTS if fault.name in found]
    for fault in known:
        seen = found[fault.name]["caught"]
        test = "`" + seen.split("::")[1].split("[")[0] + "`" if "::" in seen else "**none**"
        rows.append(f"| {fault.where} | {fault.breaks} | {fault.name} | {test} |")
    caught = sum(bool(found[fault.name]["caught"]) for fault in known)
    return f"{caught} of {len(known)} planted faults are caught.\n\n" + "\n".join(rows)


def write_table(file: Path, text: str) -> None:
    """Puts the table between its marks in a file of Markdown; without them, at its end."""
    whole = file.read_text(encoding="utf-8") if file.is_file() else "# Reliability\n"
    section = f"{MARKS[0]}\n{text}\n{MARKS[1]}"
    if MARKS[0] in whole:
        begin, end = whole.index(MARKS[0]), whole.index(MARKS[1]) + len(MARKS[1])
        whole = whole[:begin] + section + whole[end:]
    else:
        whole = f"{whole.rstrip()}\n\n## Planted faults\n\n{section}\n"
    file.write_text(whole, encoding="utf-8")


def read_results(file: Path) -> dict[str, dict]:
    """{fault: its last result} of a file of results."""
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {row["fault"]: row for row in rows}


def plant(args: argparse.Namespace) -> bool:
    """Plants what is chosen and not done yet; returns whether every fault was caught."""
    unknown = set(args.only or ()) - {fault.name for fault in FAULTS}
    if unknown:
        raise FaultError(f"--only: no fault is called {', '.join(sorted(unknown))}")
    chosen = [fault for fault in FAULTS if not args.only or fault.name in args.only]
    for fault in chosen:
        planted(fault, ROOT)
    if args.check:
        print(f"{len(chosen)} faults: their texts stand in the scripts, each once")
        return True
    found = {} if args.only else read_results(args.results)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        copy_repository(Path(work))
        todo = [fault for fault in chosen if fault.name not in found]
        for tests in sorted({tests for fault in todo for tests in fault.tests}) if args.baseline else ():
            passed, failed = run_tests(tests, Path(work))
            if not passed:
                raise FaultError(f"without any fault {failed} fails already")
            print(f"passes without a fault: {tests}", flush=True)
        for fault in todo:
            found[fault.name] = attempt(fault, Path(work))
            with args.results.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found[fault.name]) + "\n")
            print(f"{fault.where:7} {fault.name}: {found[fault.name]['caught'] or 'NOT CAUGHT'}", flush=True)
    if args.table:
        write_table(args.table, table(read_results(args.results)))
    return all(found[fault.name]["caught"] for fault in chosen)


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    parser = argparse.ArgumentParser(description="Plants faults and sees whether the quick tests catch them.")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults, whether they are done or not")
    parser.add_argument("--check", action="store_true", help="only see that the faults' texts stand in the scripts")
    parser.add_argument(
        "--no_baseline", dest="baseline", action="store_false", help="don't run the tests without a fault"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "planted_faults.jsonl", metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of all results into this file")
    args = parser.parse_args(argv)
    try:
        return 0 if plant(args) else 1
    except (FaultError, SyntaxError) as error:
        print(f"plant_faults.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
