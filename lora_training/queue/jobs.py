"""The trainings of a queue, read from its file: a list of runs, defaults that they share, and sweeps.

defaults: {pretrained_model_name_or_path: BASE, train_data_dir: my_pictures}
runs:
  - {name: small, rank: 4}
  - {name: on-a-12-gb-card, config: config/presets/sdxl_12gb.yaml}
sweep: {learning_rate: [1e-4, 3e-4]}            # each run once for each value
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import re
from pathlib import Path
from typing import NamedTuple

from lora_training.errors import UserError
from lora_training.families import FAMILIES
from lora_training.files import output_name, read_config_file
from lora_training.launch.arguments import to_argv
from lora_training.launch.decision import decide
from lora_training.report.formatting import format_setting

KEYS = ("defaults", "runs", "sweep")
RESUME = "--resume_from_checkpoint=latest"


class Job(NamedTuple):
    """A training of a queue. argv: of run_lora_train."""

    name: str
    output: Path
    argv: list[str]


def read_queue(files: list[str]) -> tuple[list[Job], Path]:
    """(the trainings that the files ask for, the folder that all of them write below).

    files: one file with `runs`, or configurations, each a training of its own. Errors: UserError.
    """
    values = read_config_file(files[0], "--queue", (dict, list)) if len(files) == 1 else None
    if isinstance(values, list):
        values = {"runs": values}
    if values is not None and ("runs" in values or "sweep" in values):
        folder = Path("output") / Path(files[0]).stem
        jobs = [make_job(entry, folder, f"--queue {files[0]}") for entry in queue_entries(values, files[0])]
    else:
        folder = Path("output")
        jobs = [make_job({"config": file}, folder, f"--queue {file}") for file in files]
    for name, group in itertools.groupby(sorted(str(job.output.resolve()) for job in jobs)):
        if len(list(group)) > 1:
            raise UserError(
                f"--queue: two runs write to {name}: give each a name or an output_dir of its own"
            )
    return jobs, folder


def queue_entries(values: dict, file: str) -> list[dict]:
    """Each run's settings, shared ones and those of the sweep among them. Errors: UserError."""
    for key in values.keys() - set(KEYS):
        raise UserError(f"--queue {file}: unknown key {key!r}; there are {', '.join(KEYS)}")
    defaults, sweep = values.get("defaults") or {}, values.get("sweep") or {}
    runs = values.get("runs") or [{}]
    if not isinstance(runs, list) or not isinstance(defaults, dict) or not isinstance(sweep, dict):
        raise UserError(f"--queue {file}: runs is a list, defaults and sweep are names and values")
    combinations = [
        dict(zip(sweep, choice, strict=True))
        for choice in itertools.product(*(v if isinstance(v, list) else [v] for v in sweep.values()))
    ]
    entries = []
    for number, run in enumerate(runs, 1):
        run = {"config": run} if isinstance(run, str) else run
        if not isinstance(run, dict):
            raise UserError(f"--queue {file}: run {number} is a file or names and values, not {run!r}")
        name = str(run.get("name") or (Path(str(run["config"])).stem if "config" in run else f"run-{number}"))
        for choice in combinations:
            parts = [f"{key}-{format_setting(value)}" for key, value in choice.items()]
            own_name = "_".join([*([name] if values.get("runs") else []), *parts])
            entries.append({**defaults, **run, **choice, "name": file_name(own_name)})
    return entries


def file_name(text: str) -> str:
    """A text as a folder's name on any system."""
    return re.sub(r"[^\w.+-]+", "-", text).strip(".-") or "run"


def make_job(entry: dict, folder: Path, where: str) -> Job:
    """A training of its settings; the output folder is named after it unless it has one.

    Errors: UserError that says where.
    """
    settings = {str(key): value for key, value in entry.items()}
    config, family = settings.pop("config", None), settings.pop("family", None)
    name = settings.pop("name", None) or file_name(Path(str(config)).stem)
    inherited = {}
    with contextlib.suppress(UserError):  # a broken file is told at its turn, and stops no other run
        inherited = read_config_file(str(config)) if config else {}
    output = Path(str(settings.pop("output_dir", None) or inherited.get("output_dir") or folder / name))
    argv = [str(family)] if family else []
    argv += [f"--config={config}"] if config else []
    for key, value in settings.items():
        if isinstance(value, dict):
            raise UserError(f"{where}: {name}: {key} is a value or a list, not names and values")
    argv += to_argv(settings, joined=True)
    if "resume_from_checkpoint" not in settings:
        argv.append(RESUME)
    return Job(
        output_name(output) if not entry.get("name") else name, output, [*argv, f"--output_dir={output}"]
    )


def problem_of(job: Job, settings: dict) -> str:
    """What would end a job before it begins, as its training script says it; empty if nothing does.

    settings: of .env.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            start = decide(job.argv, settings)
            script = importlib.import_module(Path(FAMILIES[start.family].training_script).stem)
            script.parse_args(start.argv)
    except UserError as error:
        return str(error)
    except SystemExit:
        return printed.getvalue().strip().partition("error: ")[2]
    return ""
