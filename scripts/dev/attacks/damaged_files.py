"""Cases: a command, and one to four of the files that it reads are damaged."""

from __future__ import annotations

import random
from pathlib import Path

from scripts.dev.attacks.damaged_data import damaged_data
from scripts.dev.attacks.damaged_models import damaged_base, damaged_lora, damaged_run
from scripts.dev.attacks.damaged_settings import damaged_settings
from scripts.dev.attacks.forked_runs import Case, Job
from scripts.dev.attacks.verdicts import find_damaged_result, find_failure, last_line

KINDS = (damaged_data, damaged_data, damaged_settings, damaged_lora, damaged_lora, damaged_run, damaged_base)


def attack_by_damage(stage: Path, family: str, rng: random.Random, folder: Path) -> Case:
    """Damages files and runs the command that reads them."""
    damage_files = rng.choice(KINDS)
    damages, job = yield from damage_files(stage, family, rng, folder)
    result = yield job
    files = published_files(job, folder)
    # of these two, 1 says that something is wrong with what they look at
    judges = "inspect" in job.program or "--doctor" in job.argv
    wrong = find_failure(result, (0, 1, 2) if judges else (0, 2))
    if not wrong and result.codes == [0] and files:
        wrong = find_damaged_result(folder, files)
    return {
        "command": [job.program, *job.argv],
        "code": result.codes[0],
        "message": last_line(result),
        "seconds": result.seconds,
        "damages": [damage_files.__name__, *damages],
        "wrong": wrong,
    }


def published_files(job: Job, folder: Path) -> list[Path]:
    """The weights that a job has written.

    A merged base's folder is left out: it has copies of what no LoRA touches.
    """
    files = [*(folder / "x").glob("*.safetensors")]
    if job.argv[-1] == "5":  # a run that went on to step 5
        files += (folder / "trained").glob("*.safetensors")
    return files
