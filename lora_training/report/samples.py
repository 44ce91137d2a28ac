"""The pictures of a run's page: training pictures, the same seeds before and after, and over the steps."""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from lora_training.report.layout import folded, section

if TYPE_CHECKING:
    from lora_training.report.pictures import PagePictures
    from lora_training.report.run_folder import RunFolder, Sample

MOST_STEPS = 24
MOST_SUBJECTS = 60

NO_PICTURE = '<span class="gone">not drawn</span>'


class SampleSelection:
    """Which of a run's pictures are on the page: some of the steps, and some of the subjects, of many.

    A subject is what stays the same over the steps: a prompt and the number of its image.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.by_subject: dict[tuple, dict[int, Sample]] = {}  # subject -> step -> sample
        for sample in run.samples:
            self.by_subject.setdefault(sample.subject, {})[sample.step] = sample
        subjects = {True: [], False: []}  # by whether they are control pictures
        for subject in self.by_subject:
            subjects[subject[0]].append(subject)
        self.subjects = {is_control: group[:MOST_SUBJECTS] for is_control, group in subjects.items()}
        self.omitted = len(self.by_subject) - sum(len(group) for group in self.subjects.values())

    def steps(self, is_control: bool) -> list[int]:
        """The steps that are shown: all, or some with the first, the last and the advised one among them."""
        steps = sorted({step for subject in self.subjects[is_control] for step in self.by_subject[subject]})
        if len(steps) <= MOST_STEPS:
            return steps
        last, places = len(steps) - 1, MOST_STEPS - 1  # one is left for the advised step
        selected = {steps[round(i * last / (places - 1))] for i in range(places)}
        return sorted(selected | ({self.run.advised_step} & set(steps)))

    def milestones(self, subject: tuple) -> list[Sample]:
        """A subject's first picture, the advised step's, and its last."""
        samples = self.by_subject[subject]
        steps = {min(samples), max(samples)} | ({self.run.advised_step} & set(samples))
        return [samples[step] for step in sorted(steps)]

    def has_films(self, is_control: bool) -> bool:
        """Whether there are more steps than before and after."""
        return len(self.steps(is_control)) > 2

    @property
    def count(self) -> int:
        """How many pictures the page will have."""
        total = 0
        for is_control, subjects in self.subjects.items():
            total += sum(len(self.milestones(subject)) for subject in subjects)
            if self.has_films(is_control):
                total += len(self.steps(is_control)) * len(subjects)
        return total


def step_title(step: int, run: RunFolder, is_last: bool = False) -> str:
    """What a picture's step is called."""
    if step == 0:
        return "before"
    note = ", advised" if step == run.advised_step else ", last" if is_last else ""
    return f"step {step:,}{note}"


def seed_title(sample: Sample) -> str:
    """What tells a prompt's pictures apart; those of older scripts have no seed."""
    return f"seed {sample.seed}" if sample.seed else f"picture {sample.position[1] + 1}"


def group_by_prompt(subjects: list[tuple]) -> list[tuple[str, list[tuple]]]:
    """(prompt, its subjects) of subjects that are in order."""
    groups = groupby(subjects, key=lambda subject: subject[:3])
    return [(prompt, list(group)) for (_, _, prompt), group in groups]


def pairs(selection: SampleSelection, pictures: PagePictures, is_control: bool) -> str:
    """Each prompt's pictures before and after, from the same seed."""
    single = " single" if len(selection.steps(is_control)) == 1 else ""
    pieces = []
    for prompt, subjects in group_by_prompt(selection.subjects[is_control]):
        pieces.append(f'<h3 class="prompt">{escape(prompt)}</h3><div class="pairs{single}">\n')
        pieces += [pair(selection, pictures, prompt, subject) for subject in subjects]
        pieces.append("</div>\n")
    return "".join(pieces)


def pair(selection: SampleSelection, pictures: PagePictures, prompt: str, subject: tuple) -> str:
    """One subject's pictures beside each other."""
    samples = selection.milestones(subject)
    tiles = []
    for sample in samples:
        title = step_title(sample.step, selection.run, sample is samples[-1])
        image = pictures.img(sample.file, f"{prompt}: {title}, {seed_title(sample)}")
        tiles.append(f"<div>{image}<small>{escape(title)}</small></div>")
    caption = f"<figcaption><small>{escape(seed_title(samples[-1]))}</small></figcaption>"
    return f'<figure><div class="pair">{"".join(tiles)}</div>{caption}</figure>\n'


def films(selection: SampleSelection, pictures: PagePictures, is_control: bool) -> str:
    """The pictures of all steps behind a slider; side by side on demand and on paper."""
    if not selection.has_films(is_control):
        return ""
    steps = selection.steps(is_control)
    titles = {step: step_title(step, selection.run, step == steps[-1]) for step in steps}
    last = len(steps) - 1
    pieces = [
        f'<div class="films" data-names="{escape("|".join(titles.values()))}"><div class="slide">'
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step of the pictures">'
        f"<output>{escape(titles[steps[-1]])}</output>"
        '<label><input type="checkbox"> side by side</label></div>\n'
    ]
    for prompt, subjects in group_by_prompt(selection.subjects[is_control]):
        pieces.append(f'<h3 class="prompt">{escape(prompt)}</h3><div class="reel">\n')
        pieces += [film(selection.by_subject[subject], pictures, prompt, titles) for subject in subjects]
        pieces.append("</div>\n")
    return "".join(pieces) + "</div>\n"


def film(samples: dict[int, Sample], pictures: PagePictures, prompt: str, titles: dict[int, str]) -> str:
    """One subject's pictures over the steps. samples: by step; titles: of all steps that are shown."""
    frames = []
    for i, (step, title) in enumerate(titles.items()):
        image = NO_PICTURE
        if step in samples:
            image = pictures.img(samples[step].file, f"{prompt}: {title}, {seed_title(samples[step])}")
        is_on = " on" if i == len(titles) - 1 else ""
        frames.append(f'<div class="shot{is_on}" data-i="{i}">{image}<small>{escape(title)}</small></div>')
    seed = escape(seed_title(samples[max(samples)]))
    caption = f"<figcaption><small>{seed}</small></figcaption>"
    return f'<figure class="film"><div>{"".join(frames)}</div>{caption}</figure>\n'


def training_pictures(run: RunFolder, pictures: PagePictures) -> str:
    """Some of the pictures that were trained on, with their captions."""
    figures = []
    for file, caption in run.training_pictures:
        image = pictures.img(file, f"training picture: {caption or file.stem}", 256, 40_000)
        below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        figures.append(f"<figure>{image}{below}</figure>\n")
    return "".join(figures)


def before_and_after_section(run: RunFolder, selection: SampleSelection, pictures: PagePictures) -> str:
    """Training pictures, and beside them what the prompts gave before and give now."""
    taught = training_pictures(run, pictures)
    drawn = pairs(selection, pictures, is_control=False)
    comparison = run.path / "comparison.png"
    if comparison.is_file():
        image = pictures.img(comparison, "the run's comparison sheet: before and after", 1300, 500_000)
        image = f'<figure class="sheet">{image}</figure>\n'
        drawn += folded("comparison.png, the run's own sheet", image, "extra") if drawn else image
    head = '<h3 class="prompt">Trained on</h3>'
    if taught and drawn:
        left = f'<div>{head}<div class="taught">{taught}</div></div>'
        body = f'<div class="beside">{left}<div>{drawn}</div></div>'
    elif taught:
        body = f'{head}<div class="pairs single">{taught}</div>'
    else:
        body = drawn
    title = "Before and after"
    explanation = (
        "The same prompt and seed without and with what was trained. Good: it looks like the training"
        " pictures, and still follows the prompt. Bad: no difference (too little training), or a copy of a"
        " training picture whatever the prompt says (too much)."
    )
    if selection.omitted:
        explanation += f" {selection.omitted} more are in samples/."
    steps = selection.steps(is_control=False)
    if len(steps) == 1 and not comparison.is_file():
        title = "Pictures before training" if steps == [0] else f"Pictures of step {steps[0]:,}"
        explanation = "There are none of another step yet to compare them with."
    return section("before-after", title, explanation, body)


def over_steps_section(selection: SampleSelection, pictures: PagePictures) -> str:
    """Validation pictures over the steps."""
    explanation = (
        "Move the slider to see the same seeds as training goes on. Good: the subject appears and stays."
        " Bad: from some step on pictures get harsher, all alike, or lose the prompt: take an earlier step."
    )
    body = films(selection, pictures, is_control=False)
    return section("samples", "Samples over the steps", explanation, body)


def control_section(selection: SampleSelection, pictures: PagePictures) -> str:
    """Pictures of prompts that training should not change."""
    explanation = (
        "Prompts that have nothing to do with what was trained. Good: nothing changes but details. Bad: the"
        " trained subject or its style shows up here (it bleeds): fewer steps, a lower rate or rank, or prior"
        " preservation."
    )
    over_steps = folded("over the steps", films(selection, pictures, is_control=True))
    body = pairs(selection, pictures, is_control=True), over_steps
    return section("control", "Control prompts", explanation, *body)
