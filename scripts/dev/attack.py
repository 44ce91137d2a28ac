"""Attacks the project with random configurations, damaged files and kills.

    python scripts/dev/attack.py                   1,000 + 1,000 + 4 x 75 cases; about an hour on two cores
    python scripts/dev/attack.py --kinds files --count 100 --seed 7
    python scripts/dev/attack.py --only files-123 --keep        one case alone; keeps what it left
    python scripts/dev/attack.py --table docs/reliability.md    puts the results into a document

Each case is drawn by the seed, its kind and its number alone:

    configurations   flags and --config files, good, borderline and hostile, of all flags of a family's script
    files            one to four damaged files among those that a command reads: the training scripts,
                     infer_lora.py, scripts/lora/*, scripts/reports/*, scripts/dataset/prepare_dataset.py
    kills            SIGKILL, SIGTERM and SIGINT at random moments, one or two to a run, then going on to the
                     end, also with two processes (gloo): the weights are compared with those of an unbroken
                     run, bit for bit

A case fails if a program ends with an undocumented code, a traceback or more than one line of error, calls it
a fault of its own, hangs, or leaves a weight that is not finite or a file that is not whole. --compile and
W&B are left out: minutes each.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import sys
from pathlib import Path

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_training.families import FAMILIES
from scripts.dev import ROOT
from scripts.dev.attacks.configurations import attack_configuration
from scripts.dev.attacks.damaged_files import attack_by_damage
from scripts.dev.attacks.forked_program import compile_program, run_program
from scripts.dev.attacks.forked_runs import Case, preload, run_cases
from scripts.dev.attacks.kills import attack_by_kills
from scripts.dev.attacks.results import read_results, results_table, write_table
from scripts.dev.attacks.runs import prepare_runs
from scripts.dev.result_files import append_result

KINDS = {"configurations": attack_configuration, "files": attack_by_damage, "kills": attack_by_kills}


def case_names(args: argparse.Namespace) -> list[str]:
    """The cases that the arguments ask for, KIND-NUMBER each."""
    counts = {kind: args.count if kind != "kills" else len(FAMILIES) * args.kills for kind in args.kinds}
    return args.only or [f"{kind}-{number}" for kind in args.kinds for number in range(counts[kind])]


def family_of(name: str) -> str:
    """Families take turns."""
    return list(FAMILIES)[int(name.rsplit("-", 1)[1]) % len(FAMILIES)]


def make_case(name: str, args: argparse.Namespace, stage: Path):
    """A function of a folder that gives the case."""
    kind, number = name.rsplit("-", 1)
    rng = random.Random(f"{args.seed} {kind} {number}")
    case = functools.partial(KINDS[kind], stage, family_of(name), rng)
    if not args.keep:
        return case

    def kept_case(folder: Path) -> Case:
        result = yield from case(folder)
        copy = args.results.parent / "kept" / name
        shutil.copytree(folder, copy, symlinks=True, dirs_exist_ok=True)
        return result

    return kept_case


def attack(args: argparse.Namespace) -> list[dict]:
    """Runs the cases that are asked for and not yet in --results; returns all results there."""
    preload()
    for family in FAMILIES.values():
        compile_program(family.training_script)  # here, once
    stage, names = args.results.parent.resolve() / "attack_stage", case_names(args)
    prepare_runs(stage, any(name.startswith("kills") for name in names), args.at_once)
    results = read_results(args.results, args.seed)
    pending = args.only or [name for name in names if name not in results]

    def on_result(index: int, result: dict) -> None:
        name = pending[index]
        row = results[name] = {"name": name, "seed": args.seed, "family": family_of(name), **result}
        append_result(args.results, row)
        if row["wrong"] or args.only:
            print(f"{name} ({row['family']}): {row['wrong']}; {row['message']}", flush=True)
        if args.only:
            print(json.dumps(row, indent=1, ensure_ascii=True))
        elif index % 100 == 99:
            print(f"{index + 1} of {len(pending)}", flush=True)

    args.results.parent.mkdir(parents=True, exist_ok=True)
    cases = [make_case(name, args, stage) for name in pending]
    run_cases(cases, args.at_once, on_result, run_program)
    return list(results.values())


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    description = "Attacks the project with random configurations, files and kills."
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    add("--count", type=int, default=1000, help="configurations, and damaged files (1000)")
    add("--kills", type=int, default=75, help="runs of each family that are killed once or twice (75)")
    add("--seed", type=int, default=0, help="another seed, other cases (0)")
    add("--only", nargs="+", metavar="CASE", help="these cases, such as files-123")
    add("--keep", action="store_true", help="keep each case's folder, beside the results")
    add("--at_once", type=int, default=2, help="processes at a time (2)")
    results_help = "results, added as they come (build/attack.jsonl)"
    add("--results", type=Path, default=ROOT / "build" / "attack.jsonl", metavar="FILE", help=results_help)
    add("--table", type=Path, metavar="FILE", help="write the table of all results into this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Attacks; returns the exit code: 1 if a case failed."""
    args = parse_args(argv)
    rows = attack(args)
    table = results_table(rows, list(KINDS))
    print(table)
    if args.table:
        write_table(args.table, table)
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
