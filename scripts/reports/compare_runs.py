"""Makes one page of several training runs: what differs in their settings, their curves over each other, their pictures side by side.

    python scripts/reports/compare_runs.py output/rank4 output/rank16 output/rank64
    python scripts/reports/compare_runs.py output/a output/b -o a_or_b.html

Reads nothing but the output folders, as report.py does; what a run lacks is left out. Exit status 2: no such run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from which everything is imported

from scripts.parts import page
from scripts.parts.netted import netted
from scripts.reports.parts import plots, sections
from scripts.reports.parts.pictures import Pictures
from scripts.reports.parts.plots import Curve, Plot, percent, plain
from scripts.reports.parts.run_folder import FolderError, Run, Sample, read_run, smoothed

MOST_ROWS = 60  # prompts and seeds whose pictures are shown
OWN = {"output_dir", "config", "run_name", "logging_dir", "class_data_dir"}  # settings that differ whatever is compared

STYLE = (
    sections.STYLE
    + """
.runs { display: grid; gap: 4px; overflow-x: auto; justify-content: start; } .runs small { color: var(--dim); }
.wide { min-width: 230px; } td .run, th .run { white-space: nowrap; } .run::before { content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 7px;
  background: var(--tone); } .runs b { font-size: 13px; font-weight: 600; overflow-wrap: anywhere; }
.runs img { border-radius: 4px; }
"""
)


def names_of(folders: list[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    raise FolderError("the same folder is named twice")


def labels(runs: list[Run]) -> list[str]:
    """The runs' names with their colours."""
    return [f'<span class="run t{i % 8}">{escape(run.name)}</span>' for i, run in enumerate(runs)]


def wide(text: str) -> str:
    """A cell's text that isn't squeezed into a column of single words where it is long."""
    return f'<div class="wide">{text}</div>' if len(text) > 30 else text


def verdicts(runs: list[Run], here: Path) -> str:
    """How far each run came, what it is worth, and where its report is."""
    rows = []
    for run, label in zip(runs, labels(runs), strict=True):
        loss = smoothed(run.series.get("loss", []))
        numbers = [run.last("learned"), run.last("forgotten")]
        own = run.folder / "report.html"
        text = escape(str(run.verdict.get("text") or ""))
        warnings = run.verdict.get("warnings") if isinstance(run.verdict.get("warnings"), list) else []
        rows.append(
            [
                label,
                sections.Number(f"{run.last_step:,}{'' if run.finished else ', not finished'}"),
                sections.Number(plain(loss[-1][1]) if loss else ""),
                *(sections.Number("" if n is None else sections.whole_percent(n)) for n in numbers),
                wide("<br>".join([text, *(f'<span class="why">{escape(str(w))}</span>' for w in warnings)])),
                f'<a href="{sections.link(own, here)}">report</a>' if own.is_file() else "",
            ]
        )
    head = ["run", "steps", "loss, smoothed", "learned", "forgotten", "verdict", ""]
    return section_of_runs(
        "The runs", "Learned, forgotten and the loss are those of the last step.", sections.table(head, rows)
    )


def section_of_runs(title: str, under: str, body: str) -> str:
    return sections.section(title.lower().replace(" ", "-"), title, under, body)


def differing(runs: list[Run]) -> str:
    """The settings that aren't the same in all runs; a setting that a run's folder doesn't tell is a dash."""
    if len([run for run in runs if run.settings]) < 2:
        return ""
    names = sorted(set().union(*(run.settings for run in runs)) - OWN)
    rows = []
    for name in names:
        values = [run.settings.get(name, run) for run in runs]  # the run itself stands for "not told"
        told = [v for v, run in zip(values, runs, strict=True) if v is not run]
        if any(not sections.same(told[0], v) for v in told[1:]) or (len(told) < len([r for r in runs if r.settings])):
            cells = ["–" if v is run else wide(escape(sections.show(v))) for v, run in zip(values, runs, strict=True)]
            rows.append([escape(name), *cells])
    body = sections.table(["setting", *labels(runs)], rows) or "<p>The settings are the same.</p>"
    return section_of_runs("Settings that differ", "All others are the same in each run that tells them.", body)


def curves(runs: list[Run]) -> str:
    """Each number of all runs in one plot."""
    kinds = [
        ("Loss, smoothed", sections.ABOUT["loss"], "loss", plain, False),
        (
            "Learned",
            "How much better than the base alone the training pictures are predicted. More is better.",
            "learned",
            percent,
            True,
        ),
        (
            "Forgotten",
            "How far control prompts have moved. At the same learned, less is better.",
            "forgotten",
            percent,
            True,
        ),
        ("Held-out loss", sections.ABOUT["held_out_loss"], "held_out_loss", plain, False),
        ("Gradient norm, smoothed", sections.ABOUT["grad_norm"], "grad_norm", plain, True),
        ("Learning rate of the denoiser", sections.ABOUT["lr"], "lr_denoiser", plain, True),
        ("Seconds per step", "Less is better, on the same machine.", "seconds_per_step", plain, True),
        ("Memory", "The most that was held on the GPU, in GiB. Less leaves room.", "memory_gib", plain, True),
    ]
    out = []
    for title, about, name, unit, from_zero in kinds:
        drawn = []
        for i, run in enumerate(runs):
            points = run.series.get(name, [])
            look = "dashed" if i >= 8 else "dotted" if name in ("learned", "forgotten", "held_out_loss") else ""
            drawn.append(Curve(run.name, smoothed(points) if "smoothed" in title else points, i, look))
        out.append(plots.figure(Plot(title, about, drawn, unit, from_zero)))
    body = "".join(out)
    under = "One colour for each run. Point at a curve to read all values at that step."
    return section_of_runs("Curves", under, f'<div class="plots">{body}</div>' if body else "")


def side_by_side(runs: list[Run]) -> str:
    """The last pictures of each prompt and seed, a column for each run."""
    found: dict[tuple, dict[int, Sample]] = {}
    drawn = [(i, sample) for i, run in enumerate(runs) for sample in run.samples]  # in the order of their steps
    with_seed: dict[tuple, tuple] = {}
    for i, sample in drawn:
        if sample.seed:
            key = sample.control, sample.prompt, sample.seed
            found.setdefault(key, {})[i] = sample
            with_seed.setdefault((sample.control, sample.prompt, sample.place[1]), key)
    for i, sample in drawn:
        if not sample.seed:  # an older run's: its number says which one it is
            key = sample.control, sample.prompt, sample.place[1]
            found.setdefault(with_seed.get(key, key), {})[i] = sample
    shared = [(key, at) for key, at in found.items() if len(at) > 1]
    shared.sort(key=lambda item: item[0][0])  # control prompts last
    shown = shared[:MOST_ROWS]
    pictures = Pictures(sum(len(at) for _, at in shown))
    out = []
    for (control, prompt), group in groupby(shown, key=lambda item: item[0][:2]):
        out.append(f'<h3 class="prompt">{escape(prompt)}{" (control)" if control else ""}</h3>\n')
        columns = f"grid-template-columns: repeat({len(runs)}, minmax(110px, 280px))"
        out.append(f'<div class="runs" style="{columns}">')
        out += [f"<div><b>{label}</b></div>" for label in labels(runs)]
        for _, at in group:
            for i, run in enumerate(runs):
                if i in at:
                    told = f"{sections.step_name(at[i].step, run)}, {sections.seed_name(at[i])}"
                    image = pictures.img(at[i].file, f"{prompt}: {run.name}, {told}")
                    out.append(f"<div>{image}<small>{escape(told)}</small></div>")
                else:
                    out.append('<div><span class="gone">not drawn</span></div>')
        out.append("</div>\n")
    under = "The last picture of each prompt and seed that at least two runs have drawn."
    if len(shared) > MOST_ROWS:
        under += f" {len(shared) - MOST_ROWS} more are in the folders."
    return section_of_runs("Side by side", under, "".join(out))


def parts_of_page(runs: list[Run], file: Path) -> Iterator[str]:
    """The page from top to bottom."""
    yield page.head(" / ".join(run.name for run in runs), STYLE)
    yield f"<h1>{len(runs)} runs</h1>\n"
    body = [verdicts(runs, file.parent), differing(runs), curves(runs), side_by_side(runs)]
    yield sections.contents(body)
    yield from body
    yield f"<script>{sections.SCRIPT}</script>\n"


def compare(folders: list[Path], file: Path) -> Path:
    """Writes the page of several output folders. Errors: FolderError for one that holds no run, OSError."""
    names, runs = names_of(folders), [read_run(folder) for folder in folders]
    for run, name in zip(runs, names, strict=True):
        run.name = name
    return page.write_page(file, parts_of_page(runs, file))


@netted
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Makes one page of several training runs from their output folders.")
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="output folders of runs, finished or not"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", default=Path("compare.html"), help="default: compare.html"
    )
    args = parser.parse_args(argv)
    try:
        if len(args.folders) < 2:
            raise FolderError("name at least two output folders; report.py makes the page of one")
        print(compare(args.folders, args.output))
    except (FolderError, OSError) as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
