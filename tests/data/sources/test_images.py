"""Decoding of real files in all common formats."""

import io

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from vitrail.data import load_image
from vitrail.errors import ImageError

PHOTOGRAPH = Image.fromarray(load_sample_images().images[1]).crop((100, 50, 340, 230))  # 240 x 180


def difference(path, expected=PHOTOGRAPH):
    """Return the mean absolute difference in grey levels."""
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", expected.size)
    return np.abs(np.asarray(image, np.float64) - np.asarray(expected.convert("RGB"), np.float64)).mean()


@pytest.mark.parametrize(
    ("name", "mode", "options", "tolerance"),
    [
        ("a.jpg", "RGB", {"quality": 95, "subsampling": 0}, 2),
        ("progressive.JPEG", "RGB", {"quality": 95, "progressive": True, "subsampling": 0}, 2),
        ("cmyk.jpg", "CMYK", {"quality": 95}, 2.5),
        ("a.png", "RGB", {}, 0),
        ("opaque.png", "RGBA", {}, 0),
        ("lossless.webp", "RGB", {"lossless": True}, 0),
        ("lossy.webp", "RGB", {"quality": 90}, 3),
        ("a.bmp", "RGB", {}, 0),
        ("a.tiff", "RGB", {}, 0),
        ("palette.png", "P", {}, 6),
        ("a.gif", "P", {}, 6),
    ],
)
def test_formats__decode_to_the_same_image(name, mode, options, tolerance, tmp_path):
    stored = PHOTOGRAPH.quantize(256) if mode == "P" else PHOTOGRAPH.convert(mode)
    stored.save(tmp_path / name, **options)
    assert difference(tmp_path / name) <= tolerance


@pytest.mark.parametrize("name", ["grey.png", "grey.tiff"])
def test_sixteen_bits__scaled_not_clipped(name, tmp_path):
    grey = np.asarray(PHOTOGRAPH.convert("L"), np.uint16)
    Image.fromarray(grey * 257).save(tmp_path / name)
    assert difference(tmp_path / name, PHOTOGRAPH.convert("L")) == 0


def test_floating_point__range_zero_to_one(tmp_path):
    grey = np.asarray(PHOTOGRAPH.convert("L"), np.float32) / 255
    Image.fromarray(grey).save(tmp_path / "float.tiff")
    assert difference(tmp_path / "float.tiff", PHOTOGRAPH.convert("L")) == 0


def test_one_bit__black_and_white(tmp_path):
    PHOTOGRAPH.convert("1").save(tmp_path / "bits.png")
    assert difference(tmp_path / "bits.png", PHOTOGRAPH.convert("1")) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif__rotated_upright(orientation, tmp_path):
    """Apply the orientation tag, with which cameras store rotated images."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = PHOTOGRAPH.transpose(back[orientation]) if orientation > 1 else PHOTOGRAPH
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "camera.jpg", exif=exif, quality=95)
    assert difference(tmp_path / "camera.jpg") < 2.5


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparency__becomes_white(mode, tmp_path):
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    if mode == "P":
        image = image.quantize(2)
        image.save(tmp_path / "a.png", transparency=image.getpixel((0, 0)))
    else:
        image.convert(mode).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png")).min() >= 254


def test_damaged_image__error_names_the_file(tmp_path):
    buffer = io.BytesIO()
    PHOTOGRAPH.save(buffer, "JPEG")
    for name, content in (("cut.jpg", buffer.getvalue()[:3000]), ("text.jpg", b"no image"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=rf"{name}: not a readable image \(.+\)\.$"):
            load_image(tmp_path / name)
    with pytest.raises(ImageError, match=r"gone.jpg: not a readable image \(no such file\)\.$"):
        load_image(tmp_path / "gone.jpg")
