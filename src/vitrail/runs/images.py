"""Find and read the images to predict: paths, folders, patterns, lists of paths, and images in memory.

Shapes: H x W pixels, N images.
"""

import glob
from collections.abc import Iterable, Mapping
from io import IOBase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitrail.data.bit_depth import ValueRange
from vitrail.data.images import as_image, load_image, to_rgb
from vitrail.data.sources.files import FolderWalk, is_image
from vitrail.errors import ConfigError, ImageError
from vitrail_runtime.names import readable


def find_images(where: str | Path, key: str = "images") -> list[str]:
    """Return the paths of the image files that `where` refers to.

    Args:
        where: image file, folder (searched at any depth, hidden files left out), pattern such as `shots/*.jpg` or
            `shots/**/*.jpg`, or text file `*.txt` with one path per line, relative to the current folder.
        key: config key of `where`, for error messages.

    Raises:
        ConfigError: there is no such file or folder, or no image in it.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        found = sorted(str(path / name) for name in FolderWalk(path).files["."])
        if not found:
            raise ConfigError(f"{key}={where}: contains no images, at any depth.")
    elif path.suffix == ".txt" and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise ConfigError(f"{key}={where}: is not UTF-8 text; list one path per line.") from None
        found = [str(Path(line.strip()).expanduser()) for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"{key}={where}: lists no images; write one path per line.")
    elif path.exists():
        found = [str(path)]
    elif glob.has_magic(str(path)):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
        found = sorted(name for name in names if is_image(Path(name).name))
        if not found:
            raise ConfigError(f"{key}={where}: no image matches this pattern.")
    else:
        raise ConfigError(f"{key}={where}: no such file or folder.")
    return found


def listed_images(images: Any) -> list[Any]:
    """Return single images from one image, a batch of images, or an iterable of them; a path may be a folder.

    Raises:
        ConfigError: a path refers to no image.
    """
    if isinstance(images, (str, Path)):
        return list(find_images(images))
    if isinstance(images, (np.ndarray, Tensor)):
        return [images] if images.ndim <= 3 else list(images)
    if isinstance(images, Image.Image):
        return [images]
    if not isinstance(images, Iterable) or isinstance(images, (bytes, Mapping, IOBase)):
        raise ConfigError(f"images: {type(images).__name__} is not an image; pass paths, Pillow's, arrays or tensors.")
    return [image for item in images for image in _listed(item)]


def _listed(item: Any) -> list[Any]:
    """Return the images of one item of an iterable; the path of a file is not opened yet."""
    is_file = isinstance(item, (str, Path)) and not Path(item).expanduser().is_dir()
    return [item] if is_file else listed_images(item)


def name_of(image: Any, index: int) -> str:
    """Return the path of an image, or its position if it is in memory."""
    return str(image) if isinstance(image, (str, Path)) else str(index)


def open_image(image: Any, name: str, value_range: ValueRange | None = None) -> Image.Image:
    """Return an image as 8-bit RGB.

    Args:
        image: path; Pillow's image; array (H, W) or (H, W, C); or tensor (H, W) or (C, H, W). C is 1, 3 or 4, and
            floats lie in [0, 1].
        name: name of the image in messages.
        value_range: black and white of images with more than 8 bits per channel; None finds it from each image.

    Raises:
        ImageError: the image cannot be read, or has another shape or type; the message names it.
    """
    if isinstance(image, (str, Path)):
        if Path(image).exists() and not Path(image).is_file():  # reading a pipe would wait for its writer
            raise ImageError(f"{readable(str(image))}: not a regular file.")
        return load_image(image, value_range)
    if isinstance(image, Tensor):
        tensor = image.detach().cpu()
        values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        image = values.transpose(1, 2, 0) if values.ndim == 3 else values
    if isinstance(image, np.ndarray):
        image = _from_array(image, name)
    try:
        return as_image(to_rgb(image, value_range))
    except ImageError as error:
        raise ImageError(f"image {name}: {error}") from None


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    """Return Pillow's image of an array (H, W) or (H, W, C)."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        shape = " x ".join(map(str, array.shape))
        raise ImageError(f"image {name}: has the shape {shape}; make it (H, W, 3) as array, (3, H, W) as tensor.")
    if array.dtype.kind == "f":
        if not (array >= 0).all() or not (array <= 1).all():  # also for NaN
            raise ImageError(
                f"image {name}: floats must lie in [0, 1], from black to white; pass a normalised batch to the network"
                " itself, as .model(batch)."
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8 and not (array.dtype in (np.uint16, np.int32) and array.ndim == 2):
        raise ImageError(f"image {name}: is of type {array.dtype}; make it uint8, or floats in [0, 1].")
    return Image.fromarray(array)
