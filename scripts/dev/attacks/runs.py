"""Small runs of the training scripts: what cases start from, and what is killed."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import NamedTuple

from lora_training.families import FAMILIES
from scripts.dev import ROOT
from scripts.dev.attacks.forked_program import run_program
from scripts.dev.attacks.forked_runs import Case, Job, run_cases

DATA = ROOT / "assets" / "sample_data" / "smiley"
QUICK = (
    *("--resolution", "64", "--report_to", "none"),
    *("--num_validation_images", "0", "--validation_inference_steps", "1"),
)
DRAWN = (
    *("--num_validation_images", "1", "--validation_prompt", "a circle"),
    *("--validation_inference_steps", "1"),
)
TOKENS = ("--train_text_encoder_ti", "--token_abstraction", "circle")
PRIOR = (
    *("--with_prior_preservation", "--class_prompt", "a circle"),
    *("--num_class_images", "3", "--sample_batch_size", "1"),
)
AVERAGE = ("--train_batch_size", "2", "--use_ema", "--ema_decay", "0.5")


class KilledRun(NamedTuple):
    """A kind of run that is killed."""

    flags: tuple[str, ...]
    processes: int = 1


KILLED = {
    "average": KilledRun(("--cache_latents", "--random_flip", *AVERAGE)),
    "pictures": KilledRun(
        (*DRAWN, "--validation_steps", "4", "--aspect_ratio_buckets", "auto", "--lora_dropout", "0.1")
    ),
    "tokens": KilledRun((*TOKENS, "--gradient_accumulation_steps", "2")),
    "prior": KilledRun((*PRIOR, "--train_text_encoder", "--cache_latents")),
    "two processes": KilledRun(AVERAGE, processes=2),
}
KILLED_LENGTH = ("--max_train_steps", "12", "--checkpointing_steps", "3", "--checkpoints_total_limit", "2")


def base_of(family: str) -> Path:
    """The family's toy base."""
    return ROOT / "assets" / f"toy_{family}"


def training_script(family: str) -> str:
    """Its path within the repository."""
    return FAMILIES[family].training_script


def train_argv(family: str, output: Path | str, *flags: object) -> list[str]:
    """Arguments of a small run of a family's script; later flags win."""
    length = ("--max_sequence_length", "77") if family == "flux" else ()
    return [*map(str, ("-m", base_of(family), *QUICK, *length, "--seed", "3", "-o", output, *flags))]


def prepare_runs(stage: Path, with_kills: bool, at_once: int) -> None:
    """Runs, once, what cases start from: STAGE/FAMILY/NAME, and the seconds that it took in `done` inside.

    with_kills: also the unbroken runs with which killed ones are compared. Errors: SystemExit if one fails.
    """
    runs: dict[tuple[str, str], KilledRun] = {}
    for family in FAMILIES:
        flags = ("-d", DATA, "--max_train_steps", "4", "--checkpointing_steps", "2", *DRAWN)
        cache = ("--cache_latents", "--cache_folder", stage / family / "cache")
        runs[family, "trained"] = KilledRun((*flags, *cache))
        runs[family, "tokens"] = KilledRun((*flags, *TOKENS))
        for name, (killed_flags, processes) in KILLED.items() if with_kills else ():
            runs[family, f"unbroken {name}"] = KilledRun(
                ("-d", DATA, *killed_flags, *KILLED_LENGTH), processes
            )
    runs = {place: run for place, run in runs.items() if not (stage / "/".join(place) / "done").exists()}
    print(f"preparing {len(runs)} runs", flush=True)
    cases = [functools.partial(prepare_run, stage, *place, run) for place, run in runs.items()]
    run_cases(cases, at_once, lambda *_: None, run_program)


def prepare_run(stage: Path, family: str, name: str, run: KilledRun, folder: Path) -> Case:
    """One run, as a case."""
    output = stage / family / name
    shutil.rmtree(output, ignore_errors=True)
    argv = train_argv(family, output, *run.flags)
    result = yield Job(training_script(family), argv, processes=run.processes)
    if any(result.codes):
        raise SystemExit(f"{family}, {name}: {result.err}")
    (output / "done").write_text(str(result.seconds))
