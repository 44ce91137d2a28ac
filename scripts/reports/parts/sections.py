"""The pieces of a training run's report, each from what its folder holds and empty where it holds nothing."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from html import escape
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from scripts.parts import page
from scripts.reports.parts import plots
from scripts.reports.parts.pictures import Pictures
from scripts.reports.parts.plots import Curve, Plot, percent, plain
from scripts.reports.parts.run_folder import Run, Sample, as_float, is_number, smoothed

ADVISED = '<span class="tag">advised</span>'
MOST_STEPS, MOST_SUBJECTS, MOST_CAPTIONS = 24, 60, 500

STYLE = (
    plots.STYLE
    + """
.under { margin: -6px 0 14px; color: var(--dim); max-width: 80ch; } a { color: var(--mark); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 10px 0 0; font-size: 14px; }
.below { margin: 14px 0 10px; }
.verdict { border-left: 4px solid var(--mark); background: var(--card); padding: 14px 18px; margin: 0 0 10px; font-size: 17px;
  overflow-wrap: anywhere; white-space: pre-line; }
.scroll { overflow-x: auto; margin: 0 0 12px; } .scroll td { overflow-wrap: break-word; max-width: 70ch; }
tr.taken td { background: color-mix(in srgb, var(--mark) 14%, transparent); } td .tag { margin-left: 8px; }
img { display: block; width: 100%; height: auto; } .px { image-rendering: pixelated; }
.gone { display: flex; aspect-ratio: 1; align-items: center; justify-content: center; background: var(--line); color: var(--dim); }
h3.prompt { font-size: 15px; font-weight: 600; margin: 20px 0 8px; overflow-wrap: anywhere; white-space: pre-line; }
.beside { display: grid; grid-template-columns: minmax(0, 230px) minmax(0, 1fr); gap: 24px; align-items: start; }
.beside > div > h3:first-child { margin-top: 0; } .beside > div:first-child { position: sticky; top: 12px; }
.taught { display: grid; grid-template-columns: repeat(2, 1fr); gap: 8px; font-size: 12px; }
.taught figcaption { padding: 4px 6px 6px; color: var(--dim); line-height: 1.3; max-height: 5.6em; overflow: hidden; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; align-items: start; }
.pairs.single { grid-template-columns: repeat(auto-fill, minmax(min(46%, 180px), 1fr)); }
.pair { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: 3px; align-items: start; }
.pair small, .shot small { display: block; padding: 4px 8px 0; color: var(--dim); }
.pairs figcaption, .reel figcaption { padding: 0 8px 6px; } .reel figcaption:empty { padding: 3px; }
.reel { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 210px), 1fr)); gap: 14px; align-items: start; }
.shot { display: none; } .shot.on { display: block; } .film .shot small { display: none; } .all .film .shot small { display: block; }
.all .reel { grid-template-columns: minmax(0, 1fr); }
.all .film > div { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(30%, 130px), 1fr)); gap: 3px; }
.all .shot { display: block; }
.slide { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: 6px 18px; align-items: center; padding: 10px 0;
  background: var(--back); } .slide input[type=range] { flex: 1 1 200px; max-width: 640px; accent-color: var(--mark); height: 28px; }
.slide output { min-width: 9.5em; font-weight: 600; font-variant-numeric: tabular-nums; }
.sheet { max-width: 900px; } details { margin: 12px 0; } summary { cursor: pointer; padding: 4px 0; color: var(--dim); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; margin: 0 0 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
@media (max-width: 800px) { .beside > div:first-child { position: static; } .beside { grid-template-columns: minmax(0, 1fr); } .taught { grid-template-columns: repeat(4, 1fr); } }
@media (max-width: 600px) { td, th { padding: 4px 9px; } .verdict { font-size: 16px; } .taught figcaption { display: none; } }
@media print { :root { --back: #fff; --card: #fff; --ink: #1c1c1a; --dim: #6b6b66; --line: #dcdcd6; color-scheme: light; }
  body { max-width: none; padding: 0; } nav, .slide { display: none; } figure, tr, .finding { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll { overflow: visible; } .pairs { grid-template-columns: repeat(3, 1fr); }
  .plots { grid-template-columns: repeat(2, 1fr); } .reel { grid-template-columns: minmax(0, 1fr); }
  .film > div { display: grid; grid-template-columns: repeat(8, 1fr); gap: 3px; } .shot, .film .shot small { display: block; }
  .beside > div:first-child { position: static; } .taught { grid-template-columns: repeat(8, 1fr); } }
"""
)

SCRIPT = (
    plots.SCRIPT
    + """
for (const films of document.querySelectorAll('.films')) {
  const slider = films.querySelector('[type=range]'), told = films.querySelector('output'), names = films.dataset.names.split('|');
  const shots = films.querySelectorAll('.shot');
  slider.addEventListener('input', () => { told.textContent = names[slider.value];
    for (const shot of shots) shot.classList.toggle('on', shot.dataset.i === slider.value); });
  films.querySelector('[type=checkbox]').addEventListener('change', e => films.classList.toggle('all', e.target.checked));
}
addEventListener('beforeprint', () => document.querySelectorAll('details:not(.extra)').forEach(d => d.open = true));
"""
)


def section(name: str, title: str, under: str, *parts: str) -> str:
    """A part of the page under its heading; empty if the parts are. `under`: a sentence on what is to be seen, as HTML."""
    body = "".join(parts)
    below = f'<p class="under">{under}</p>' if under else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{below}\n{body}</section>\n' if body else ""


def folded(title: str, body: str, kind: str = "") -> str:
    """What opens on demand; empty if the body is. `kind`: "open" from the start, or "extra": stays folded on paper."""
    attribute = {"open": " open", "extra": ' class="extra"'}.get(kind, "")
    return f"<details{attribute}><summary>{escape(title)}</summary>{body}</details>\n" if body else ""


class Number(str):
    """A table's cell that stands to the right."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]], marked: Iterable[bool] | None = None) -> str:
    """A table that scrolls by itself where it is too wide. Cells are HTML."""
    rows = [list(row) for row in rows]
    if not rows:
        return ""
    out = ['<div class="scroll"><table><tr>', *(f"<th>{h}" for h in head), "</tr>\n"]
    for row, mark in zip(rows, marked or [False] * len(rows), strict=True):
        cells = "".join(f'<td class="n">{c}' if isinstance(c, Number) else f"<td>{c}" for c in row)
        out.append(('<tr class="taken">' if mark else "<tr>") + cells + "</tr>\n")
    return "".join(out) + "</table></div>\n"


def size_of(count: int) -> str:
    """Bytes in words."""
    power = min(int(math.log(max(count, 1), 1024)), 4)
    return f"{count / 1024**power:.{0 if power == 0 or count / 1024**power >= 100 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def link(target: Path, page_folder: Path) -> str:
    """The address of a file as seen from the page's folder."""
    try:
        relative = os.path.relpath(target.resolve(), page_folder.resolve())
    except ValueError:  # another drive
        return escape(target.resolve().as_uri())
    return "./" + quote(os.fsencode(Path(relative).as_posix()))


def contents(body: list[str]) -> str:
    """Links to the sections that there are."""
    found = [match for part in body if (match := re.match(r'<section id="([a-z-]+)"><h2>([^<]+)', part))]
    links = "".join(f'<a href="#{m[1]}">{m[2]}</a>' for m in found)
    return f"<nav>{links}</nav>\n" if len(found) > 1 else ""


# ---- what the run is ---------------------------------------------------------------------------------------------------


def heading(run: Run) -> str:
    """Name, base, and how far the run came."""
    total = run.settings.get("max_train_steps")
    of = f" of {total:,}" if is_number(total) and total > run.last_step else ""
    words = ["finished" if run.finished else "not finished", f"{run.last_step:,}{of} steps"]
    base = run.settings.get("pretrained_model_name_or_path")
    words += [f"base {base}"] if base else []
    return f'<h1>{escape(run.name)}</h1><div class="dim">{escape(" · ".join(words))}</div>\n'


def cards(run: Run) -> str:
    """The numbers that are asked for first."""
    out = [(f"{run.last_step:,}", "steps")]
    if is_number(run.data.get("images")):
        out.append((f"{run.data['images']:,}", "images"))
    for name in ("learned", "forgotten"):
        values = dict(run.series.get(name, []))
        at = run.advised if run.advised in values else max(values, default=0)
        if at and math.isfinite(values.get(at, math.nan)):
            out.append((f"{100 * values[at]:.0f}%", f"{name} at step {at:,}"))
    loss = smoothed(run.series.get("loss", []))
    out += [(plain(float(f"{loss[-1][1]:.3g}")), "loss, smoothed")] if loss else []
    taken, before = 0.0, 0
    for step, seconds in run.series.get("seconds_per_step", []):
        taken, before = taken + (seconds * (step - before) if math.isfinite(seconds) else 0), step
    out += [(duration(taken), "of training")] if taken else []
    memory = [v for _, v in run.series.get("memory_gib", []) if math.isfinite(v)]
    out += [(f"{max(memory):.1f}", "GiB of memory")] if memory else []
    return page.numbers(out)


def verdict(run: Run) -> str:
    """Which step to take and why, the warnings, and the numbers behind it."""
    said, text = run.verdict, run.verdict.get("text")
    warnings = said.get("warnings") if isinstance(said.get("warnings"), list) else []
    rows = [r for r in said.get("rows") or [] if isinstance(r, dict)] if isinstance(said.get("rows"), list) else []
    out = [f'<div class="verdict">{escape(str(text))}</div>\n'] if text else []
    out += [page.finding(str(w)) for w in warnings]
    skipped = run.last("skipped_steps")
    if skipped and math.isfinite(skipped):
        out.append(page.finding(f"{skipped:.0f} steps were left out: their loss or gradient was not finite"))

    def cell(value: object, unit) -> str:
        number = as_float(value)
        return Number(("" if value is None else escape(str(value))) if number is None else unit(number))

    held_out = any("held_out_loss" in r for r in rows)
    marks = [run.advised is not None and r.get("step") == run.advised for r in rows]
    cells = []
    for r, taken in zip(rows, marks, strict=True):
        first = escape(str(r.get("step"))) + (ADVISED if taken else "")
        more = [cell(r.get("held_out_loss"), plain)] if held_out else []
        cells.append([first, cell(r.get("learned"), whole_percent), cell(r.get("forgotten"), whole_percent), *more])
    head = ["step", "learned", "forgotten", *(["held-out loss"] if held_out else [])]
    if rows:
        out.append(
            '<p class="under below">Learned: how much better than the base alone the training pictures are predicted. Forgotten:'
            " how far prompts that nothing should change have moved. The step to take has learned nearly all there is, and"
            " forgotten little.</p>\n"
        )
    return section("verdict", "Which step to take", "", *out, table(head, cells, marks))


def whole_percent(value: float) -> str:
    return f"{100 * value:.0f}%" if math.isfinite(value) else str(value)


# ---- pictures ----------------------------------------------------------------------------------------------------------


class Shown:
    """Which of a run's pictures are on the page: some of the steps where there are many, some of the subjects."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.subjects = list(dict.fromkeys(s.subject for s in run.samples))
        self.at: dict[tuple, dict[int, Sample]] = {subject: {} for subject in self.subjects}
        for sample in run.samples:
            self.at[sample.subject][sample.step] = sample
        trained, control = ([s for s in self.subjects if s[0] is kind] for kind in (False, True))
        self.left_out = len(self.subjects) - len(trained[:MOST_SUBJECTS]) - len(control[:MOST_SUBJECTS])
        self.kinds = {False: trained[:MOST_SUBJECTS], True: control[:MOST_SUBJECTS]}

    def steps(self, control: bool) -> list[int]:
        """The steps of a kind of pictures: all, or so many with the first, the last and the advised one among them."""
        steps = sorted({step for subject in self.kinds[control] for step in self.at[subject]})
        if len(steps) <= MOST_STEPS:
            return steps
        kept = {steps[round(i * (len(steps) - 1) / (MOST_STEPS - 2))] for i in range(MOST_STEPS - 1)}
        return sorted(kept | ({self.run.advised} & set(steps)))

    def ends(self, subject: tuple) -> list[Sample]:
        """A subject's first picture, the advised step's, and its last."""
        at = self.at[subject]
        wanted = sorted({min(at), max(at)} | ({self.run.advised} & set(at)))
        return [at[step] for step in wanted]

    def has_films(self, control: bool) -> bool:
        return len(self.steps(control)) > 2

    @property
    def count(self) -> int:
        """How many pictures the page will have."""
        films = sum(len(self.steps(c)) * len(self.kinds[c]) for c in (False, True) if self.has_films(c))
        return films + sum(len(self.ends(s)) for c in (False, True) for s in self.kinds[c])


def step_name(step: int, run: Run, last: bool = False) -> str:
    """What a picture's step is called."""
    if step == 0:
        return "before"
    return f"step {step:,}{', advised' if step == run.advised else ', last' if last else ''}"


def by_prompt(subjects: list[tuple]) -> list[tuple[str, list[tuple]]]:
    """Subjects of a prompt together, in order."""
    return [(key[2], list(group)) for key, group in groupby(subjects, key=lambda s: s[:3])]


def pairs(shown: Shown, pictures: Pictures, control: bool) -> str:
    """Each prompt's pictures before and after, from the same seed."""
    out = []
    single = " single" if len(shown.steps(control)) == 1 else ""
    for prompt, subjects in by_prompt(shown.kinds[control]):
        out.append(f'<h3 class="prompt">{escape(prompt)}</h3><div class="pairs{single}">\n')
        for subject in subjects:
            ends = shown.ends(subject)
            tiles = []
            for sample in ends:
                name = step_name(sample.step, shown.run, sample is ends[-1])
                image = pictures.img(sample.file, f"{prompt}: {name}, {seed_name(sample)}")
                tiles.append(f"<div>{image}<small>{escape(name)}</small></div>")
            out.append(
                f'<figure><div class="pair">{"".join(tiles)}</div><figcaption><small>{escape(seed_name(ends[-1]))}'
            )
            out.append("</small></figcaption></figure>\n")
        out.append("</div>\n")
    return "".join(out)


def seed_name(sample: Sample) -> str:
    return f"seed {sample.seed}" if sample.seed else f"picture {sample.place[1] + 1}"


def films(shown: Shown, pictures: Pictures, control: bool) -> str:
    """The pictures of all steps behind a slider; side by side on demand and on paper."""
    if not shown.has_films(control):
        return ""
    steps = shown.steps(control)
    names = [step_name(s, shown.run, s == steps[-1]) for s in steps]
    out = [
        f'<div class="films" data-names="{escape("|".join(names))}"><div class="slide">'
        f'<input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" aria-label="step of the pictures">'
        f"<output>{escape(names[-1])}</output>"
        '<label><input type="checkbox"> side by side</label></div>\n'
    ]
    for prompt, subjects in by_prompt(shown.kinds[control]):
        out.append(f'<h3 class="prompt">{escape(prompt)}</h3><div class="reel">\n')
        for subject in subjects:
            at = shown.at[subject]
            out.append('<figure class="film"><div>')
            for i, (step, name) in enumerate(zip(steps, names, strict=True)):
                image = '<span class="gone">not drawn</span>'
                if step in at:
                    image = pictures.img(at[step].file, f"{prompt}: {name}, {seed_name(at[step])}")
                last = " on" if i == len(steps) - 1 else ""
                out.append(f'<div class="shot{last}" data-i="{i}">{image}<small>{escape(name)}</small></div>')
            seed = seed_name(at[max(at)])
            out.append(f"</div><figcaption><small>{escape(seed)}</small></figcaption></figure>\n")
        out.append("</div>\n")
    return "".join(out) + "</div>\n"


def before_and_after(run: Run, shown: Shown, pictures: Pictures) -> str:
    """Training pictures, and beside them what the prompts gave before and give now."""
    taught = "".join(
        f"<figure>{pictures.img(file, f'training picture: {caption or file.stem}', 256, 40_000)}"
        f"{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>\n"
        for file, caption in run.training_pictures
    )
    drawn = pairs(shown, pictures, control=False)
    sheet = run.folder / "comparison.png"
    if sheet.is_file():
        image = pictures.img(sheet, "the run's comparison sheet: before and after", 1300, 500_000)
        image = f'<figure class="sheet">{image}</figure>\n'
        drawn += folded("comparison.png, the run's own sheet", image, "extra") if drawn else image
    if taught and drawn:
        body = f'<div class="beside"><div><h3 class="prompt">Trained on</h3><div class="taught">{taught}</div></div><div>{drawn}</div></div>'
    else:
        body = drawn or (
            f'<h3 class="prompt">Trained on</h3><div class="pairs single">{taught}</div>' if taught else ""
        )
    under = (
        "The same prompt and seed without and with what was trained. Good: it looks like the training pictures, and still follows"
        " the prompt. Bad: no difference (too little training), or a copy of a training picture whatever the prompt says (too much)."
    )
    if shown.left_out:
        under += f" {shown.left_out} more are in samples/."
    title, steps = "Before and after", shown.steps(False)
    if len(steps) == 1 and not sheet.is_file():
        title, under = (
            "Pictures before training" if steps == [0] else f"Pictures of step {steps[0]:,}",
            "There are none of another step yet to compare them with.",
        )
    return section("before-after", title, under, body)


def over_steps(run: Run, shown: Shown, pictures: Pictures) -> str:
    under = (
        "Move the slider to see the same seeds as training goes on. Good: the subject appears and stays. Bad: from some step on"
        " pictures get harsher, all alike, or lose the prompt: take an earlier step."
    )
    return section("samples", "Samples over the steps", under, films(shown, pictures, control=False))


def controls(run: Run, shown: Shown, pictures: Pictures) -> str:
    under = (
        "Prompts that have nothing to do with what was trained. Good: nothing changes but details. Bad: the trained subject or its"
        " style shows up here (it bleeds): fewer steps, a lower rate or rank, or prior preservation."
    )
    moving = films(shown, pictures, True)
    return section("control", "Control prompts", under, pairs(shown, pictures, True), folded("over the steps", moving))


# ---- curves ------------------------------------------------------------------------------------------------------------

ABOUT = {
    "loss": "How wrong the model is about the training pictures, at noise drawn anew each step: so it jumps, and the bold line is"
    " the one to read. Good: it falls, then levels off. Bad: it rises or never moves.",
    "held_out_loss": "The same for pictures that were kept out of the training, at fixed noise. Good: it falls along. Bad: it"
    " turns upwards: from there on the pictures are learned by heart.",
    "learned": "Learned: how much better than the base alone the training pictures are predicted; forgotten: how far control"
    " prompts have moved meanwhile. Good: learned climbs, forgotten stays low. Bad: forgotten goes on where learned has stopped.",
    "grad_norm": "How hard a step pulls at the weights, before clipping. Good: a steady band. Bad: growing spikes (learning rate"
    " too high), or zero (nothing is learned).",
    "lr": "What the schedule and the optimizer gave each trained part. Neither good nor bad: a bend here explains one elsewhere.",
    "seconds_per_step": "Good: flat. Bad: it climbs or jumps: other work on the machine, a slow disk, memory that overflows.",
    "memory_gib": "The most that was held on the GPU. Good: flat, with room to the card's size. Bad: it climbs step by step.",
    "skipped_steps": "Steps left out since their loss or gradient was not finite, counted from the start. Good: none.",
}


def run_plots(run: Run) -> list[Plot]:
    """All plots of a run, the ones that are asked for first in front; numbers that a changed script logs come last."""
    series = run.series

    def curve(name: str, label: str, tone: int = 0, look: str = "dotted") -> Curve:
        return Curve(label, series.get(name, []), tone, look)

    loss = series.get("loss", [])
    clip = run.settings.get("max_grad_norm")
    out = [
        Plot("Loss", ABOUT["loss"], [Curve("each log", loss, 0, "thin"), Curve("smoothed", smoothed(loss), 0)]),
        Plot(
            "Learned and forgotten",
            ABOUT["learned"],
            [
                curve("learned", "learned"),
                curve("learned_held_out", "learned, held-out pictures", 2),
                curve("forgotten", "forgotten", 1),
            ],
            percent,
            from_zero=True,
        ),
        Plot("Held-out loss", ABOUT["held_out_loss"], [curve("held_out_loss", "held-out pictures", 2)]),
        Plot(
            "Gradient norm",
            ABOUT["grad_norm"],
            [
                Curve("each log", series.get("grad_norm", []), 0, "thin"),
                Curve("smoothed", smoothed(series.get("grad_norm", [])), 0),
            ],
            from_zero=True,
            level=(float(clip), "clipped to this") if is_number(clip) and clip > 0 else None,
        ),
        Plot(
            "Learning rate",
            ABOUT["lr"],
            [
                Curve(name.removeprefix("lr_").replace("_", " "), points, tone)
                for tone, (name, points) in enumerate(item for item in series.items() if item[0].startswith("lr_"))
            ],
            from_zero=True,
        ),
        Plot(
            "Seconds per step", ABOUT["seconds_per_step"], [curve("seconds_per_step", "seconds", 0, "")], from_zero=True
        ),
        Plot("Memory", ABOUT["memory_gib"], [curve("memory_gib", "GiB", 0, "")], from_zero=True),
        Plot("Steps left out", ABOUT["skipped_steps"], [curve("skipped_steps", "steps", 4, "")], from_zero=True),
    ]
    known = {"learned_held_out", "forgotten", *ABOUT}
    for name in [n for n in series if n not in known and not n.startswith("lr_")][:12]:
        out.append(Plot(name, "Logged under this name in metrics.jsonl.", [curve(name, name, 0, "")]))
    for plot in out:
        plot.taken = run.advised
    return out


def curves(run: Run) -> str:
    drawn = "".join(plots.figure(plot) for plot in run_plots(run))
    under = "Point at a curve to read its values at that step."
    if run.advised is not None:
        under += f" The upright dashed line is the advised step, {run.advised:,}."
    return section("curves", "Curves", under, f'<div class="plots">{drawn}</div>' if drawn else "")


# ---- data, settings, files ---------------------------------------------------------------------------------------------


def data_summary(run: Run) -> str:
    """Pictures, captions, buckets and what was found wrong with them."""
    data = run.data

    def items(name: str, length: int) -> list[list]:
        found = data.get(name) if isinstance(data.get(name), list) else []
        return [r for r in found if isinstance(r, list) and len(r) >= length]

    counts = [
        (f"{data[key]:,}", words)
        for key, words in (("images", "images"), ("held_out", "held out"))
        if is_number(data.get(key))
    ]
    findings = data.get("findings") if isinstance(data.get("findings"), list) else []
    out = [page.numbers(counts) if counts else "", *(page.finding(str(f)) for f in findings)]
    shapes = []
    for name, images, *cropped in items("buckets", 2):
        sides = [int(side) for side in str(name).replace("×", "x").split("x") if side.strip().isdecimal()]
        if len(sides) == 2 and min(sides) > 0 and is_number(images):
            cut = f"{100 * cropped[0]:.0f}% cropped" if cropped and is_number(cropped[0]) else ""
            shapes.append((*sides, int(images), cut))
    if shapes:
        out.append(
            f'<h3 class="prompt">Buckets: sizes trained at, and how many pictures each has</h3>{page.bucket_shapes(shapes)}'
        )
    captions = items("captions", 2)
    rows = [[escape(show(cell)) for cell in (*row, "", "")[:4]] for row in captions[:MOST_CAPTIONS]]
    rows = [[*row[:2], *(size.replace(" ", "\u00a0") for size in row[2:])] for row in rows]
    more = f'<p class="dim">{len(captions) - MOST_CAPTIONS} more.</p>' if len(captions) > MOST_CAPTIONS else ""
    if rows:
        listed = table(["picture", "caption", "size", "bucket"], rows) + more
        out.append(folded(f"{len(captions)} captions", listed, "open" if len(rows) <= 12 else ""))
    return section("data", "Data", "What was trained on, as the run read it.", *out)


def show(value: object) -> str:
    """A setting's value as a person would type it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(show(v) for v in value)
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict) else str(value)


def same(one: object, other: object) -> bool:
    """Whether two values are one setting: 1e-4 and 0.0001, [64] and 64."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, list | tuple) != isinstance(other, list | tuple):
        one, other = (v[0] if isinstance(v, list | tuple) and len(v) == 1 else v for v in (one, other))
    try:
        return one == other or (
            not isinstance(one, bool) and not isinstance(other, bool) and float(one) == float(other)
        )
    except (TypeError, ValueError, OverflowError):
        return str(one) == str(other)


def settings_tables(run: Run) -> str:
    """What differs from the defaults, or all settings where the defaults aren't known."""
    every = [[escape(name), escape(show(value))] for name, value in sorted(run.settings.items())]
    out, under = [], ""
    if run.defaults is not None and run.settings:
        under = "Every setting that isn't its default; all others are as the training script's --help has them."
        changed = [
            (k, v) for k, v in sorted(run.settings.items()) if k not in run.defaults or not same(v, run.defaults[k])
        ]
        rows = [[escape(k), escape(show(v)), escape(show(run.defaults.get(k, "–")))] for k, v in changed]
        out.append(table(["setting", "here", "default"], rows) or "<p>All settings are the defaults.</p>")
    if every:
        out.append(folded(f"All {len(every)} settings", table(["setting", "value"], every), "extra"))
    if run.config_text.strip():
        text = f"<pre>{escape(run.config_text)}</pre>"
        out.append(folded("config.yaml, which can't be read as YAML", text, "open"))
    return section("settings", "Settings", under, *out)


def origin(run: Run) -> str:
    """The command and the versions, to do it again."""
    command = f"<pre>{escape(run.command)}</pre>" if run.command else ""
    versions = f'<p class="dim">{escape(run.versions)}</p>' if run.versions else ""
    return section("command", "Command and versions", "", command, versions)


def file_list(run: Run, page_file: Path) -> str:
    """Checkpoints and the other files, with sizes and links."""
    here = page_file.parent
    rows, marks = [], []
    for step, place, size, whole in run.checkpoints:
        note = "" if whole else '<span class="why">not whole: it has no manifest</span>'
        name = f'<a href="{link(place, here)}/">{escape(place.name)}</a>'
        rows.append([name + (ADVISED if step == run.advised else ""), Number(size_of(size)), note])
        marks.append(step == run.advised)
    meanings = {
        "pytorch_lora_weights.safetensors": "the LoRA, for diffusers",
        f"{run.name}.safetensors": "the LoRA, for ComfyUI, AUTOMATIC1111 and kohya's scripts",
        f"{run.name}_emb.safetensors": "the trained tokens",
        "comparison.png": "before and after as one picture",
        "metrics.jsonl": "the numbers behind the curves",
        "config.yaml": "every setting; runs again with --config",
        "verdict.json": "which step to take, for programs",
        "data.json": "the summary of the data, for programs",
        "README.md": "the model card",
    }
    for file, size in run.files:
        if file.resolve() != page_file.resolve():
            href = f'<a href="{link(file, here)}">{escape(file.name)}</a>'
            rows.append([href, Number(size_of(size)), escape(meanings.get(file.name, ""))])
            marks.append(False)
    for name, meaning in (("samples", "all pictures drawn"), ("logs", "for TensorBoard")):
        if (run.folder / name).is_dir():
            rows.append([f'<a href="{link(run.folder / name, here)}/">{name}/</a>', "", meaning])
            marks.append(False)
    return section("files", "Checkpoints and files", "", table(["file", "size", ""], rows, marks))
