"""Times the training scripts' steps on a GPU, beside a plain loop and diffusers' examples.

    python scripts/dev/measure_gpu.py --json gpu.json        every case, as many as fit into --minutes
    python scripts/dev/measure_gpu.py --json gpu.json        the same again: goes on where it stopped
    python scripts/dev/measure_gpu.py --cases sdxl flux:512 --examples diffusers/examples
    python scripts/dev/measure_gpu.py --cases flux:512:1:quantize_base=nf4 --profile traces
    python scripts/dev/measure_gpu.py --json gpu.json --table docs/gpu.md
                                                             measures nothing, writes the table
    python scripts/dev/measure_gpu.py --tiny                 all of it on toy sizes, also on a CPU

A case is family:size:batch[:flag[=value],...] with the training script's flags, or channels_last,
cudnn_attention and kept_attention, which are tried here alone; a beginning of listed cases stands for all
of them. Sizes are the released models', weights are random: what a step costs depends on sizes alone, and
nothing is downloaded. In each case the programs take turns (ours, plain, example, example, plain, ours),
each from its first line until so many steps are timed, with one wait for the GPU before and one after
them. What is compared with what, and what the columns mean: docs/gpu.md.

Needs diffusers and peft beside torch, transformers and accelerate; prodigyopt and bitsandbytes only for the
cases with them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lora_training.errors import UserError
from lora_training.exits import run_command
from scripts.dev.benchmarks.cases import CASES, TINY_CASES, choose_cases
from scripts.dev.benchmarks.gpu_table import results_table, write_table


def read_state(file: Path | None) -> dict:
    """What --json holds from calls before. Errors: UserError if it's something else."""
    if file is None or not file.exists():
        return {"rows": []}
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(state["rows"], list):
            return state
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"--json {file}: not a file that this program has written")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    description = (
        "Times the training scripts' steps on a GPU, at the released models' sizes with random weights."
    )
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    cases_help = "family:size:batch[:flag,...], or beginnings of listed cases (all)"
    add("--cases", nargs="+", metavar="CASE", help=cases_help)
    add("--list", action="store_true", help="print the listed cases and end")
    examples_help = "diffusers' examples folder, to time its scripts too"
    add("--examples", type=Path, metavar="DIR", help=examples_help)
    add("--no_plain", action="store_true", help="leave out the plain loop")
    json_help = "keep every figure here; cases that it has already aren't measured again"
    add("--json", type=Path, metavar="FILE", help=json_help)
    table_help = "measure nothing: print --json's table, or put it into PAGE"
    add("--table", nargs="?", const="-", metavar="PAGE", help=table_help)
    add("--minutes", type=float, default=9.0, help="start no case that wouldn't be done by then (9)")
    add("--steps", type=int, help="timed in each run (10; --tiny: 2)")
    add("--warm_up", type=int, help="steps before them (5; --tiny: 3)")
    add("--repeats", type=int, help="runs of each program, taking turns (2; --tiny: 1)")
    profile_help = "write torch's trace of three more steps of each program here"
    add("--profile", type=Path, metavar="DIR", help=profile_help)
    phases_help = "also time data, forward, backward, clipping and optimizer apart"
    add("--phases", action="store_true", help=phases_help)
    tiny_help = "the toy bases' sizes and few steps, to try all of it on a CPU"
    add("--tiny", action="store_true", help=tiny_help)
    args = parser.parse_args(argv)
    usual, tiny = {"steps": 10, "warm_up": 5, "repeats": 2}, {"steps": 2, "warm_up": 3, "repeats": 1}
    for name, value in (tiny if args.tiny else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Errors: UserError for arguments that can't work."""
    if args.examples and not (args.examples / "dreambooth").is_dir():
        problem = "has no folder dreambooth: give the examples folder of diffusers"
        raise UserError(f"--examples {args.examples}: {problem}")
    if min(args.steps, args.repeats) < 1 or args.warm_up < 3:
        raise UserError("--steps and --repeats must be 1 or more, --warm_up 3 or more")
    choose_cases(args.cases, args.tiny)


@run_command
def main(argv: list[str] | None = None) -> int:
    """Runs the program. Returns the exit code: 1 if a case of the project's script failed."""
    args = parse_args(argv)
    if args.list:
        print("\n".join(TINY_CASES if args.tiny else CASES))
        return 0
    check_args(args)
    state = read_state(args.json)
    if args.table:
        if not state["rows"]:
            raise UserError("--table needs --json FILE with what was measured")
        if args.table == "-":
            print(results_table(state), end="")
        else:
            write_table(Path(args.table), results_table(state))
        return 0
    import torch

    from lora_training.libraries import import_training_libraries
    from scripts.dev.benchmarks.measuring import measure_all

    import_training_libraries()
    if not torch.cuda.is_available() and not args.tiny:
        raise UserError("no GPU here; --tiny tries it on toy sizes")
    failed = measure_all(args, state)
    if state["rows"]:
        print("\n" + results_table(state), end="")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
