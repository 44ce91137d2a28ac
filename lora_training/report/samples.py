"""The pictures of a run's page: training pictures, the same seeds before and after, and over the steps."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from lora_training.report.pictures import PagePictures, Tile

if TYPE_CHECKING:
    from lora_training.report.pictures import EncodedPicture, LinkedPictures
    from lora_training.report.run_folder import RunFolder, Sample

MOST_STEPS = 24
MOST_SUBJECTS = 60


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


class Figure(NamedTuple):
    """A subject's pictures at several steps, None where one was not drawn."""

    tiles: list[Tile | None]
    seed: str


class Films(NamedTuple):
    """The pictures of all steps. titles: of the steps."""

    titles: list[str]
    prompts: list[tuple[str, list[Figure]]]


class PageSamples(NamedTuple):
    """All pictures of a run's page. omitted: how many subjects are not on it."""

    taught: list[tuple[EncodedPicture | None, str, str]]  # with the file's name and the caption
    sheet: Tile | None  # comparison.png
    steps: list[int]
    pairs: list[tuple[str, list[Figure]]]
    films: Films | None
    control_steps: list[int]
    control_pairs: list[tuple[str, list[Figure]]]
    control_films: Films | None
    omitted: int


def page_samples(run: RunFolder, pictures: PagePictures | LinkedPictures | None = None) -> PageSamples:
    """The pictures of an output folder, in the sizes that the page has them in.

    pictures: how they come onto the page; by default inside it, all of them together within a budget.
    """
    selection = SampleSelection(run)
    pictures = pictures or PagePictures(selection.count)
    taught = [
        (pictures.encode(file, 256, 40_000), file.stem, caption) for file, caption in run.training_pictures
    ]
    sheet, comparison = None, run.path / "comparison.png"
    if comparison.is_file():
        encoded = pictures.encode(comparison, 1300, 500_000)
        sheet = Tile(encoded, "the run's comparison sheet: before and after")
    by_kind = [
        (selection.steps(kind), pairs(selection, pictures, kind), films(selection, pictures, kind))
        for kind in (False, True)
    ]
    return PageSamples(taught, sheet, *by_kind[0], *by_kind[1], selection.omitted)


def pairs(
    selection: SampleSelection, pictures: PagePictures, is_control: bool
) -> list[tuple[str, list[Figure]]]:
    """Each prompt's pictures before and after, from the same seed."""
    return [
        (prompt, [pair(selection, pictures, prompt, subject) for subject in subjects])
        for prompt, subjects in group_by_prompt(selection.subjects[is_control])
    ]


def pair(selection: SampleSelection, pictures: PagePictures, prompt: str, subject: tuple) -> Figure:
    """One subject's pictures beside each other."""
    samples = selection.milestones(subject)
    titles = [step_title(sample.step, selection.run, sample is samples[-1]) for sample in samples]
    tiles = [sample_tile(*pair, prompt, pictures) for pair in zip(samples, titles, strict=True)]
    return Figure(tiles, seed_title(samples[-1]))


def sample_tile(sample: Sample, title: str, prompt: str, pictures: PagePictures) -> Tile:
    """A sample with its step's title below it."""
    return Tile(pictures.encode(sample.file), f"{prompt}: {title}, {seed_title(sample)}", title)


def films(selection: SampleSelection, pictures: PagePictures, is_control: bool) -> Films | None:
    """The pictures of all steps; None where there are only those before and after."""
    if not selection.has_films(is_control):
        return None
    steps = selection.steps(is_control)
    titles = {step: step_title(step, selection.run, step == steps[-1]) for step in steps}
    prompts = [
        (prompt, [film(selection.by_subject[subject], pictures, prompt, titles) for subject in subjects])
        for prompt, subjects in group_by_prompt(selection.subjects[is_control])
    ]
    return Films(list(titles.values()), prompts)


def film(samples: dict[int, Sample], pictures: PagePictures, prompt: str, titles: dict[int, str]) -> Figure:
    """One subject's pictures over the steps. samples: by step; titles: of all steps that are shown."""
    tiles = [
        sample_tile(samples[step], title, prompt, pictures) if step in samples else None
        for step, title in titles.items()
    ]
    return Figure(tiles, seed_title(samples[max(samples)]))
