"""Image files decoded to upright sRGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps

# by the kind of colours that a profile is for: Pillow's mode of such images, and those that become it
MODES_OF_PROFILES = {
    "RGB": ("RGB", "RGBA", "P", "PA", "L", "LA", "1"),
    "GRAY": ("L", "LA", "1"),
    "CMYK": ("CMYK",),
}


def decode_image(raw: bytes):
    """Bytes of an image file -> upright RGB image. Errors: ValueError with the reason in plain words."""
    try:
        return to_rgb(Image.open(io.BytesIO(raw)))
    except Image.DecompressionBombError:
        raise ValueError(f"more than {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels") from None
    except Exception as error:  # Pillow's readers raise a dozen kinds for damaged files
        text = str(error)
        raise ValueError("not an image" if "cannot identify" in text else f"damaged ({text})") from None


def to_rgb(image):
    """An upright sRGB image: EXIF rotation and colour profile applied, transparency laid on white, 16 bit
    brought to 8.
    """
    image = to_srgb(to_8_bits(ImageOps.exif_transpose(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_8_bits(image):
    """A grey image of integers or floats in 8 bits, others as they are.

    White is 255, or 65535 where a value is above that, or 1 where no float is. Errors: ValueError for values
    that aren't finite.
    """
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("values that are no numbers")
    largest = values.max()
    white = 65535 if largest > 255 else 1 if image.mode == "F" and largest <= 1 else 255
    scaled = Image.fromarray((values / white * 255).round().clip(0, 255).astype(np.uint8))
    scaled.info["icc_profile"] = image.info.get("icc_profile")
    return scaled


def to_srgb(image):
    """An image with the colours that its profile means (phones: Display P3), in sRGB; transparency stays.

    One without a profile, or with one for another kind of colours than its own, stays as it is.
    """
    profile, alpha = image.info.get("icc_profile"), None
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        kind = source.profile.xcolor_space.strip()
        has_kind = image.mode in MODES_OF_PROFILES.get(kind, ())
        if not has_kind or (kind == "RGB" and ImageCms.getProfileDescription(source).startswith("sRGB")):
            return image
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
        colors = image.convert(MODES_OF_PROFILES[kind][0])
        image = ImageCms.profileToProfile(colors, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a broken profile
        return image
    if alpha is not None:
        image.putalpha(alpha)
    return image
