"""Settings of a preparation that can't work or would be ignored; and defaults that depend on others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_training.errors import UserError
from lora_training.families import FAMILIES
from lora_training.prepare.settings import STATE_FOLDER, Doctor, Steps

if TYPE_CHECKING:
    from lora_training.prepare.settings import AspectRatioBucketing, ImageResizing, Settings

SMALLEST_BASE_RESOLUTION = 64


def check_settings(settings: Settings, flags: dict[str, object]) -> None:
    """Checks the settings and fills in what depends on others. Errors: UserError with the way out.

    flags: those that stand on the command line.
    """
    check_source(settings)
    if settings.doctor:
        if not flags.keys().isdisjoint(("output_dir", *Steps.model_fields)):
            raise UserError("--doctor changes nothing: leave --output_dir and the steps out")
        return
    for name, field in Doctor.model_fields.items():
        if getattr(settings, name) != field.default:
            ways = "--aspect_ratio_bucketing base_resolution=N or --image_resizing target_resolution=N"
            way_out = f"; {ways} set sizes here" if name == "resolution" else ""
            raise UserError(f"--{name} is read by --doctor alone{way_out}")
    if settings.output_dir is None:
        raise UserError("--output_dir is missing: a folder for the training set")
    if not any(getattr(settings, name) for name in Steps.model_fields):
        raise UserError(f"no step is switched on: give --{', --'.join(Steps.model_fields)}, or --doctor")
    check_output_folder(settings)
    settings.trigger_word = common_trigger_word(settings)
    check_steps(settings)
    fill_defaults(settings, FAMILIES[settings.family].resolution)


def check_source(settings: Settings) -> None:
    """One source of pictures, and masks that can be there."""
    if (settings.data_dir is None) == (settings.dataset_name is None):
        raise UserError("give --data_dir (a folder of pictures) or --dataset_name, one of them")
    if settings.data_dir is not None and not Path(settings.data_dir).is_dir():
        raise UserError(f"--data_dir {settings.data_dir}: no such folder")
    masks = settings.masked_loss
    if masks and settings.dataset_name is not None:
        raise UserError("--masked_loss is for --data_dir: a data set has no masks")
    if masks and not (masks == "alpha" or masks[0] in "-_" or Path(masks).is_dir()):
        what = "neither alpha, nor a folder, nor an end of names such as -mask"
        raise UserError(f"--masked_loss {masks}: {what}")


def check_output_folder(settings: Settings) -> None:
    """The output folder is one of its own: apart from the input, empty, or of an earlier preparation."""
    flag, output = f"--output_dir {settings.output_dir}", Path(settings.output_dir).resolve()
    for source in filter(None, (settings.data_dir, settings.dataset_name)):
        folder = Path(source).resolve()
        is_nested = output.is_relative_to(folder) or folder.is_relative_to(output)
        if folder.exists() and is_nested:
            raise UserError(f"{flag} and the input {source} lie in one another: name another folder")
    if output.exists() and not output.is_dir():
        raise UserError(f"{flag} is a file")
    if output.is_dir() and any(output.iterdir()) and not (output / STATE_FOLDER).is_dir():
        raise UserError(f"{flag} holds files that are not from here: name an empty or another folder")


def common_trigger_word(settings: Settings) -> str | None:
    """The one trigger word that all of the settings name. Errors: UserError for several."""
    named = {step.trigger_word for step in (settings, settings.auto_caption, settings.auto_tagging) if step}
    triggers = sorted(word for word in named if word)
    if len(triggers) > 1:
        raise UserError(f"trigger_word is given as {' and as '.join(triggers)}: name one")
    return triggers[0] if triggers else None


def check_steps(steps: Settings) -> None:
    """Parameters that contradict each other."""
    filtering, resizing, bucketing = steps.image_filtering, steps.image_resizing, steps.aspect_ratio_bucketing
    if filtering and filtering.min_aspect_ratio > filtering.max_aspect_ratio:
        raise UserError("image_filtering: min_aspect_ratio is above max_aspect_ratio")
    if steps.masks and steps.masked_loss == "alpha":
        raise UserError("masks: --masked_loss alpha gives every picture a mask: leave one of the two out")
    if resizing and resizing.target_resolution and bucketing and bucketing.resize_images:
        use_target_area(resizing.target_resolution, bucketing)
    if resizing and resizing.fill != "none":
        check_colour(resizing.fill)


def check_colour(fill: str) -> None:
    """The colour of a border is one that Pillow knows."""
    from PIL import ImageColor

    try:
        ImageColor.getrgb(fill)
    except ValueError:
        way_out = "a name, #rrggbb, or none"
        raise UserError(f"image_resizing: fill {fill!r} is no colour: {way_out}") from None


def use_target_area(target: tuple[int, int], bucketing: AspectRatioBucketing) -> None:
    """With a target_resolution, the buckets that pictures are written at have its area.

    Errors: UserError if they are set to another.
    """
    side = round((target[0] * target[1]) ** 0.5)
    if bucketing.custom_buckets is None and bucketing.base_resolution is None:
        bucketing.base_resolution = max(SMALLEST_BASE_RESOLUTION, side)
        return
    setting, sizes = "custom_buckets", bucketing.custom_buckets
    if sizes is None:
        setting = f"base_resolution {bucketing.base_resolution}"
        sizes = [(bucketing.base_resolution, bucketing.base_resolution)]
    if target not in sizes:
        raise UserError(
            f"image_resizing: target_resolution {target[0]}x{target[1]} has no effect: aspect_ratio_bucketing"
            f" with resize_images writes pictures at its {setting}; leave one of the two out"
        )


def fill_defaults(steps: Steps, side: int) -> None:
    """Fills in sizes, and what bucketing takes over from resizing. side: the family's, in pixels."""
    resizing, bucketing = steps.image_resizing, steps.aspect_ratio_bucketing
    if resizing:
        fill_resizing(resizing, side, has_buckets=bucketing is not None)
    if bucketing:
        bucketing.base_resolution = bucketing.base_resolution or side
        for key, usual in (("interpolation", "lanczos"), ("quality", 95), ("format", "jpg")):
            if getattr(bucketing, key) is None:
                setattr(bucketing, key, getattr(resizing, key) if resizing else usual)


def fill_resizing(resizing: ImageResizing, side: int, has_buckets: bool) -> None:
    """Fills in size and crop; pictures that are cropped to buckets later are not cropped twice."""
    resizing.target_resolution = resizing.target_resolution or (side, side)
    if resizing.crop_position is None:
        resizing.crop_position = "none" if has_buckets else "center"
