"""What lies in a training run's output folder, read so that any piece may be missing, cut off or from an older script."""

from __future__ import annotations

import ast
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from PIL import Image

BROKEN_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises on half a file
HUGE = 1e100  # no number of a training run; what is larger is taken as infinite
RUN_SIGNS = (
    "metrics.jsonl",
    "config.yaml",
    "verdict.json",
    "comparison.png",
    "samples",
    "pytorch_lora_weights.safetensors",
)


class FolderError(Exception):
    """One line that a person can act on."""


@dataclass(frozen=True)
class Sample:
    """A validation picture. `place`: (prompt's number, image's number) in its file name."""

    file: Path
    step: int
    place: tuple[int, int]
    prompt: str
    seed: str
    control: bool

    @property
    def subject(self) -> tuple:
        """What stays the same over the steps of a run."""
        return self.control, self.place[0], self.prompt, self.place[1]


@dataclass
class Run:
    """An output folder. Settings, command and versions are empty where the folder doesn't tell."""

    folder: Path
    name: str
    series: dict[str, list[tuple[int, float]]]  # number's name -> (step, value), in order; values may be nan or inf
    samples: list[Sample]
    settings: dict[str, object]
    defaults: dict[str, object] | None
    command: str
    versions: str
    config_text: str  # of a config.yaml that can't be parsed
    verdict: dict
    data: dict
    training_pictures: list[tuple[Path, str]]  # with captions
    checkpoints: list[tuple[int, Path, int, bool]]  # step, folder, bytes, whether it is whole
    files: list[tuple[Path, int]] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that anything in the folder tells of."""
        steps = [points[-1][0] for points in self.series.values() if points]
        return max([*steps, *(s.step for s in self.samples), *(c[0] for c in self.checkpoints)], default=0)

    @property
    def finished(self) -> bool:
        return (self.folder / "pytorch_lora_weights.safetensors").is_file() or any(
            self.folder.glob("*_emb.safetensors")
        )

    @property
    def advised(self) -> int | None:
        """The step that the verdict advises to take."""
        step = self.verdict.get("step")
        return int(step) if is_number(step) else None

    def last(self, name: str) -> float | None:
        """The last value of a series, or None."""
        points = self.series.get(name)
        return points[-1][1] if points else None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= HUGE


def read_run(folder: Path) -> Run:
    """Reads an output folder. Errors: FolderError if it isn't there or holds nothing of a run."""
    if not folder.is_dir():
        raise FolderError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if not any((folder / sign).exists() for sign in RUN_SIGNS) and not any(folder.glob("checkpoint-*")):
        raise FolderError(
            f"{folder}: nothing that a training run leaves (metrics.jsonl, config.yaml, samples/ or checkpoint-N/)"
        )
    settings, defaults, command, versions, text = read_settings(folder)
    prompts = settings.get("validation_prompt")
    prompts = [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, list) else []
    return Run(
        folder=folder,
        name=folder.resolve().name or str(folder.resolve()),
        series=read_metrics(folder / "metrics.jsonl"),
        samples=read_samples(folder / "samples", [str(p) for p in prompts]),
        settings=settings,
        defaults=defaults,
        command=command,
        versions=versions,
        config_text=text,
        verdict=read_json(folder / "verdict.json"),
        data=read_json(folder / "data.json"),
        training_pictures=[(file, caption_of(file)) for file in pictures_in(folder / "training_pictures")][:8],
        checkpoints=read_checkpoints(folder),
        files=[(f, size_of(f)) for f in sorted(folder.iterdir()) if f.is_file() and not f.name.startswith(".")],
    )


def read_text(file: Path) -> str:
    """A file's text, empty if there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_json(file: Path) -> dict:
    """A JSON object, empty if the file is missing, cut off, or something else."""
    try:
        value = json.loads(read_text(file))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Each number of metrics.jsonl over the steps. A line that isn't whole is left out; of two for one step the later counts."""
    found: dict[str, dict[int, float]] = {}
    for line in read_text(file).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(row, dict) or not is_number(row.get("step")):
            continue
        for name, value in row.items():
            number = as_float(value)
            if name not in ("step", "epoch") and number is not None:
                found.setdefault(name, {})[int(row["step"])] = number
    return {name: sorted(points.items()) for name, points in found.items()}


def as_float(value: object) -> float | None:
    """A number of metrics.jsonl, which spells what isn't finite as a word."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= HUGE or value != value else math.inf if value > 0 else -math.inf


def read_settings(folder: Path) -> tuple[dict, dict | None, str, str, str]:
    """(settings, defaults or None, command, versions, text of a config.yaml that isn't YAML)."""
    text, notes = read_text(folder / "config.yaml"), {}
    for line in text.splitlines():
        if line.startswith("#"):
            name, _, value = line[1:].strip().partition(":")
            notes.setdefault(name, value.strip())
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError:
        settings = None
    try:
        defaults = json.loads(notes.get("defaults", ""))
    except ValueError:
        defaults = None
    whole = isinstance(settings, dict)
    return (
        {str(k): v for k, v in settings.items()} if whole else {} if text else tracked_settings(folder),
        defaults if isinstance(defaults, dict) else None,
        notes.get("command", ""),
        notes.get("versions", ""),
        "" if whole else text,
    )


def tracked_settings(folder: Path) -> dict:
    """Settings from TensorBoard's hparams.yml: runs of before config.yaml have no others. Lists are strings there."""
    try:
        newest = max(folder.glob("*/*/*/hparams.yml"), key=lambda f: f.stat().st_mtime, default=None)
        settings = yaml.safe_load(read_text(newest)) if newest else None
    except (OSError, yaml.YAMLError):
        settings = None
    return {str(k): unquoted(v) for k, v in settings.items()} if isinstance(settings, dict) else {}


def unquoted(value: object) -> object:
    """A value that TensorBoard has written as Python writes it."""
    if value == "None":
        return None
    if isinstance(value, str) and value.startswith("["):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def read_samples(folder: Path, prompts: list[str]) -> list[Sample]:
    """The pictures below samples/, in order. Prompts and seeds stand in their PNG text; without, `prompts` names them."""
    samples = []
    for step_folder in sorted(folder.glob("step-*")):
        step = step_folder.name.removeprefix("step-")
        for file in pictures_in(step_folder) if step.isdecimal() else ():
            found = re.match(r"(\d+)_(\d+)", file.name)
            text = picture_text(file)
            place = (int(found[1]), int(found[2])) if found else (0, len(samples))
            known = prompts[place[0]] if place[0] < len(prompts) else file.stem
            samples.append(
                Sample(
                    file,
                    int(step),
                    place,
                    text.get("prompt", known),
                    text.get("seed", ""),
                    text.get("kind") == "control",
                )
            )
    return sorted(samples, key=lambda s: (s.subject, s.step))


def pictures_in(folder: Path) -> list[Path]:
    return sorted(f for f in folder.glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg") and f.is_file())


def picture_text(file: Path) -> dict[str, str]:
    """The texts in a picture's file, by key."""
    try:
        with Image.open(file) as image:
            return {str(k): v for k, v in image.info.items() if isinstance(v, str)}
    except BROKEN_PICTURE:
        return {}


def caption_of(file: Path) -> str:
    """A training picture's caption, from the texts in its file."""
    text = picture_text(file)
    return next((text[key] for key in ("caption", "prompt", "text") if key in text), "")


def size_of(file: Path) -> int:
    """Bytes; none of a file that a run at work has just removed."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def read_checkpoints(folder: Path) -> list[tuple[int, Path, int, bool]]:
    """(step, folder, bytes, whether its manifest is there) of each checkpoint, by step."""
    found = []
    for place in folder.glob("checkpoint-*"):
        step = place.name.removeprefix("checkpoint-")
        if step.isdecimal() and place.is_dir():
            size = sum(size_of(Path(root, file)) for root, _, files in os.walk(place) for file in files)
            found.append((int(step), place, size, (place / "manifest.json").is_file()))
    return sorted(found)


def smoothed(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """A running mean of the finite values, each weighing less the further back it lies; the window grows with their number."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    keep = 1 - 1 / max(2.0, len(finite) / 12)
    total, weight, out = 0.0, 0.0, []
    for step, value in finite:
        total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
        out.append((step, total / weight))
    return out
