"""The lower half of a run's page: data, settings, files."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from lora_training.report.formatting import format_bytes, format_setting, is_same_setting, link
from lora_training.report.run_folder import is_number

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.report.run_folder import RunFolder

MOST_CAPTIONS = 500


class DataSummary(NamedTuple):
    """What was trained on. buckets: (width, height, images, how much is cropped)."""

    cards: list[tuple[str, str]]
    findings: list
    buckets: list[tuple[int, int, int, str]]
    captions: list[list[str]]
    caption_count: int


class SettingTables(NamedTuple):
    """All settings, and those that differ from the defaults; None where the defaults aren't known."""

    all: list[tuple[str, str]]
    changed: list[tuple[str, str, str]] | None


class FileRow(NamedTuple):
    """A file or a folder, with a link to it (or none), its size and what it is for."""

    name: str
    address: str
    size: str
    meaning: str = ""
    is_advised: bool = False
    is_incomplete: bool = False


def data_summary(run: RunFolder) -> DataSummary:
    """Pictures, captions, buckets, and what was wrong with them."""
    cards = [
        (f"{run.data[key]:,}", label)
        for key, label in (("images", "images"), ("held_out", "held out"))
        if is_number(run.data.get(key))
    ]
    findings = run.data.get("findings") if isinstance(run.data.get("findings"), list) else []
    captions = read_rows(run.data, "captions", 2)
    rows = [caption_cells(row) for row in captions[:MOST_CAPTIONS]]
    return DataSummary(cards, findings, read_buckets(run.data), rows, len(captions))


def read_rows(data: dict, name: str, length: int) -> list[list]:
    """The rows of a list in data.json that have at least `length` cells."""
    rows = data.get(name) if isinstance(data.get(name), list) else []
    return [row for row in rows if isinstance(row, list) and len(row) >= length]


def read_buckets(data: dict) -> list[tuple[int, int, int, str]]:
    """(width, height, images, how much is cropped) of each bucket in data.json."""
    shapes = []
    for name, images, *cropped in read_rows(data, "buckets", 2):
        parts = str(name).replace("×", "x").split("x")
        sides = [int(side) for side in parts if side.strip().isdecimal()]
        if len(sides) == 2 and min(sides) > 0 and is_number(images):
            note = f"{100 * cropped[0]:.0f}% cropped" if cropped and is_number(cropped[0]) else ""
            shapes.append((*sides, int(images), note))
    return shapes


def caption_cells(row: list) -> list[str]:
    """A picture's name, its caption, its size and its bucket."""
    name, caption, *sizes = (format_setting(cell) for cell in (*row, "", "")[:4])
    return [name, caption, *(size.replace(" ", "\u00a0") for size in sizes)]


def setting_tables(run: RunFolder) -> SettingTables:
    """Each setting as a person would type it."""
    values, defaults = sorted(run.settings.values.items()), run.settings.defaults
    changed = None
    if defaults is not None and values:
        changed = [
            (name, format_setting(value), format_setting(defaults.get(name, "–")))
            for name, value in values
            if name not in defaults or not is_same_setting(value, defaults[name])
        ]
    return SettingTables([(name, format_setting(value)) for name, value in values], changed)


def file_rows(run: RunFolder, page_file: Path | None = None) -> list[FileRow]:
    """Checkpoints and the other files. page_file: where the page will be; without it nothing is linked."""
    rows = []

    def address(file: Path) -> str:
        return link(file, page_file.parent) if page_file else ""

    for step, path, size, is_complete in run.checkpoints:
        is_advised = step == run.advised_step
        rows.append(FileRow(path.name, address(path), format_bytes(size), "", is_advised, not is_complete))
    meanings = file_meanings(run.name)
    for file, size in run.files:
        if not page_file or file.resolve() != page_file.resolve():
            meaning = meanings.get(file.name, "")
            rows.append(FileRow(file.name, address(file), format_bytes(size), meaning))
    for name, meaning in (("samples", "all pictures drawn"), ("logs", "for TensorBoard")):
        if (run.path / name).is_dir():
            rows.append(FileRow(f"{name}/", address(run.path / name), "", meaning))
    return rows


def file_meanings(run_name: str) -> dict[str, str]:
    """{name of a file in the output folder: what it is for}."""
    return {
        "pytorch_lora_weights.safetensors": "the LoRA, for diffusers",
        f"{run_name}.safetensors": "the LoRA, for ComfyUI, AUTOMATIC1111 and kohya's scripts",
        f"{run_name}_emb.safetensors": "the trained tokens",
        "comparison.png": "before and after as one picture",
        "metrics.jsonl": "the numbers behind the curves",
        "config.yaml": "every setting; runs again with --config",
        "log.txt": "the lines that the run has printed",
        "verdict.json": "which step to take, for programs",
        "data.json": "the summary of the data, for programs",
        "README.md": "the model card",
    }
