"""Where pictures are scaled and cropped: the geometry of image_resizing and of buckets.

`steps` are the settings of all steps, `resizing` those of image_resizing alone. A target is the bucket that
a picture is cropped to, (width, height), or None.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from lora_training.prepare.pictures import Picture
    from lora_training.prepare.settings import ImageResizing, Steps

POSITIONS = {  # of a crop, as shares of what is cut away: (left, top)
    "center": (0.5, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
}
Size = tuple[int, int]  # (width, height)


def keeps_aspect_ratio(resizing: ImageResizing) -> bool:
    """Whether image_resizing only scales, without a crop or a border."""
    return (resizing.crop_position if resizing.mode == "cover" else resizing.fill) == "none"


def resized_size(size: Size, resizing: ImageResizing) -> Size:
    """The size of a picture after image_resizing."""
    if keeps_aspect_ratio(resizing):
        return scaled_size(size, resizing.target_resolution, resizing.mode)
    return resizing.target_resolution


def scaled_size(size: Size, box: Size, mode: str) -> Size:
    """`size` scaled, its aspect ratio kept, so that it just covers the box, or is just contained in it."""
    scales = box[0] / size[0], box[1] / size[1]
    if mode == "cover":
        scale = max(scales)
        return max(box[0], round(size[0] * scale)), max(box[1], round(size[1] * scale))
    scale = min(scales)
    return max(1, min(box[0], round(size[0] * scale))), max(1, min(box[1], round(size[1] * scale)))


def crop_box(size: Size, target: Size, position: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the part of `size` that a crop to `target` leaves."""
    u, v = POSITIONS[position]
    left, top = round((size[0] - target[0]) * u), round((size[1] - target[1]) * v)
    return left, top, left + target[0], top + target[1]


def scale_and_crop(image: Image.Image, target: Size, interpolation: str, position: str) -> Image.Image:
    """The image scaled to cover `target` and cropped to it; what is cut away is never computed."""
    size = scaled_size(image.size, target, "cover")
    box = crop_box(size, target, position)
    if size == image.size:
        return image.crop(box) if target != size else image
    x, y = image.width / size[0], image.height / size[1]
    source_box = box[0] * x, box[1] * y, box[2] * x, box[3] * y
    return image.resize(target, getattr(Image.Resampling, interpolation.upper()), box=source_box)


def resize_image(image: Image.Image, resizing: ImageResizing) -> Image.Image:
    """image_resizing of one picture, or of its mask, whose border is 0: not trained."""
    target = resizing.target_resolution
    if resizing.mode == "cover" and not keeps_aspect_ratio(resizing):
        return scale_and_crop(image, target, resizing.interpolation, resizing.crop_position)
    size = scaled_size(image.size, target, resizing.mode)
    if image.size != size:
        image = image.resize(size, getattr(Image.Resampling, resizing.interpolation.upper()))
    if keeps_aspect_ratio(resizing):
        return image
    canvas = Image.new(image.mode, target, resizing.fill if image.mode == "RGB" else 0)
    canvas.paste(image, ((target[0] - image.width) // 2, (target[1] - image.height) // 2))
    return canvas


def resize_and_crop(image: Image.Image, steps: Steps, target: Size | None) -> Image.Image:
    """A picture or its mask after image_resizing, cropped to its bucket."""
    resizing, bucketing = steps.image_resizing, steps.aspect_ratio_bucketing
    if resizing is not None and not (target and makes_resizing_needless(image.size, resizing, target)):
        image = resize_image(image, resizing)
    if target is not None:
        image = scale_and_crop(image, target, bucketing.interpolation, bucketing.crop_position)
    return image


def makes_resizing_needless(size: Size, resizing: ImageResizing, target: Size) -> bool:
    """Whether cropping the source to its bucket gives the same picture, scaled once.

    It does where image_resizing leaves the whole picture, no smaller than the bucket.
    """
    width, height = resized_size(size, resizing)
    return keeps_aspect_ratio(resizing) and target[0] <= width and target[1] <= height


def visible_part(picture: Picture, steps: Steps, target: Size | None) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what both crops leave of a picture, as shares of its sides."""
    resizing, bucketing = steps.image_resizing, steps.aspect_ratio_bucketing
    left, top, right, bottom = 0.0, 0.0, 1.0, 1.0
    if resizing and resizing.mode == "cover" and not keeps_aspect_ratio(resizing):
        left, top, right, bottom = cropped_shares(
            picture.size, resizing.target_resolution, resizing.crop_position
        )
    if target is not None:
        shares = cropped_shares(picture.resized, target, bucketing.crop_position)
        width, height = right - left, bottom - top
        right, bottom = left + width * shares[2], top + height * shares[3]
        left, top = left + width * shares[0], top + height * shares[1]
    return left, top, right, bottom


def cropped_shares(size: Size, target: Size, position: str) -> tuple[float, float, float, float]:
    """What a crop to `target` leaves, as shares of the sides."""
    width, height = scaled_size(size, target, "cover")
    left, top, right, bottom = crop_box((width, height), target, position)
    return left / width, top / height, right / width, bottom / height
