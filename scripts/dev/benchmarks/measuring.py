"""Measures cases one after another while there is time, and stores their rows as they come."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

from scripts.dev.benchmarks.bench import Bench
from scripts.dev.benchmarks.cases import choose_cases, missing_package, parse_case
from scripts.dev.benchmarks.gpu_table import row_line
from scripts.dev.benchmarks.machine import describe_machine, gpu_answers

SECONDS = {"sd15": 10, "sdxl": 20, "sd3": 20, "flux": 35}  # of a run of one program, until one has been timed


def measure_all(args: argparse.Namespace, state: dict) -> bool:
    """Measures the cases that have no row yet, while there is time; writes each row as it comes.

    Returns whether a case of the project's script failed.
    """
    bench, began = Bench(args), time.perf_counter()
    state.setdefault("machine", describe_machine())
    state.setdefault("settings", {"steps": args.steps, "warm_up": args.warm_up, "repeats": args.repeats})
    cases = choose_cases(args.cases, args.tiny)
    speed, failed = 1.0, False
    for number, case in enumerate(cases):
        if any(row["case"] == case for row in state["rows"]):
            continue
        if package := missing_package(case):
            print(f"{case}: left out: {package} is not installed", flush=True)
            continue
        guess = guess_seconds(case, args.repeats * len(bench.programs_of(case))) * speed
        if time.perf_counter() - began + guess > args.minutes * 60:
            reason = f"which would take about {guess:.0f} s more than --minutes has"
            print(f"stopped before {case}, {reason}; left: {' '.join(cases[number:])}")
            break
        row = bench.measure(case)
        case_failed = "error" in row["ours"]
        if not case_failed:
            speed = max(0.1, row["seconds"] / guess * speed)
        failed = failed or case_failed
        state["rows"].append(row)
        print(row_line(row), flush=True)
        if args.json:
            args.json.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        if case_failed and not gpu_answers():
            if not args.json:  # what there is would be lost, and the case be tried for ever
                print("after this error the GPU answers no more", flush=True)
                return True
            restart(args.minutes - (time.perf_counter() - began) / 60)
    return failed


def guess_seconds(case: str, runs: int) -> float:
    """How long so many runs of a case will take on a fast card."""
    family, _, _, flags = parse_case(case)
    return SECONDS[family] * runs * (3 if "compile" in flags else 1)


def restart(minutes: float) -> None:
    """Goes on as a new process with so many minutes left."""
    print("after this error the GPU answers no more: starting anew", flush=True)
    os.execv(sys.executable, [sys.executable, *sys.argv, "--minutes", str(minutes)])
