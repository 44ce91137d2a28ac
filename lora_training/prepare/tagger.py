"""WD14 taggers (ONNX): models that give pictures the tags of an image board."""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from lora_training.errors import UserError
from lora_training.prepare.model_folders import model_folder

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.prepare.settings import AutoTagging

MODEL_FILE, TAGS_FILE = "model.onnx", "selected_tags.csv"
GENERAL, CHARACTER = 0, 4  # categories in selected_tags.csv; others, such as ratings, are no tags
INPUT_SIDE = 448  # pixels, of a model that doesn't say


class Tagger:
    """A WD14 tagger: model.onnx (NHWC, BGR, 0 to 255), whose outputs are probabilities of the tags."""

    def __init__(self, settings: AutoTagging) -> None:
        """Loads the model. Errors: UserError if it can't be had or used."""
        self.settings = settings
        folder = model_folder(settings.model_name, "auto_tagging: model_name", [MODEL_FILE, TAGS_FILE])
        for name in (MODEL_FILE, TAGS_FILE):
            if not (folder / name).is_file():
                raise UserError(f"auto_tagging: model_name {settings.model_name}: no {name} in {folder}")
        self.session = open_session(folder / MODEL_FILE, settings.device, "auto_tagging")
        (self.input,) = self.session.get_inputs()
        batch, side = (size if isinstance(size, int) else None for size in self.input.shape[:2])
        self.has_fixed_batch = batch is not None
        self.batch_size, self.side = batch or settings.batch_size, side or INPUT_SIDE
        self.tags = read_tags(folder / TAGS_FILE)
        self.excluded = {normalize_tag(tag) for tag in settings.exclude_tags}

    def prepare(self, image: Image.Image) -> np.ndarray:
        """RGB image -> (448, 448, 3) float32, BGR, 0 to 255, on a white square."""
        side = max(image.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        square = square.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.asarray(square, dtype=np.float32)[:, :, ::-1]

    def __call__(self, images: list[Image.Image]) -> list[str]:
        """RGB images -> tags with commas: characters first, then by probability."""
        batch = np.ascontiguousarray(np.stack([self.prepare(image) for image in images]))
        missing = self.batch_size - len(batch)
        if missing > 0 and self.has_fixed_batch:
            batch = np.concatenate([batch, np.repeat(batch[-1:], missing, 0)])
        (scores,) = self.session.run(None, {self.input.name: batch})
        if scores.shape[1] != len(self.tags):
            counts = f"{scores.shape[1]} probabilities for {len(self.tags)} tags"
            raise UserError(
                f"auto_tagging: {self.settings.model_name}: {counts}; {MODEL_FILE} and {TAGS_FILE} belong to"
                " different models"
            )
        return [self.choose(row) for row in scores[: len(images)]]

    def choose(self, scores: np.ndarray) -> str:
        """The tags above their thresholds. scores: (number of tags,)."""
        settings = self.settings
        thresholds = {GENERAL: settings.general_threshold, CHARACTER: settings.character_threshold}
        chosen = []
        for (name, category), score in zip(self.tags, scores, strict=True):
            threshold = thresholds.get(category, np.inf)
            threshold = settings.threshold if threshold is None else threshold
            if score > threshold and normalize_tag(name) not in self.excluded:
                chosen.append((category != CHARACTER, -float(score), name))
        if settings.max_tags is not None:
            chosen = sorted(chosen, key=lambda tag: tag[1])[: settings.max_tags]
        names = [name for _, _, name in sorted(chosen)]
        return ", ".join(spaced_tag(name) if settings.replace_underscore else name for name in names)


def open_session(file: Path, device: str, step: str):
    """An onnxruntime session on "auto", "cuda" or "cpu". Errors: UserError."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if device == "cuda" and "CUDAExecutionProvider" not in available:
        way_out = "install onnxruntime-gpu, or device=cpu"
        raise UserError(f"{step}: device cuda: this onnxruntime has no CUDA; {way_out}")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    providers = [name for name in providers if name in available and (device != "cpu" or "CPU" in name)]
    try:
        return onnxruntime.InferenceSession(file, providers=providers)
    except Exception as error:  # onnxruntime's own kinds have no common base
        raise UserError(f"{step}: {file}: {' '.join(str(error).split())[:200]}") from None


def read_tags(file: Path) -> list[tuple[str, int]]:
    """(name, category) of each row of selected_tags.csv. Errors: UserError if it has no such columns."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not rows[0].keys() >= {"name", "category"}:
        raise UserError(f"auto_tagging: {file}: no columns name and category")
    return [(row["name"], int(row["category"])) for row in rows]


def normalize_tag(tag: str) -> str:
    """A tag for comparison: lower case, spaces for underscores."""
    return tag.strip().lower().replace("_", " ")


def spaced_tag(tag: str) -> str:
    """Underscores as spaces, but for emoticons such as >_< and o_o."""
    return tag.replace("_", " ") if re.search(r"[^\W\d_]{2}", tag) else tag
