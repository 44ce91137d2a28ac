"""The state of a preparation: settings, journal, pictures, buckets, and the table of what each step did."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lora_training.data.folders import Example
from lora_training.errors import UserError
from lora_training.prepare.crops import keeps_aspect_ratio
from lora_training.prepare.journal import Journal
from lora_training.prepare.settings import STATE_FOLDER

if TYPE_CHECKING:
    from lora_training.prepare.pictures import Picture
    from lora_training.prepare.settings import AspectRatioBucketing, ImageResizing, Settings, Steps


class StepResult(NamedTuple):
    """What a step did: with how many images, how many of them now, how many earlier runs had done."""

    step: str
    images: int
    done_now: int
    done_before: int
    note: str


@dataclass
class Preparation:
    """Everything that the steps use, from the top down as they fill it."""

    settings: Settings
    journal: Journal
    pictures: list[Picture] = field(default_factory=list)
    buckets: list[tuple[int, int]] = field(default_factory=list)  # (width, height)
    results: list[StepResult] = field(default_factory=list)

    @classmethod
    def start(cls, settings: Settings) -> Preparation:
        """The state before the first step, with the journal of earlier runs."""
        return cls(settings, Journal(Path(settings.output_dir) / STATE_FOLDER / "journal.jsonl"))

    @property
    def steps(self) -> Steps:
        """The steps that are switched on."""
        return self.settings

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.settings.output_dir)

    @property
    def workers(self) -> int:
        """How many threads read and write pictures."""
        return self.settings.num_workers or os.cpu_count() or 1

    @property
    def remaining(self) -> list[Picture]:
        """The pictures that no step has left out."""
        return [picture for picture in self.pictures if picture.problem is None]

    @property
    def writing_step(self) -> ImageResizing | AspectRatioBucketing | None:
        """The step whose format and quality hold for images; None if they are copied as they are."""
        bucketing = self.steps.aspect_ratio_bucketing
        return bucketing if bucketing and bucketing.resize_images else self.steps.image_resizing

    def crop_target(self, picture: Picture) -> tuple[int, int] | None:
        """The bucket that a picture is cropped to here, or None."""
        bucketing = self.steps.aspect_ratio_bucketing
        return self.buckets[picture.bucket] if bucketing and bucketing.resize_images else None

    def training_size(self, picture: Picture) -> tuple[int, int] | None:
        """The bucket that a picture is cropped to, here or in training, or None."""
        return self.buckets[picture.bucket] if self.buckets else None

    def thumbnail_file(self, picture: Picture) -> Path:
        """Where the picture's thumbnail is."""
        return self.output / STATE_FOLDER / "thumbnails" / f"{picture.digest[:24]}.jpg"

    def mask_thumbnail_file(self, picture: Picture) -> Path:
        """Where the thumbnail of the picture's mask is."""
        return self.output / STATE_FOLDER / "thumbnails" / f"{picture.mask_digest}.png"

    def output_file(self, name: str) -> Path:
        """A file of the output folder. Errors: UserError if a link in there leads out of it."""
        file = self.output / name
        if not file.parent.resolve().is_relative_to(self.output.resolve()):
            raise UserError(f"--output_dir: {file.parent} is a link that leads out of it: take it away")
        return file

    def note_result(self, step: str, images: int, done_now: int, done_before: int, note: str = "") -> None:
        """Adds a row to the table of what each step did."""
        self.results.append(StepResult(step, images, done_now, done_before, note))

    def count_problems(self, pictures: list[Picture]) -> str:
        """How many of the pictures were left out, by the first words of the reasons."""
        counts = Counter(short_problem(picture.problem) for picture in pictures if picture.problem)
        parts = [f"{number} {problem}" for problem, number in counts.most_common()]
        return ", ".join(parts) or "none left out"

    def training_examples(self) -> list[Example]:
        """The remaining pictures for the checks of training, at the sizes that they came in.

        Those that were padded are at the size with their border.
        """
        resizing = self.steps.image_resizing
        is_padded = resizing is not None and resizing.mode == "contain" and not keeps_aspect_ratio(resizing)
        return [
            Example(
                picture.file,
                picture.final_captions,
                None,
                picture.digest,
                picture.resized if is_padded else picture.size,
                picture.bucket,
            )
            for picture in self.remaining
        ]


def short_problem(problem: str) -> str:
    """The kind of a problem, without sizes and names."""
    return problem.split(":")[0].split(" of ")[0].split(" (")[0]
