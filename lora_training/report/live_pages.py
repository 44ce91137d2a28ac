"""The pages of scripts/watch.py: a run that is followed, and several runs side by side."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import quote

from lora_training.errors import UserError
from lora_training.html_page import template_environment
from lora_training.report.curves import run_plots
from lora_training.report.overview import read_verdict
from lora_training.report.pictures import LinkedPictures, Tile
from lora_training.report.run_details import file_rows
from lora_training.report.run_folder import RUN_FILES, RunFolder, read_run_folder
from lora_training.report.run_page import page_values
from lora_training.report.run_state import RunState, has_owner, read_state
from lora_training.report.samples import step_title

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.report.plots import Plot

MOST_RUNS = 60
SIGNS_OF_A_RUN = (*RUN_FILES, "log.txt")
SHOWN_PLOTS = 2  # of each run beside others: the loss, and what was learned and forgotten
PICTURES_IN_A_ROW = 4


def find_runs(folder: Path) -> dict[str, Path]:
    """{name: folder} of the runs to watch: the folder itself, else those in it and one level below.

    The newest first. Errors: UserError if there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if is_run(folder):
        return {folder.resolve().name: folder}
    found = [path for pattern in ("*", "*/*") for path in folder.glob(pattern) if is_run(path)]
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.relative_to(folder).as_posix(): path for path in found[:MOST_RUNS]}


def is_run(folder: Path) -> bool:
    """Whether a folder holds something that a run leaves, and is no part of another run."""
    is_part = folder.name in ("samples", "logs", "training_pictures") or folder.name.startswith("checkpoint-")
    return folder.is_dir() and not is_part and any((folder / name).is_file() for name in SIGNS_OF_A_RUN)


def fingerprint(folders: list[Path]) -> str:
    """What changes when anything that a page shows does: names, sizes and times of the runs' files."""
    digest = hashlib.sha256()
    for folder in folders:
        state = [str(has_owner(folder))]  # a killed process changes it and no file
        for pattern in ("*", "samples/*", "samples/*/*", "checkpoint-*/manifest.json"):
            for file in sorted(folder.glob(pattern)):
                try:
                    status = file.stat()
                except OSError:  # gone meanwhile
                    continue
                state.append(f"{file} {status.st_size} {status.st_mtime_ns}")
        digest.update(" ".join(state).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def live_run_page(folder: Path, is_one_of_several: bool) -> str:
    """The page of a run. Errors: UserError if the folder holds nothing of one."""
    run = read_run_folder(folder)
    values = page_values(run, LinkedPictures(run.path))
    values["notes"] = values["notes"][2:]  # how far it is stands in its state
    template = template_environment().get_template("live_run.html")
    return template.render(files=file_rows(run), state=read_state(run), several=is_one_of_several, **values)


class RunCard(NamedTuple):
    """A run beside others. pictures: (step, tiles) of the first and the newest ones."""

    key: str
    name: str
    address: str
    state: RunState
    warnings: list[str]
    pictures: list[tuple[str, list[Tile]]]
    plots: list[Plot]


def live_overview(name: str, runs: dict[str, Path]) -> str:
    """The page of several runs, in the order in which they come."""
    cards = []
    for key, folder in runs.items():
        try:
            cards.append(run_card(key, read_run_folder(folder)))
        except UserError:  # it has just begun, or was removed
            continue
    return template_environment().get_template("live_runs.html").render(name=name, runs=cards)


def run_card(key: str, run: RunFolder) -> RunCard:
    """What stands of a run beside others."""
    address, state = f"run/{quote(key)}/", read_state(run)
    pictures = LinkedPictures(run.path)
    subjects = [sample for sample in run.samples if not sample.is_control]
    steps = sorted({sample.step for sample in subjects})
    rows = []
    for step in dict.fromkeys([*steps[:1], *steps[-1:]]):
        row = []
        for sample in [sample for sample in subjects if sample.step == step][:PICTURES_IN_A_ROW]:
            encoded = pictures.encode(sample.file, 256)
            if encoded:
                encoded = encoded._replace(address=address + encoded.address)
            row.append(Tile(encoded, f"{sample.prompt}: {step_title(step, run)}"))
        rows.append((step_title(step, run), row))
    warnings = [str(warning) for warning in read_verdict(run).warnings]
    plots = [plot for plot in run_plots(run)[:SHOWN_PLOTS] if plot.has_drawing]
    return RunCard(quote(key, safe=""), key, address, state, warnings, rows, plots)
