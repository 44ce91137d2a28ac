"""Plants faults in a copy of the project, one at a time, and sees whether the tests catch them.

    python scripts/dev/plant_faults.py                          all of them; about an hour on one core
    python scripts/dev/plant_faults.py --only "l1 loss" "T5 first"
    python scripts/dev/plant_faults.py --check                  do the faults' texts and tests still stand?

The faults are data, in planted_faults/. For each, the tests named there run until the first fails; a fault
that none sees is a hole in the tests, and the exit code is 1. Results are added to --results as they come, so
that an interrupted call goes on; --table puts them into docs/reliability.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_training.errors import UserError
from lora_training.exits import run_command
from scripts.dev import ROOT
from scripts.dev.planted_faults import planting
from scripts.dev.planted_faults.fault import Fault
from scripts.dev.planted_faults.library_faults import LIBRARY_FAULTS
from scripts.dev.planted_faults.recipe_faults import RECIPE_FAULTS
from scripts.dev.planted_faults.results import read_results, results_table, write_table
from scripts.dev.result_files import append_result

FAULTS = (*RECIPE_FAULTS, *LIBRARY_FAULTS)


def choose_faults(names: list[str] | None) -> list[Fault]:
    """The faults with these names, or all. Errors: UserError for an unknown name."""
    if unknown := set(names or ()) - {fault.name for fault in FAULTS}:
        raise UserError(f"--only: no fault is called {', '.join(sorted(unknown))}")
    return [fault for fault in FAULTS if not names or fault.name in names]


def check_tests_pass(faults: list[Fault], folder: Path) -> None:
    """Errors: UserError if a test fails without any fault."""
    for test in sorted({test for fault in faults for test in fault.tests}):
        passed, failed = planting.run_test(test, folder)
        if not passed:
            raise UserError(f"without any fault {failed} fails already")
        print(f"passes without a fault: {test}", flush=True)


def plant(faults: list[Fault], args: argparse.Namespace) -> bool:
    """Plants those that have no result yet; returns whether every fault was caught."""
    results = {} if args.only else read_results(args.results)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    pending = [fault for fault in faults if fault.name not in results]
    with tempfile.TemporaryDirectory() as work:
        planting.copy_repository(Path(work))
        if args.baseline:
            check_tests_pass(pending, Path(work))
        for fault in pending:
            row = results[fault.name] = planting.try_fault(fault, Path(work))
            append_result(args.results, row)
            print(f"{fault.files}: {fault.name}: {row['caught'] or 'NOT CAUGHT'}", flush=True)
    return all(results[fault.name]["caught"] for fault in faults)


@run_command
def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns the exit code."""
    description = "Plants faults and sees whether the tests catch them."
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--only", nargs="+", metavar="NAME", help="these faults, whether they are done or not")
    check_help = "only see that the faults' texts and tests are there"
    add("--check", action="store_true", help=check_help)
    baseline_help = "don't run the tests without a fault"
    add("--no_baseline", dest="baseline", action="store_false", help=baseline_help)
    results_file = ROOT / "build" / "planted_faults.jsonl"
    add("--results", type=Path, default=results_file, metavar="FILE", help="results, added as they come")
    add("--table", type=Path, metavar="FILE", help="write the table of all results into this file")
    args = parser.parse_args(argv)
    faults = choose_faults(args.only)
    for fault in faults:
        planting.check_fault(fault, ROOT)
    if args.check:
        print(f"{len(faults)} faults: their texts stand once, and their tests are there")
        return 0
    all_caught = plant(faults, args)
    if args.table:
        write_table(args.table, results_table(read_results(args.results), FAULTS))
    return 0 if all_caught else 1


if __name__ == "__main__":
    sys.exit(main())
