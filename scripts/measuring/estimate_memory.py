"""Estimates the GPU memory of a training run from the real models' shapes, without a GPU and without weights.

    python scripts/measuring/estimate_memory.py --family flux --resolution 512 --quantize_base nf4
    python scripts/measuring/estimate_memory.py --table     every preset of config/presets/, in Markdown
    python scripts/measuring/estimate_memory.py --counts    beside what was counted operation by operation

Other flags are those of the family's training script. What is counted, and what is not: see
lora_training/training/memory_estimate.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: library and recipes

from lora_training import training
from lora_training.exits import run_command
from lora_training.families import FAMILIES
from lora_training.libraries import import_training_libraries

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ROOT / "scripts" / "dev" / "step_counter" / "counts.json"


def counted_cases() -> dict[str, float]:
    """{case: GiB at most in a step} of the training scripts, as count_step.py has counted them."""
    counts = json.loads(COUNTS.read_text(encoding="utf-8"))["released"]
    peaks = {case: programs["project"]["peak"] for case, programs in counts.items() if "project" in programs}
    return {case: round(peak / 2**30, 2) for case, peak in peaks.items()}


def recipe_of(family: str):
    """The family's training script, whose flags and layers are estimated."""
    return importlib.import_module(Path(FAMILIES[family].training_script).stem)


def estimate(family: str, flags: list[str]) -> tuple[argparse.Namespace, training.MemoryEstimate]:
    """(the parsed flags, the estimate) of a run with these flags of the family's training script."""
    recipe = recipe_of(family)
    args = recipe.parse_args(["-m", "BASE", "-d", str(ROOT / "assets"), *flags])
    import_training_libraries()
    return args, training.estimate_memory(args, recipe.LORA_TARGETS, recipe.idle_layers)


def estimate_case(case: str) -> training.MemoryEstimate:
    """The estimate of a case of count_step.py, family:size:batch[:flag[=value],...].

    In bf16, with cached latents, rank 4.
    """
    family, size, batch, *rest = case.split(":", 3)
    flags = ["--mixed_precision", "bf16", "--cache_latents"]
    flags += ["--resolution", size, "--train_batch_size", batch, "--rank", "4"]
    for flag in rest[0].split(",") if rest else []:
        flags += f"--{flag}".split("=", 1)
    return estimate(family, flags)[1]


def presets(family: str) -> list[Path]:
    """The family's presets, the smallest card's first."""
    return sorted((ROOT / "config" / "presets").glob(f"{family}_*gb.yaml"), key=card_gib)


def card_gib(preset: Path) -> int:
    """sd15_8gb.yaml -> 8."""
    return int(preset.stem.split("_")[1][:-2])


def describe_preset(preset: Path, args: argparse.Namespace) -> str:
    """A preset's name, and the settings on which its memory depends: the first two cells of its row."""
    shape = " x ".join(map(str, (*args.resolution, args.train_batch_size)))
    checkpointing = "checkpointing" if args.gradient_checkpointing else ""
    settings = [args.quantize_base, checkpointing, f"rank {args.rank}", args.optimizer]
    return f"{preset.stem} | {shape} ({', '.join(filter(None, settings))})"


def preset_rows() -> list[str]:
    """A Markdown table with a row for each file of config/presets/."""
    rows = [
        "| preset | resolution x batch | base | LoRA | activations | step | pictures | GiB in all |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES:
        for preset in presets(family):
            args, gib = estimate(family, ["--config", str(preset)])
            step = f"{gib.base:.1f} | {gib.lora:.2f} | {gib.activations:.1f} | {gib.step:.1f}"
            rows.append(
                f"| {describe_preset(preset, args)} | {step} | {gib.pictures:.1f} | **{gib.total:.1f}** |"
            )
    return rows


def count_rows() -> list[str]:
    """A Markdown table with a row for each case that was counted."""
    rows = ["| case | counted GiB | by formula | |", "| --- | --- | --- | --- |"]
    for case, counted in counted_cases().items():
        estimated = estimate_case(case).step
        rows.append(f"| {case} | {counted:.2f} | {estimated:.2f} | {estimated / counted - 1:+.1%} |")
    return rows


def estimate_rows(gib: training.MemoryEstimate) -> list[str]:
    """What a single estimate consists of."""
    values = {
        "base": gib.base,
        "LoRA": gib.lora,
        "activations": gib.activations,
        "unpacked": gib.unpacked,
        "others": gib.others,
        "a step": gib.step,
        "while pictures are drawn": gib.pictures,
        "before, the VAE": gib.latents,
        "at most": gib.total,
    }
    rows = [f"{name:>24} {value:7.2f} GiB" for name, value in values.items()]
    return [*rows[:-1], f"{rows[-1]}, and 0.5 to 1.5 for the CUDA context and the allocator"]


@run_command
def main(argv: list[str] | None = None) -> int:
    description = "Estimates the GPU memory of a training step, without a GPU."
    parser = argparse.ArgumentParser(description=description)
    family_help = "other flags are those of the family's script"
    parser.add_argument("--family", choices=sorted(FAMILIES), help=family_help)
    parser.add_argument("--table", action="store_true", help="a table of all presets instead")
    parser.add_argument("--counts", action="store_true", help="a table of what was counted instead")
    args, flags = parser.parse_known_args(argv)
    if args.table or args.counts:
        rows = preset_rows() if args.table else count_rows()
    elif not args.family:
        parser.error("give --family, --table or --counts")
    else:
        rows = estimate_rows(estimate(args.family, ["--mixed_precision", "bf16", *flags])[1])
    print("\n".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
