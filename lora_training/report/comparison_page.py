"""One page of several runs: settings that differ, curves over each other, pictures side by side.

It reads nothing but the output folders; what a run lacks is left out.
"""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from lora_training.errors import UserError
from lora_training.html_page import page_head, write_page
from lora_training.report import layout
from lora_training.report.curves import ABOUT
from lora_training.report.formatting import format_setting, format_whole_percent, is_same_setting
from lora_training.report.layout import NumberCell, link, section, table
from lora_training.report.pictures import PagePictures
from lora_training.report.plots import Curve, Plot, format_percent, format_value, plot_figure, smoothed
from lora_training.report.run_folder import read_run_folder
from lora_training.report.samples import NO_PICTURE, seed_title, step_title

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lora_training.report.run_folder import RunFolder, Sample

MOST_ROWS = 60  # prompts and seeds whose pictures are shown
TONES = 8  # colours of runs; the curves of further ones are dashed
LONG_CELL = 30  # characters from which a cell is made wide

# settings that differ whatever is compared
SETTINGS_OF_EACH_RUN = {"output_dir", "config", "run_name", "logging_dir", "class_data_dir"}

STYLE = (
    layout.STYLE
    + """
.runs { display: grid; gap: 4px; overflow-x: auto; justify-content: start; \
} .runs small { color: var(--dim); }
.wide { min-width: 230px; } td .run, th .run { white-space: nowrap; } .run::before { content: ""; \
display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px;
  background: var(--tone); } .runs b { font-size: 13px; font-weight: 600; overflow-wrap: anywhere; }
.runs img { border-radius: 4px; }
"""
)


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
    return write_page(file, comparison_page_parts(runs, file))


def comparison_page_parts(runs: list[RunFolder], file: Path) -> Iterator[str]:
    """The page from top to bottom. file: where it will be."""
    yield page_head(" / ".join(run.name for run in runs), STYLE)
    yield f"<h1>{len(runs)} runs</h1>\n"
    sections = [
        verdicts_section(runs, file.parent),
        settings_section(runs),
        curves_section(runs),
        pictures_section(runs),
    ]
    yield layout.contents(sections)
    yield from sections
    yield f"<script>{layout.SCRIPT}</script>\n"


def distinct_names(folders: list[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart. Errors: UserError for the same folder."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError("the same folder is named twice")


def run_labels(runs: list[RunFolder]) -> list[str]:
    """The runs' names with their colours."""
    return [f'<span class="run t{i % TONES}">{escape(run.name)}</span>' for i, run in enumerate(runs)]


def section_of_runs(title: str, explanation: str, body: str) -> str:
    """A section whose anchor is its title."""
    return section(title.lower().replace(" ", "-"), title, explanation, body)


def wide_cell(text: str) -> str:
    """A cell's text that isn't squeezed into a column of single words where it is long."""
    return f'<div class="wide">{text}</div>' if len(text) > LONG_CELL else text


def verdicts_section(runs: list[RunFolder], page_folder: Path) -> str:
    """How far each run came, what it is worth, and where its report is."""
    labels = run_labels(runs)
    rows = [verdict_row(run, label, page_folder) for run, label in zip(runs, labels, strict=True)]
    head = ["run", "steps", "loss, smoothed", "learned", "forgotten", "verdict", ""]
    explanation = "Learned, forgotten and the loss are those of the last step."
    return section_of_runs("The runs", explanation, table(head, rows))


def verdict_row(run: RunFolder, label: str, page_folder: Path) -> list[str]:
    """The cells of one run."""
    loss = smoothed(run.metrics.get("loss", []))
    learned, forgotten = (run.last_value(name) for name in ("learned", "forgotten"))
    text = escape(str(run.verdict.get("text") or ""))
    warnings = run.verdict.get("warnings") if isinstance(run.verdict.get("warnings"), list) else []
    lines = [text, *(f'<span class="why">{escape(str(warning))}</span>' for warning in warnings)]
    report = run.path / "report.html"
    return [
        label,
        NumberCell(f"{run.last_step:,}{'' if run.is_finished else ', not finished'}"),
        NumberCell(format_value(loss[-1][1]) if loss else ""),
        NumberCell("" if learned is None else format_whole_percent(learned)),
        NumberCell("" if forgotten is None else format_whole_percent(forgotten)),
        wide_cell("<br>".join(lines)),
        f'<a href="{link(report, page_folder)}">report</a>' if report.is_file() else "",
    ]


def settings_section(runs: list[RunFolder]) -> str:
    """The settings that aren't the same in all runs; one that a run's folder doesn't tell is a dash."""
    known = [run.settings.values for run in runs if run.settings.values]
    if len(known) < 2:
        return ""
    rows = []
    for name in sorted(set().union(*known) - SETTINGS_OF_EACH_RUN):
        values = [settings[name] for settings in known if name in settings]
        differs = any(not is_same_setting(values[0], value) for value in values[1:])
        if differs or len(values) < len(known):
            rows.append([escape(name), *(setting_cell(run.settings.values, name) for run in runs)])
    body = table(["setting", *run_labels(runs)], rows) or "<p>The settings are the same.</p>"
    explanation = "All others are the same in each run that tells them."
    return section_of_runs("Settings that differ", explanation, body)


def setting_cell(settings: dict[str, object], name: str) -> str:
    """A setting's value as a cell; a dash where there is none."""
    return wide_cell(escape(format_setting(settings[name]))) if name in settings else "–"


def curves_section(runs: list[RunFolder]) -> str:
    """Each number of all runs in one plot."""
    figures = "".join(plot_figure(compared_plot(runs, number)) for number in COMPARED_NUMBERS)
    explanation = "One colour for each run. Point at a curve to read all values at that step."
    body = f'<div class="plots">{figures}</div>' if figures else ""
    return section_of_runs("Curves", explanation, body)


def compared_plot(runs: list[RunFolder], number: ComparedNumber) -> Plot:
    """A number of all runs in one plot."""
    curves = []
    for i, run in enumerate(runs):
        points = run.metrics.get(number.name, [])
        style = "dashed" if i >= TONES else "dotted" if number.has_dots else ""
        curves.append(Curve(run.name, smoothed(points) if number.is_smoothed else points, i, style))
    return Plot(number.title, number.about, curves, number.format, number.from_zero)


def pictures_section(runs: list[RunFolder]) -> str:
    """The last pictures of each prompt and seed, a column for each run."""
    shared = [(key, by_run) for key, by_run in last_samples(runs).items() if len(by_run) > 1]
    shared.sort(key=lambda entry: entry[0][0])  # control prompts last
    shown = shared[:MOST_ROWS]
    pictures = PagePictures(sum(len(by_run) for _, by_run in shown))
    pieces = []
    for (is_control, prompt), group in groupby(shown, key=lambda entry: entry[0][:2]):
        control = " (control)" if is_control else ""
        pieces.append(f'<h3 class="prompt">{escape(prompt)}{control}</h3>\n')
        columns = f"grid-template-columns: repeat({len(runs)}, minmax(110px, 280px))"
        pieces.append(f'<div class="runs" style="{columns}">')
        pieces += [f"<div><b>{label}</b></div>" for label in run_labels(runs)]
        for _, by_run in group:
            pieces += [picture_tile(run, by_run.get(i), prompt, pictures) for i, run in enumerate(runs)]
        pieces.append("</div>\n")
    explanation = "The last picture of each prompt and seed that at least two runs have drawn."
    if len(shared) > MOST_ROWS:
        explanation += f" {len(shared) - MOST_ROWS} more are in the folders."
    return section_of_runs("Side by side", explanation, "".join(pieces))


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


def picture_tile(run: RunFolder, sample: Sample | None, prompt: str, pictures: PagePictures) -> str:
    """A run's picture, with its step and seed."""
    if sample is None:
        return f"<div>{NO_PICTURE}</div>"
    title = f"{step_title(sample.step, run)}, {seed_title(sample)}"
    image = pictures.img(sample.file, f"{prompt}: {run.name}, {title}")
    return f"<div>{image}<small>{escape(title)}</small></div>"
