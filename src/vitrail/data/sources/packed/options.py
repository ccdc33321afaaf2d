"""What a pack stores of each image: its file as it is, a smaller JPEG, or pixels.

Shapes: an image has H x W pixels.
"""

from io import BytesIO
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from vitrail.data.images import as_image, decode_image, to_rgb
from vitrail.data.sources.contract import Split


class Stored(NamedTuple):
    """One image as a pack stores it."""

    data: bytes
    shape: tuple[int, int]
    """(H, W) of pixels; (0, 0) for an encoded image."""


class PackOptions(NamedTuple):
    """Options of a pack that decide what is stored."""

    size: int | None = None
    """Largest shorter side in pixels; None keeps every image's size."""
    format: Literal["jpeg", "raw"] = "jpeg"
    quality: int = 90
    """JPEG quality of resized images, 1 to 100."""

    @classmethod
    def read(cls, saved: dict[str, Any]) -> "PackOptions":
        """Return the options that `saved` describes."""
        return cls(None if saved["size"] == "original" else saved["size"], saved["format"], saved.get("quality", 90))

    def saved(self) -> dict[str, Any]:
        """Return the options as they stand in a config; the quality only if it has an effect."""
        options: dict[str, Any] = {"size": "original" if self.size is None else self.size, "format": self.format}
        return options | ({"quality": self.quality} if self.format == "jpeg" and self.size is not None else {})

    def describe(self) -> str:
        """Describe the stored pixels in one line; empty if they are those of the original files."""
        if self.size is None:
            return ""
        jpeg = f", and resized images are JPEGs of quality {self.quality}" if self.format == "jpeg" else ""
        return f"shorter sides above {self.size} pixels were resized to {self.size} (bicubic){jpeg}"

    def store(self, split: Split, index: int, verify: bool = True) -> Stored:
        """Return what the pack stores of an image.

        Args:
            split: the split of the image.
            index: index of the image.
            verify: decode images whose file is copied unchanged, to find damaged ones.

        Raises:
            ImageError: the image cannot be read; the message names it.
        """
        value_range: Any = getattr(split, "value_range", "type")
        read = getattr(split, "encoded", None)
        encoded = None if read is None else read(index)
        if encoded is not None and self.size is None and self.format == "jpeg" and not verify:
            return Stored(encoded.data, (0, 0))
        if encoded is None:
            picture = to_rgb(split[index].image, value_range)
        else:
            picture = decode_image(encoded.data, encoded.name, value_range)
        image = as_image(picture)
        resized = _resized(image, self.size)
        if self.format == "raw":
            pixels = np.asarray(resized)
            return Stored(pixels.tobytes(), (pixels.shape[0], pixels.shape[1]))
        if resized is image and encoded is not None:
            return Stored(encoded.data, (0, 0))
        stream = BytesIO()
        if resized is image:  # there is no file: keep the pixels without loss
            resized.save(stream, "PNG")
        else:
            resized.save(stream, "JPEG", quality=self.quality)
        return Stored(stream.getvalue(), (0, 0))


def _resized(image: Image.Image, size: int | None) -> Image.Image:
    """Resize the shorter side to `size` pixels, if it is longer."""
    short = min(image.size)
    if size is None or short <= size:
        return image
    width, height = (max(1, round(side * size / short)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
