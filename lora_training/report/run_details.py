"""The lower half of a run's page: data, settings, command and versions, files."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from lora_training.html_page import bucket_shapes, finding_box, number_cards
from lora_training.report.formatting import format_bytes, format_setting, is_same_setting
from lora_training.report.layout import ADVISED_TAG, NumberCell, file_link, folded, section, table
from lora_training.report.run_folder import is_number

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.report.run_folder import RunFolder

MOST_CAPTIONS = 500
MOST_OPEN_CAPTIONS = 12  # more are folded
INCOMPLETE = '<span class="why">not whole: it has no manifest</span>'


def data_section(run: RunFolder) -> str:
    """Pictures, captions, buckets, and what was wrong with them."""
    counts = [
        (f"{run.data[key]:,}", label)
        for key, label in (("images", "images"), ("held_out", "held out"))
        if is_number(run.data.get(key))
    ]
    findings = run.data.get("findings") if isinstance(run.data.get("findings"), list) else []
    pieces = [number_cards(counts) if counts else "", *(finding_box(str(text)) for text in findings)]
    if shapes := read_buckets(run.data):
        title = "Buckets: sizes trained at, and how many pictures each has"
        pieces.append(f'<h3 class="prompt">{title}</h3>{bucket_shapes(shapes)}')
    pieces.append(captions_table(read_rows(run.data, "captions", 2)))
    return section("data", "Data", "What was trained on, as the run read it.", *pieces)


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


def captions_table(captions: list[list]) -> str:
    """Names, captions and sizes of the pictures. captions: rows of these, and perhaps of buckets."""
    rows = []
    for row in captions[:MOST_CAPTIONS]:
        name, caption, *sizes = (escape(format_setting(cell)) for cell in (*row, "", "")[:4])
        rows.append([name, caption, *(size.replace(" ", "\u00a0") for size in sizes)])
    if not rows:
        return ""
    body = table(["picture", "caption", "size", "bucket"], rows)
    if len(captions) > MOST_CAPTIONS:
        body += f'<p class="dim">{len(captions) - MOST_CAPTIONS} more.</p>'
    kind = "open" if len(rows) <= MOST_OPEN_CAPTIONS else ""
    return folded(f"{len(captions)} captions", body, kind)


def settings_section(run: RunFolder) -> str:
    """What differs from the defaults, or all settings where the defaults aren't known."""
    values, defaults = sorted(run.settings.values.items()), run.settings.defaults
    pieces, explanation = [], ""
    if defaults is not None and values:
        explanation = (
            "Every setting that isn't its default; all others are as the training script's --help has them."
        )
        rows = [
            [*setting_cells(name, value), setting_cell(defaults.get(name, "–"))]
            for name, value in values
            if name not in defaults or not is_same_setting(value, defaults[name])
        ]
        pieces.append(table(["setting", "here", "default"], rows) or "<p>All settings are the defaults.</p>")
    if values:
        every = table(["setting", "value"], [setting_cells(name, value) for name, value in values])
        pieces.append(folded(f"All {len(values)} settings", every, "extra"))
    if run.settings.unreadable_text.strip():
        text = f"<pre>{escape(run.settings.unreadable_text)}</pre>"
        pieces.append(folded("config.yaml, which can't be read as YAML", text, "open"))
    return section("settings", "Settings", explanation, *pieces)


def setting_cells(name: str, value: object) -> list[str]:
    """A setting's name and value as cells of a table."""
    return [escape(name), setting_cell(value)]


def setting_cell(value: object) -> str:
    """A setting's value as a cell of a table."""
    return escape(format_setting(value))


def command_section(run: RunFolder) -> str:
    """The command and the versions, to do it again."""
    command, versions = run.settings.command, run.settings.versions
    pieces = [f"<pre>{escape(command)}</pre>" if command else ""]
    pieces.append(f'<p class="dim">{escape(versions)}</p>' if versions else "")
    return section("command", "Command and versions", "", *pieces)


def files_section(run: RunFolder, page_file: Path) -> str:
    """Checkpoints and the other files, with sizes and links. page_file: where the page will be."""
    folder, rows, is_advised = page_file.parent, [], []
    for checkpoint in run.checkpoints:
        advised = checkpoint.step == run.advised_step
        name = file_link(checkpoint.folder, folder, checkpoint.folder.name) + (ADVISED_TAG if advised else "")
        note = "" if checkpoint.is_complete else INCOMPLETE
        rows.append([name, NumberCell(format_bytes(checkpoint.size)), note])
        is_advised.append(advised)
    meanings = file_meanings(run.name)
    for file, size in run.files:
        if file.resolve() != page_file.resolve():
            meaning = escape(meanings.get(file.name, ""))
            rows.append([file_link(file, folder, file.name), NumberCell(format_bytes(size)), meaning])
    for name, meaning in (("samples", "all pictures drawn"), ("logs", "for TensorBoard")):
        if (run.path / name).is_dir():
            rows.append([file_link(run.path / name, folder, f"{name}/"), "", meaning])
    is_advised += [False] * (len(rows) - len(is_advised))
    return section("files", "Checkpoints and files", "", table(["file", "size", ""], rows, is_advised))


def file_meanings(run_name: str) -> dict[str, str]:
    """{name of a file in the output folder: what it is for}."""
    return {
        "pytorch_lora_weights.safetensors": "the LoRA, for diffusers",
        f"{run_name}.safetensors": "the LoRA, for ComfyUI, AUTOMATIC1111 and kohya's scripts",
        f"{run_name}_emb.safetensors": "the trained tokens",
        "comparison.png": "before and after as one picture",
        "metrics.jsonl": "the numbers behind the curves",
        "config.yaml": "every setting; runs again with --config",
        "verdict.json": "which step to take, for programs",
        "data.json": "the summary of the data, for programs",
        "README.md": "the model card",
    }
