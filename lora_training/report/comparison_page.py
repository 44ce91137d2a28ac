"""One page of several runs: settings that differ, curves over each other, pictures side by side.

It reads nothing but the output folders; what a run lacks is left out.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from lora_training.errors import UserError
from lora_training.html_page import write_page
from lora_training.report.curves import ABOUT
from lora_training.report.formatting import format_setting, format_whole_percent, is_same_setting, link
from lora_training.report.pictures import PagePictures, Tile
from lora_training.report.plots import Curve, Plot, format_percent, format_value, smoothed
from lora_training.report.run_folder import read_run_folder
from lora_training.report.samples import seed_title, step_title

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lora_training.report.run_folder import RunFolder, Sample

MOST_ROWS = 60  # prompts and seeds whose pictures are shown
TONES = 8  # colours of runs; the curves of further ones are dashed

# settings that differ whatever is compared
SETTINGS_OF_EACH_RUN = {"output_dir", "config", "run_name", "logging_dir", "class_data_dir"}


class ComparedNumber(NamedTuple):
    """A number of metrics.jsonl in a plot of all runs."""

    title: str
    about: str
    name: str
    format: Callable[[float], str] = format_value
    from_zero: bool = True
    is_smoothed: bool = False
    has_dots: bool = False


COMPARED_NUMBERS = (
    ComparedNumber("Loss, smoothed", ABOUT["loss"], "loss", from_zero=False, is_smoothed=True),
    ComparedNumber(
        "Learned",
        "How much better than the base alone the training pictures are predicted. More is better.",
        "learned",
        format_percent,
        has_dots=True,
    ),
    ComparedNumber(
        "Forgotten",
        "How far control prompts have moved. At the same learned, less is better.",
        "forgotten",
        format_percent,
        has_dots=True,
    ),
    ComparedNumber("Held-out loss", ABOUT["held_out_loss"], "held_out_loss", from_zero=False, has_dots=True),
    ComparedNumber("Gradient norm, smoothed", ABOUT["grad_norm"], "grad_norm", is_smoothed=True),
    ComparedNumber("Learning rate of the denoiser", ABOUT["lr"], "lr_denoiser"),
    ComparedNumber("Seconds per step", "Less is better, on the same machine.", "seconds_per_step"),
    ComparedNumber("Memory", "The most that was held on the GPU, in GiB. Less leaves room.", "memory_gib"),
)


def write_comparison_page(folders: list[Path], file: Path) -> Path:
    """Writes the page of several output folders. Returns the file.

    Errors: UserError for fewer than two folders, or one that holds no run; OSError.
    """
    if len(folders) < 2:
        raise UserError("name at least two output folders; report.py makes the page of one")
    names, runs = distinct_names(folders), [read_run_folder(folder) for folder in folders]
    for run, name in zip(runs, names, strict=True):
        run.name = name
    drawn = drawn_by_several(runs)
    return write_page(
        file,
        "comparison.html",
        runs=runs,
        tones=TONES,
        rows=[run_row(number, run, file.parent) for number, run in enumerate(runs)],
        settings=differing_settings(runs),
        plots=[plot for plot in (compared_plot(runs, number) for number in COMPARED_NUMBERS) if plot.curves],
        pictures=picture_rows(runs, drawn[:MOST_ROWS]),
        omitted_pictures=len(drawn) - MOST_ROWS,
    )


def distinct_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart. Errors: UserError for the same folder."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same folder is named twice")


class RunRow(NamedTuple):
    """How far a run came and what it is worth. report: the address of its own page, if there is one."""

    number: int
    numbers: list[str]  # as text: steps, loss, learned, forgotten
    text: str
    warnings: list
    report: str


def run_row(number: int, run: RunFolder, page_folder: Path) -> RunRow:
    """The row of one run in the first table."""
    loss = smoothed(run.metrics.get("loss", []))
    shares = [run.last_value(name) for name in ("learned", "forgotten")]
    numbers = [
        f"{run.last_step:,}{'' if run.is_finished else ', not finished'}",
        format_value(loss[-1][1]) if loss else "",
        *("" if share is None else format_whole_percent(share) for share in shares),
    ]
    warnings = run.verdict.get("warnings") if isinstance(run.verdict.get("warnings"), list) else []
    report = run.path / "report.html"
    address = link(report, page_folder) if report.is_file() else ""
    return RunRow(number, numbers, str(run.verdict.get("text") or ""), warnings, address)


def differing_settings(runs: list[RunFolder]) -> list[list[str]] | None:
    """Name and values of the settings that aren't the same in all runs.

    One that a run's folder doesn't tell is a dash. None if fewer than two runs tell any.
    """
    known = [run.settings.values for run in runs if run.settings.values]
    if len(known) < 2:
        return None
    rows = []
    for name in sorted(set().union(*known) - SETTINGS_OF_EACH_RUN):
        values = [settings[name] for settings in known if name in settings]
        differs = any(not is_same_setting(values[0], value) for value in values[1:])
        if differs or len(values) < len(known):
            told = (run.settings.values for run in runs)
            cells = [format_setting(settings[name]) if name in settings else "–" for settings in told]
            rows.append([name, *cells])
    return rows


def compared_plot(runs: list[RunFolder], number: ComparedNumber) -> Plot:
    """A number of all runs in one plot."""
    curves = []
    for i, run in enumerate(runs):
        points = run.metrics.get(number.name, [])
        style = "dashed" if i >= TONES else "dotted" if number.has_dots else ""
        curves.append(Curve(run.name, smoothed(points) if number.is_smoothed else points, i, style))
    return Plot(number.title, number.about, curves, number.format, number.from_zero)


def drawn_by_several(runs: list[RunFolder]) -> list[tuple[tuple, dict[int, Sample]]]:
    """What last_samples has of at least two runs, control prompts last."""
    shared = [(key, by_run) for key, by_run in last_samples(runs).items() if len(by_run) > 1]
    return sorted(shared, key=lambda entry: entry[0][0])


def picture_rows(
    runs: list[RunFolder], drawn: list[tuple[tuple, dict[int, Sample]]]
) -> list[tuple[tuple, list[Tile | None]]]:
    """((whether it is a control, prompt), its tiles, as many as runs for each seed)."""
    pictures = PagePictures(sum(len(by_run) for _, by_run in drawn))
    rows = []
    for prompt, group in groupby(drawn, key=lambda entry: entry[0][:2]):
        tiles = [
            picture_tile(run, by_run.get(i), pictures) for _, by_run in group for i, run in enumerate(runs)
        ]
        rows.append((prompt, tiles))
    return rows


def last_samples(runs: list[RunFolder]) -> dict[tuple, dict[int, Sample]]:
    """{(whether it is a control, prompt, seed): {number of the run: its last picture}}.

    Pictures of older scripts have no seed: their number tells which of the others they belong to.
    """
    samples: dict[tuple, dict[int, Sample]] = {}
    key_of_number: dict[tuple, tuple] = {}
    drawn = [(i, sample) for i, run in enumerate(runs) for sample in run.samples]  # by step: the last remains
    for i, sample in drawn:
        if sample.seed:
            key = sample.is_control, sample.prompt, sample.seed
            samples.setdefault(key, {})[i] = sample
            key_of_number.setdefault((sample.is_control, sample.prompt, sample.position[1]), key)
    for i, sample in drawn:
        if not sample.seed:
            key = sample.is_control, sample.prompt, sample.position[1]
            samples.setdefault(key_of_number.get(key, key), {})[i] = sample
    return samples


def picture_tile(run: RunFolder, sample: Sample | None, pictures: PagePictures) -> Tile | None:
    """A run's picture, with its step and seed; None where there is none."""
    if sample is None:
        return None
    title = f"{step_title(sample.step, run)}, {seed_title(sample)}"
    return Tile(pictures.encode(sample.file), f"{sample.prompt}: {run.name}, {title}", title)
