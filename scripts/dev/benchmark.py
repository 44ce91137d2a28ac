"""Times a training script against another one: start-up, seconds per step, peak memory.

    python scripts/dev/benchmark.py --against path/to/train_text_to_image_lora.py --width 64 \\
        --resolution 256 --our_flags="--cache_latents" -- --rank 8 --learning_rate 1e-4

Flags after `--` go to both scripts. The base is built from the real configuration of Stable Diffusion 1.5 at
a chosen width (320 is the real one) with random weights, which cost as much as trained ones; the pictures are
drawn. Each round runs both scripts, one after the other and in turn first, once with few steps and once with
more: the difference gives the seconds per step, what is left is start-up, saving and shut-down. Medians over
the rounds, and the ratio, are printed. Peak memory is that of the process (on a GPU: what nvidia-smi shows
for it as well).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

# the repository, from which everything is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.dev import ROOT
from scripts.dev.benchmarks.processes import measure_command

LABELS = {
    "start": "start-up, seconds",
    "step": "seconds per step",
    "cpu": "CPU seconds, all",
    "memory": "peak memory, MiB",
    "gpu": "peak GPU memory, MiB",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times a training script against another one.")
    add = parser.add_argument
    add("--script", default="train_lora_sd15.py", help="our script")
    add("--against", required=True, help="the other script")
    add("--width", type=int, default=64, help="of the UNet's first level; 320 is the real one (64)")
    add("--resolution", type=int, default=256, help="pixels (256)")
    add("--batch_size", type=int, default=1)
    add("--steps", type=int, nargs=2, default=(2, 12), metavar=("FEW", "MORE"))
    add("--rounds", type=int, default=3)
    add("--images", type=int, default=8)
    our_help = 'flags for our script alone, such as --our_flags="--cache_latents"'
    add("--our_flags", default="", help=our_help)
    add("--their_flags", default="", help="flags for the other script alone")
    add("--json", type=Path, help="also write the figures here")
    add("flags", nargs="*", help="after --: flags for both")
    return parser.parse_args(argv)


def script_commands(args: argparse.Namespace, base: Path, pictures: Path) -> dict[str, list[str]]:
    """The commands that are compared, without steps and output folder, by name."""
    shared = ["--pretrained_model_name_or_path", str(base), "--train_data_dir", str(pictures)]
    shared += ["--resolution", str(args.resolution), "--train_batch_size", str(args.batch_size)]
    shared += ["--seed", "0", *args.flags]
    our_flags = ["--skip_final_inference", "--report_to", "none", *shlex.split(args.our_flags)]
    return {
        "ours": [sys.executable, args.script, *shared, *our_flags],
        "theirs": [sys.executable, args.against, *shared, *shlex.split(args.their_flags)],
    }


def measure_script(command: list[str], steps: tuple[int, int], output: Path) -> dict[str, float]:
    """Runs a script with few and with more steps. Returns its figures by the keys of LABELS."""
    few, more = (
        measure_command(
            [*command, "--max_train_steps", str(count), "--output_dir", f"{output}-{count}"],
            output.with_name("log"),
        )
        for count in steps
    )
    step = (more.seconds - few.seconds) / (steps[1] - steps[0])
    return {
        "step": step,
        "start": few.seconds - steps[0] * step,
        "cpu": more.cpu_seconds,
        "memory": more.peak_mib,
        "gpu": more.peak_gpu_mib,
    }


def run_rounds(args: argparse.Namespace, base: Path) -> dict[str, list[dict[str, float]]]:
    """The figures of each round, by script; the scripts take turns in being first."""
    from scripts.dev.benchmarks.small_base import draw_pictures

    rounds: dict[str, list[dict]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as work:
        pictures = draw_pictures(Path(work) / "pictures", args.images, args.resolution)
        commands = script_commands(args, base, pictures)
        for number in range(args.rounds):
            for name in list(commands)[:: 1 if number % 2 == 0 else -1]:
                row = measure_script(commands[name], args.steps, Path(work) / f"{name}-{number}")
                rounds[name].append(row)
                figures = ", ".join(f"{key} {value:.3g}" for key, value in row.items())
                print(f"round {number + 1} {name}: {figures}", flush=True)
    return rounds


def print_medians(medians: dict[str, dict[str, float]]) -> None:
    """A table of both scripts' medians and their ratios."""
    print(f"\n{'':28}{'ours':>10}{'theirs':>10}   theirs/ours")
    for key, label in LABELS.items():
        if key == "gpu" and not medians["ours"]["gpu"]:
            continue
        our_median, their_median = medians["ours"][key], medians["theirs"][key]
        print(f"{label:28}{our_median:10.3f}{their_median:10.3f}   {their_median / our_median:.2f}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from scripts.dev.benchmarks.small_base import build_base

    base = build_base(ROOT / "build" / "benchmark" / f"sd15-{args.width}", args.width)
    rounds = run_rounds(args, base)
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in rounds.items()
    }
    print_medians(medians)
    if args.json:
        settings = vars(args) | {"json": None}
        figures = {"settings": settings, "rounds": rounds, "medians": medians}
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
