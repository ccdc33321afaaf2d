"""Decode any image file that Pillow supports to RGB, as an image viewer shows it."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vitrail.errors import ImageError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")


def load_image(path: str | Path) -> Image.Image:
    """Read `path` as an upright 8-bit RGB image.

    The camera's orientation is applied, 16-bit grey is scaled (Pillow would clip it), CMYK and palettes are converted,
    and transparent areas become white, as in most viewers.

    Raises:
        ImageError: the file is missing, truncated or not an image; the message names the file.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's plugins raise many kinds of exceptions for damaged files
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        raise ImageError(f"{path}: not a readable image ({reason.rstrip('.')}).") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey to 8 bits: 16-bit (modes I and I;16) is divided by 257; float (F) is in 0 to 1, or else 0 to 255."""
    values = np.asarray(image, dtype=np.float64)
    scale = (1 / 257) if image.mode != "F" else (255 if values.max(initial=0.0) <= 1 else 1)
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
