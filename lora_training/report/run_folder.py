"""What lies in a run's output folder: metrics, settings, pictures, checkpoints.

Any piece may be missing, cut off, or from an older script; what can't be read counts as missing.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml
from PIL import Image

from lora_training.errors import UserError
from lora_training.files import list_checkpoints, read_json_file, read_metrics

if TYPE_CHECKING:
    from lora_training.report.plots import Points

# what Pillow raises for half a file
DAMAGED_PICTURE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
LARGEST_NUMBER = 1e100  # no number of a training; what is larger is taken as infinite
MOST_TRAINING_PICTURES = 8
RUN_FILES = (
    "metrics.jsonl",
    "config.yaml",
    "verdict.json",
    "comparison.png",
    "samples",
    "pytorch_lora_weights.safetensors",
)


@dataclass(frozen=True)
class Sample:
    """A validation picture. position: the numbers of its prompt and of its image in the file's name."""

    file: Path
    step: int
    position: tuple[int, int]
    prompt: str
    seed: str
    is_control: bool

    @property
    def subject(self) -> tuple:
        """What stays the same over the steps of a run: whether it is a control, prompt and image."""
        return self.is_control, self.position[0], self.prompt, self.position[1]


class Checkpoint(NamedTuple):
    """A checkpoint's folder, with its size in bytes. One without a manifest was not written to its end."""

    step: int
    folder: Path
    size: int
    is_complete: bool


@dataclass
class RunSettings:
    """What config.yaml tells. unreadable_text: the file's text where it can't be parsed, else empty."""

    values: dict[str, object] = field(default_factory=dict)
    defaults: dict[str, object] | None = None
    command: str = ""
    versions: str = ""
    unreadable_text: str = ""


@dataclass
class RunFolder:
    """A run as its output folder tells it; what the folder doesn't have is empty."""

    path: Path
    name: str
    metrics: dict[str, Points]  # by the number's name; values may be nan or infinite
    samples: list[Sample]
    settings: RunSettings
    verdict: dict
    data: dict  # of data.json
    training_pictures: list[tuple[Path, str]]  # with captions
    checkpoints: list[Checkpoint]
    files: list[tuple[Path, int]]  # with bytes

    @property
    def last_step(self) -> int:
        """The last step that anything in the folder tells of."""
        steps = [points[-1][0] for points in self.metrics.values() if points]
        steps += [sample.step for sample in self.samples]
        steps += [checkpoint.step for checkpoint in self.checkpoints]
        return max(steps, default=0)

    @property
    def is_finished(self) -> bool:
        """Whether the trained weights are there."""
        has_lora = (self.path / "pytorch_lora_weights.safetensors").is_file()
        return has_lora or any(self.path.glob("*_emb.safetensors"))

    @property
    def advised_step(self) -> int | None:
        """The step that the verdict advises to take."""
        step = self.verdict.get("step")
        return int(step) if is_number(step) else None

    def last_value(self, name: str) -> float | None:
        """The last value of a number in metrics.jsonl, or None."""
        points = self.metrics.get(name)
        return points[-1][1] if points else None


def read_run_folder(folder: Path) -> RunFolder:
    """Reads an output folder. Errors: UserError if it isn't there, or holds nothing of a run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    if not any((folder / name).exists() for name in RUN_FILES) and not any(folder.glob("checkpoint-*")):
        what = "metrics.jsonl, config.yaml, samples/ or checkpoint-N/"
        raise UserError(f"{folder}: nothing that a training run leaves ({what})")
    settings = read_settings(folder)
    prompts = settings.values.get("validation_prompt")
    prompts = [prompts] if isinstance(prompts, str) else prompts if isinstance(prompts, list) else []
    taught = list_pictures(folder / "training_pictures")[:MOST_TRAINING_PICTURES]
    return RunFolder(
        path=folder,
        name=folder.resolve().name or str(folder.resolve()),
        metrics=read_metrics_by_name(folder),
        samples=read_samples(folder / "samples", [str(prompt) for prompt in prompts]),
        settings=settings,
        verdict=read_json(folder / "verdict.json"),
        data=read_json(folder / "data.json"),
        training_pictures=[(file, read_caption(file)) for file in taught],
        checkpoints=read_checkpoints(folder),
        files=[(file, file_size(file)) for file in sorted(folder.iterdir()) if is_shown(file)],
    )


def is_shown(file: Path) -> bool:
    """Whether a file is one of the run's, rather than a lock or one that is being written."""
    return file.is_file() and not file.name.startswith(".")


def is_number(value: object) -> bool:
    """Whether a value of a JSON or YAML file is a number that a training can have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def as_float(value: object) -> float | None:
    """A number of metrics.jsonl, which spells what isn't finite as text; None for what is no number."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if abs(value) <= LARGEST_NUMBER or value != value:
        return float(value)
    return math.inf if value > 0 else -math.inf


def read_text(file: Path) -> str:
    """A file's text, empty if there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_json(file: Path) -> dict:
    """The object in a JSON file; empty if the file is missing, cut off, or something else."""
    try:
        return read_json_file(file)
    except (OSError, UserError):
        return {}


def read_metrics_by_name(folder: Path) -> dict[str, Points]:
    """Each number of metrics.jsonl over the steps; of two values for one step the later counts."""
    values: dict[str, dict[int, float]] = {}
    for row in read_metrics(folder):
        if not is_number(row["step"]):
            continue
        for name, value in row.items():
            number = as_float(value)
            if name not in ("step", "epoch") and number is not None:
                values.setdefault(name, {})[row["step"]] = number
    return {name: sorted(points.items()) for name, points in values.items()}


def read_settings(folder: Path) -> RunSettings:
    """The settings of config.yaml, and what its comments tell; older runs have TensorBoard's alone."""
    text, notes = read_text(folder / "config.yaml"), {}
    for line in text.splitlines():
        if line.startswith("#"):
            name, _, value = line[1:].strip().partition(":")
            notes.setdefault(name, value.strip())
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    try:
        defaults = json.loads(notes.get("defaults", ""))
    except ValueError:
        defaults = None
    settings = RunSettings(command=notes.get("command", ""), versions=notes.get("versions", ""))
    settings.defaults = defaults if isinstance(defaults, dict) else None
    if isinstance(values, dict):
        settings.values = {str(name): value for name, value in values.items()}
    elif text:
        settings.unreadable_text = text
    else:
        settings.values = read_tensorboard_settings(folder)
    return settings


def read_tensorboard_settings(folder: Path) -> dict[str, object]:
    """Settings from TensorBoard's hparams.yml; lists are texts there."""
    try:
        files = folder.glob("*/*/*/hparams.yml")
        newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
        settings = yaml.safe_load(read_text(newest)) if newest else None
    except (OSError, yaml.YAMLError):
        settings = None
    return {str(k): parse_python_value(v) for k, v in settings.items()} if isinstance(settings, dict) else {}


def parse_python_value(value: object) -> object:
    """None or a list that TensorBoard has written as Python writes it; other values as they are."""
    if value == "None":
        return None
    if isinstance(value, str) and value.startswith("["):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return value
    return value


def read_samples(folder: Path, prompts: list[str]) -> list[Sample]:
    """The pictures below samples/, by subject and step.

    Prompts and seeds stand in a picture's PNG text; where they don't, `prompts` names them by number.
    """
    samples: list[Sample] = []
    for step_folder in sorted(folder.glob("step-*")):
        step = step_folder.name.removeprefix("step-")
        for file in list_pictures(step_folder) if step.isdecimal() else ():
            numbers = re.match(r"(?:control|(\d+))_(\d+)", file.name)
            position = (int(numbers[1] or 0), int(numbers[2])) if numbers else (0, len(samples))
            prompt = prompts[position[0]] if position[0] < len(prompts) else file.stem
            text = read_png_text(file)
            is_control = text.get("kind") == "control"
            prompt, seed = text.get("prompt", prompt), text.get("seed", "")
            samples.append(Sample(file, int(step), position, prompt, seed, is_control))
    return sorted(samples, key=lambda sample: (sample.subject, sample.step))


def list_pictures(folder: Path) -> list[Path]:
    """The PNG and JPEG files of a folder, by name."""
    files = sorted(folder.glob("*"))
    return [file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg") and file.is_file()]


def read_png_text(file: Path) -> dict[str, str]:
    """The texts in a picture's file, by key."""
    try:
        with Image.open(file) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except DAMAGED_PICTURE:
        return {}


def read_caption(file: Path) -> str:
    """A training picture's caption, from the texts in its file."""
    text = read_png_text(file)
    return next((text[key] for key in ("caption", "prompt", "text") if key in text), "")


def file_size(file: Path) -> int:
    """Bytes of a file; none of one that a run at work has just removed."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a folder, by step."""
    checkpoints = []
    for path in reversed(list_checkpoints(folder)):
        step, is_complete = int(path.name.removeprefix("checkpoint-")), (path / "manifest.json").is_file()
        size = sum(file_size(Path(root, file)) for root, _, files in os.walk(path) for file in files)
        checkpoints.append(Checkpoint(step, path, size, is_complete))
    return checkpoints
