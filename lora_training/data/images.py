"""Image files decoded to upright sRGB."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageCms, ImageOps


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
    image = to_srgb(ImageOps.exif_transpose(image))
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        image = Image.fromarray((values / top * 255).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_srgb(image):
    """An RGB or CMYK image with the colours that its profile means (phones: Display P3), in sRGB; others as
    they are.
    """
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "CMYK"):
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if image.mode == "RGB" and ImageCms.getProfileDescription(source).startswith("sRGB"):
            return image
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # a broken profile, or one for another mode
        return image
