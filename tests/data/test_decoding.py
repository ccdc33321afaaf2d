"""JPEGs decoded by libjpeg-turbo have Pillow's pixels."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageCms

from vitrail.data import jpeg
from vitrail.data.images import as_array, as_image, decode_image, load_image, read_image
from vitrail.errors import ImageError

simplejpeg = pytest.importorskip("simplejpeg")


def photograph(mode="RGB", size=(123, 77)):
    from skimage.data import astronaut

    return Image.fromarray(astronaut()).crop((100, 50, 100 + size[0], 50 + size[1])).convert(mode)


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def pillows(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def turbo(monkeypatch):
    """Count the images that libjpeg-turbo decodes."""
    decoded = []

    def counting(data, colours):
        decoded.append(len(data))
        return simplejpeg.decode_jpeg(data, colours)

    monkeypatch.setattr(jpeg, "_decode_jpeg", counting)
    return decoded


@pytest.mark.parametrize("size", [(123, 77), (64, 64), (1, 1), (17, 3), (8, 200)])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *(
            ("RGB", {"subsampling": subsampling, "progressive": progressive, "quality": quality})
            for subsampling, progressive, quality in itertools.product(range(3), (False, True), (30, 90, 100))
        ),
        ("L", {"quality": 80}),
        ("L", {"progressive": True}),
        ("RGB", {"optimize": True, "restart_marker_rows": 1}),
        ("RGB", {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}),
        ("RGB", {"keep_rgb": True}),
        ("CMYK", {}),
    ],
)
def test_jpeg__pillows_pixels(mode, options, size, turbo):
    data = encoded(photograph(mode, size), **options)
    assert np.array_equal(as_array(decode_image(data, "x.jpg")), pillows(data))
    assert len(turbo) == (mode != "CMYK" and "keep_rgb" not in options)


@pytest.mark.parametrize("options", [{}, {"icc_profile": bytes(200_000)}, {"comment": b"Exif\0\0"}])
def test_jpeg__exif_is_found_among_the_segments(options):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert not jpeg._has_exif(encoded(photograph(), **options))
    assert jpeg._has_exif(encoded(photograph(), exif=exif, **options))
    assert jpeg._has_exif(encoded(photograph())[:10])  # cut short: Pillow decides


@pytest.mark.parametrize("orientation", range(9))
def test_jpeg__orientation_is_applied(orientation, turbo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photograph(), exif=exif, quality=95)
    upright = as_array(decode_image(data, "x.jpg"))
    assert upright.shape[:2] == ((77, 123) if orientation < 5 else (123, 77))
    if orientation == 1:
        assert len(turbo) == 1
        assert np.array_equal(upright, pillows(data))


def test_jpeg__damaged_files_are_judged_by_pillow(turbo, tmp_path):
    data = encoded(photograph(size=(200, 200)), quality=95)
    with pytest.raises(ImageError, match=r"cut\.jpg: not a readable image"):
        decode_image(data[: len(data) // 2], "cut.jpg")
    with pytest.raises(ImageError, match=r"empty\.jpg: not a readable image"):
        decode_image(b"", "empty.jpg")
    with pytest.raises(ImageError, match="no such file"):
        read_image(tmp_path / "missing.jpg")
    followed = data + b"\0" * 100  # bytes after the end do not matter
    assert np.array_equal(as_array(decode_image(followed, "x.jpg")), pillows(data))


def test_jpeg__under_another_name(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(tmp_path / "really_a.png", "JPEG")
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(tmp_path / "really_a.jpg", "PNG")
    assert as_array(read_image(tmp_path / "really_a.jpg")).max() == 9
    assert as_array(read_image(tmp_path / "really_a.png")).max() == 7


def test_jpeg__without_simplejpeg(monkeypatch):
    data = encoded(photograph())
    monkeypatch.setattr(jpeg, "_decode_jpeg", None)
    picture = decode_image(data, "x.jpg")
    assert isinstance(picture, Image.Image)
    assert np.array_equal(as_array(picture), pillows(data))


def test_load_image__always_pillows(tmp_path):
    photograph().save(tmp_path / "x.jpg")
    assert isinstance(load_image(tmp_path / "x.jpg"), Image.Image)
    assert as_image(read_image(tmp_path / "x.jpg")).size == (123, 77)
