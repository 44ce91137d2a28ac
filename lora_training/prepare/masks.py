"""masks: masks for --masked_loss by a segmentation model, for the pictures that have none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter

from lora_training.console import print_status, summarize_names
from lora_training.prepare.captioning import run_in_batches
from lora_training.prepare.pictures import encode_image, short_digest, write_file
from lora_training.prepare.reading import read_mask
from lora_training.prepare.settings import STATE_FOLDER

if TYPE_CHECKING:
    from pathlib import Path

    from lora_training.prepare.pictures import Picture
    from lora_training.prepare.preparation import Preparation
    from lora_training.prepare.settings import Masks

# settings that the masks depend on
MASK_SETTINGS = ("model_type", "prompt", "model_name", "threshold", "soft_edge")


def make_masks(preparation: Preparation) -> None:
    """Gives a mask to each picture without one, by a model or an earlier run.

    A picture in which nothing is found goes without, and counts as a whole.
    """
    settings, journal, pictures = preparation.steps.masks, preparation.journal, preparation.remaining
    values = [getattr(settings, name) for name in MASK_SETTINGS]
    unmasked = [picture for picture in pictures if picture.read_mask is None]
    keys = {picture.name: short_digest(picture.digest, *values) for picture in unmasked}
    files = {name: mask_file(preparation, key) for name, key in keys.items()}

    def is_known(picture: Picture) -> bool:
        found = journal.get("masks", keys[picture.name])
        return found is False or (found is True and files[picture.name].is_file())

    missing = [picture for picture in unmasked if not is_known(picture)]
    if missing:
        print_status(f"masks: loading {settings.model_name}")
        for picture, mask in find_masks(settings, missing, preparation.workers):
            if mask is not None:
                write_file(files[picture.name], encode_image(mask, "png"))
            journal.put("masks", keys[picture.name], mask is not None)
    found = [picture for picture in unmasked if journal.get("masks", keys[picture.name])]
    for picture in found:
        picture.read_mask = files[picture.name].read_bytes
        picture.problem = read_mask(preparation, picture)
    note = f"{len(pictures) - len(unmasked)} kept"
    if empty := [picture.name for picture in unmasked if picture.read_mask is None]:
        what = settings.prompt or settings.model_type
        note += f", no {what} in {summarize_names(empty)}, which count as a whole"
    preparation.note_result("making masks", len(pictures), len(missing), len(unmasked) - len(missing), note)


def mask_file(preparation: Preparation, key: str) -> Path:
    """Where a mask that was made is, as large as the model has seen its picture."""
    return preparation.output / STATE_FOLDER / "masks" / f"{key}.png"


def find_masks(settings: Masks, pictures: list[Picture], workers: int):
    """Yields (picture, its mask or None if nothing was found); torch is imported here, when it is needed."""
    from lora_training.prepare.segmenter import load_segmenter

    model = load_segmenter(settings)
    for picture, (image, probabilities) in run_in_batches(model, pictures, workers, "making masks"):
        mask = soft_mask(probabilities, image.size, settings.threshold, settings.soft_edge)
        yield picture, mask


def soft_mask(
    probabilities: np.ndarray, size: tuple[int, int], threshold: float | None, soft_edge: float
) -> Image.Image | None:
    """Probabilities (H, W) of a model's own size -> a mask (L) of `size`, (width, height).

    threshold: None for the probabilities themselves. soft_edge: standard deviation of the blur, as a share of
    the shorter side. None where nothing counts.
    """
    image = Image.fromarray(probabilities.astype(np.float32))
    values = np.asarray(image.resize(size, Image.Resampling.BILINEAR))
    counting = values > (0.5 if threshold is None else threshold)
    if not counting.any():
        return None
    shares = values if threshold is None else counting
    mask = Image.fromarray((shares * 255.0).round().astype(np.uint8))
    return mask.filter(ImageFilter.GaussianBlur(soft_edge * min(size))) if soft_edge else mask
