"""auto_caption and auto_tagging: pictures described by models, or as earlier runs have described them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_training.console import print_status, summarize_names
from lora_training.data.captions import clean_caption
from lora_training.data.images import decode_image
from lora_training.prepare.parallel import in_parallel
from lora_training.prepare.pictures import short_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from PIL.Image import Image

    from lora_training.prepare.pictures import Picture
    from lora_training.prepare.preparation import Preparation
    from lora_training.prepare.settings import AutoCaption, AutoTagging

MODEL_VIEW = (1024, 1024)  # pixels: no model looks at more

# settings that the texts depend on
CAPTION_SETTINGS = ("model_type", "model_name", "prompt", "task", "max_new_tokens")
TAG_SETTINGS = (
    "model_name",
    "threshold",
    "general_threshold",
    "character_threshold",
    "exclude_tags",
    "replace_underscore",
    "max_tags",
)


def load_captioner(settings: AutoCaption):
    """The model of auto_caption; torch is imported here, once it's known to be needed."""
    from lora_training.prepare.captioner import Captioner

    return Captioner(settings)


def load_tagger(settings: AutoTagging):
    """The model of auto_tagging."""
    from lora_training.prepare.tagger import Tagger

    return Tagger(settings)


def caption_pictures(preparation: Preparation) -> None:
    """auto_caption: describes the pictures that have no caption, or all."""
    settings, pictures = preparation.steps.auto_caption, preparation.remaining
    described = [picture for picture in pictures if settings.overwrite or not picture.captions]
    texts, fresh = describe_pictures(preparation, "auto_caption", described, load_captioner, CAPTION_SETTINGS)
    for picture in described:
        if texts[picture.name]:
            picture.captions, picture.caption_source = [texts[picture.name]], "auto_caption"
    note = f"{len(pictures) - len(described)} kept"
    if empty := [picture.name for picture in described if not texts[picture.name]]:
        note += f", no words for {summarize_names(empty)}"
    preparation.note_result("auto_caption", len(pictures), fresh, len(described) - fresh, note)


def tag_pictures(preparation: Preparation) -> None:
    """auto_tagging: adds tags to the captions, or to pictures that have none."""
    settings, pictures = preparation.steps.auto_tagging, preparation.remaining
    tagged = [picture for picture in pictures if settings.captions != "missing" or not picture.captions]
    texts, fresh = describe_pictures(preparation, "auto_tagging", tagged, load_tagger, TAG_SETTINGS)
    for picture in tagged:
        picture.tags = texts[picture.name]
        if settings.captions == "replace" or not picture.captions:
            picture.captions = [picture.tags] if picture.tags else []
            picture.caption_source = "auto_tagging"
        else:
            picture.captions = [append_tags(caption, picture.tags) for caption in picture.captions]
            picture.caption_source += " + tags"
    note = f"{sum(not picture.tags for picture in tagged)} without a tag"
    preparation.note_result("auto_tagging", len(pictures), fresh, len(tagged) - fresh, note)


def append_tags(caption: str, tags: str) -> str:
    """The caption with the tags that it doesn't have yet after it."""
    present = {tag.strip().lower() for tag in caption.split(",")}
    return ", ".join([caption, *(tag for tag in tags.split(", ") if tag and tag.lower() not in present)])


def describe_pictures(
    preparation: Preparation,
    step: str,
    pictures: list[Picture],
    load_model: Callable,
    relevant_settings: tuple[str, ...],
) -> tuple[dict[str, str], int]:
    """({name of a picture: text}, how many are new), from earlier runs or a model.

    load_model: gives the model of the step's settings, loaded only if a text is missing.
    """
    settings, journal = getattr(preparation.steps, step), preparation.journal
    values = [getattr(settings, name) for name in relevant_settings]
    keys = {picture.name: short_digest(picture.digest, *values) for picture in pictures}
    missing = [picture for picture in pictures if journal.get(step, keys[picture.name]) is None]
    if missing:
        print_status(f"{step}: loading {settings.model_name}")
        model = load_model(settings)
        title = "captioning" if step == "auto_caption" else "tagging"
        for picture, (_, text) in run_in_batches(model, missing, preparation.workers, title):
            journal.put(step, keys[picture.name], clean_caption(text))
    return {picture.name: journal.get(step, keys[picture.name]) for picture in pictures}, len(missing)


def run_in_batches(
    model, pictures: list[Picture], workers: int, title: str
) -> Iterator[tuple[Picture, tuple[Image, Any]]]:
    """Yields (picture, (image, the model's answer to it)); pictures are decoded by threads meanwhile."""
    batch: list[tuple[Picture, Image]] = []
    for number, entry in enumerate(in_parallel(decode_small, pictures, workers, title), 1):
        batch.append(entry)
        if len(batch) == model.batch_size or number == len(pictures):
            answers = model([image for _, image in batch])
            for (picture, image), answer in zip(batch, answers, strict=True):
                yield picture, (image, answer)
            batch = []


def decode_small(picture: Picture) -> Image:
    """The picture for a model to look at, no larger than any reads."""
    image = decode_image(picture.read())
    image.thumbnail(MODEL_VIEW, reducing_gap=2.0)
    return image
