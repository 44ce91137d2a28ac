"""Counts what one training step would do on a GPU, on a machine that has none.

    python scripts/dev/count_step.py sdxl:1024:1:gradient_checkpointing flux:512:1:rank=16
    python scripts/dev/count_step.py --check            does any case of counts.json need more than before?
    python scripts/dev/count_step.py --tiny --check     the same on the toys' sizes, as a test does
    python scripts/dev/count_step.py --write            count the cases of counts.json anew

A case is family:size:batch[:flag[=value],...] with the training script's flags. What is counted and how far
to trust it: scripts/dev/step_counter/README.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_training.errors import UserError
from lora_training.exits import run_command
from lora_training.families import FAMILIES
from scripts.dev.benchmarks.cases import parse_case
from scripts.dev.result_files import replace_between
from scripts.dev.step_counter import records

TABLE_MARKS = ("<!-- counted -->", "<!-- end of counted -->")
PROGRAMS = ("project", "diffusers", "kohya", "ai-toolkit", "simpletuner")
PRELOADED = "FAKE_CUDA"  # a variable of processes that have the fake device


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    description = "Counts what one training step would do on a GPU, without a GPU."
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add(
        "cases", nargs="*", metavar="CASE", help="family:size:batch[:flag[=value],...] (those of counts.json)"
    )
    add("--program", choices=PROGRAMS, default="project", help="whose script is counted (project)")
    add("--folder", type=Path, metavar="DIR", help="where another program is: diffusers' examples")
    add("--tiny", action="store_true", help="the toys' sizes: seconds")
    add("--check", action="store_true", help="say what needs more than in counts.json; exit status 1")
    add("--write", action="store_true", help="keep the counts in counts.json")
    add("--table", type=Path, metavar="PAGE", help="count nothing: put counts.json's table into PAGE")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Errors: UserError for arguments that can't work."""
    for case in args.cases:
        family, size, batch, *_ = f"{case}:::".split(":")
        if family not in FAMILIES or not (size.isdigit() and batch.isdigit()):
            expected = f"FAMILY:SIZE:BATCH[:FLAG,...] with one of {', '.join(FAMILIES)}"
            raise UserError(f"case {case}: not {expected}")
    if args.program != "project" and not (args.folder and args.folder.is_dir()):
        raise UserError(f"--program {args.program} needs --folder, where it is")
    if not args.cases and not (args.check or args.write):
        raise UserError("give cases, or --check or --write for those of counts.json")


def restart_with_device() -> int:
    """Runs this command anew with the fake device, which has to be there before torch is.

    Returns the exit code.
    """
    from scripts.dev.step_counter.fake_device import shared_library

    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    environment |= {"HF_HUB_OFFLINE": "1", "LD_PRELOAD": str(shared_library()), PRELOADED: "1"}
    return subprocess.run([sys.executable, *sys.orig_argv[1:]], env=environment).returncode


def import_libraries(args: argparse.Namespace) -> None:
    """What all programs need, imported once; before torch.cuda is changed, where it looks for CUDA itself."""
    from lora_training.libraries import import_training_libraries

    os.environ.pop("LD_PRELOAD")  # not for processes that the programs start
    if args.program in ("project", "diffusers"):
        import bitsandbytes  # noqa: F401

        import_training_libraries()


def count(text: str, args: argparse.Namespace) -> dict:
    """The counts of a case, or {"error": …, "log": …}."""
    from scripts.dev.step_counter import counting, empty_bases, programs

    case = parse_case(text)

    def make_program(work: Path) -> programs.Program:
        empty_bases.write_inputs(case, work, args.tiny)
        if args.program == "diffusers":
            return programs.example_program(case, work, args.folder.resolve())
        if args.program != "project":
            from scripts.dev.step_counter import peers

            return peers.peer_program(args.program, case, work, args.folder.resolve())
        return programs.project_program(case, work)

    with tempfile.TemporaryDirectory() as work:
        return counting.count_step(make_program, Path(work))


def count_all(args: argparse.Namespace) -> bool:
    """Counts the cases, prints each, and keeps or compares it. Returns whether one failed, or needs more."""
    known = records.read_counts(args.tiny)
    cases = args.cases or [case for case, programs in known.items() if args.program in programs]
    failed = False
    for case in cases:
        print(case, flush=True)
        counts = count(case, args)
        if "error" in counts:
            print(f"  {counts['error']}\n{counts['log']}", flush=True)
            failed = True
            continue
        record = records.make_record(counts, with_places=args.tiny)
        print(records.describe_record(record), flush=True)
        before = known.get(case, {}).get(args.program)
        if args.check:
            growth = records.list_growth(before, record) if before else ["not in counts.json"]
            print("".join(f"  MORE {line}\n" for line in growth), end="", flush=True)
            failed = failed or bool(growth)
        if args.write:
            known.setdefault(case, {})[args.program] = record
            records.write_counts(args.tiny, known)
    return failed


@run_command
def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 1 if a case failed, or needs more than before."""
    args = parse_args(argv)
    if args.table:
        page, table = (
            args.table.read_text(encoding="utf-8"),
            records.comparison_table(records.read_counts(False)),
        )
        args.table.write_text(replace_between(page, TABLE_MARKS, table), encoding="utf-8")
        return 0
    check_args(args)
    if PRELOADED not in os.environ:
        return restart_with_device()
    import_libraries(args)
    return int(count_all(args))


if __name__ == "__main__":
    sys.exit(main())
