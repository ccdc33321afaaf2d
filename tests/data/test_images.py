"""Decoding of real files in all common formats."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from vitrail.data import load_image
from vitrail.data.images import decode_image, image_extensions, read_header, read_image, size_of
from vitrail.data.sources.value_range import find_value_range
from vitrail.errors import ConfigError, ImageError

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


GREY = np.asarray(PHOTOGRAPH.convert("L"), np.float64)


@pytest.mark.parametrize(
    ("name", "values", "white"),
    [
        ("twelve.tif", (GREY * 16).astype(np.uint16), 4095),
        ("ten.png", (GREY * 4).astype(np.uint16), 1023),
        ("sixteen.tif", (GREY * 257).astype(np.uint16), 65535),
        ("integers.tif", (GREY * 257).astype(np.int32), 65535),
        ("signed.tif", (GREY * 128).astype(np.int32), 32767),
        ("bytes.tif", GREY.astype(np.int32), 255),
        ("float.tif", (GREY / 255).astype(np.float32), 1),
        ("rounding.tif", (GREY / 255 + 0.0001).astype(np.float32), 1),
        ("float_bytes.tif", GREY.astype(np.float32), 255),
    ],
)
def test_value_range__found_by_type_and_largest_value(name, values, white, tmp_path):
    Image.fromarray(values).save(tmp_path / name)
    found, count = find_value_range([tmp_path / name])
    assert (found, count) == ((0, white), 1)
    expected = Image.fromarray(np.clip(np.rint(values / white * 255), 0, 255).astype(np.uint8))
    assert difference(tmp_path / name, expected) == 0
    assert np.array_equal(load_image(tmp_path / name, found), load_image(tmp_path / name))


def test_value_range__one_for_all_images(tmp_path):
    """A dark image stays dark: its own maximum does not decide."""
    dark, bright = tmp_path / "dark.tif", tmp_path / "bright.tif"
    Image.fromarray((GREY * 2).astype(np.uint16)).save(dark)
    Image.fromarray((GREY * 16).astype(np.uint16)).save(bright)
    found, _ = find_value_range([dark, bright])
    assert found == (0, 4095)
    assert np.asarray(load_image(dark, found)).max() == pytest.approx(GREY.max() * 2 / 4095 * 255, abs=1)


def test_value_range__given_by_the_user(tmp_path):
    hounsfield = (GREY * 16 - 1000).astype(np.int32)
    Image.fromarray(hounsfield).save(tmp_path / "scan.tif")
    with pytest.raises(
        ConfigError, match=r"data.value_range: values from -\d+ to \d+ \(in .*scan.tif.*set it to \[low"
    ):
        find_value_range([tmp_path / "scan.tif"])
    image = load_image(tmp_path / "scan.tif", (-1000, 3080))
    assert np.abs(np.asarray(image)[..., 0] - GREY).max() <= 1


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.where(GREY[0, 0] == GREY, np.nan, GREY / 255).astype(np.float32), r"the value nan, .*value_range=\[0, 1\]"),
        (np.where(GREY[0, 0] == GREY, 1.5, GREY / 255).astype(np.float32), r"the value 1.5, .*value_range=\[0, 1\]"),
        (np.where(GREY[0, 0] == GREY, -0.1, GREY / 255).astype(np.float32), r"the value -0.1, .*value_range=\[0, 1\]"),
    ],
)
def test_value_range__value_outside_is_refused(values, problem, tmp_path):
    Image.fromarray(values).save(tmp_path / "odd.tif")
    with pytest.raises(ImageError, match=rf"odd.tif: has {problem}"):
        load_image(tmp_path / "odd.tif", (0, 1))


def test_value_range__small_negative_values_are_no_rounding(tmp_path):
    Image.fromarray((GREY / 255 - 0.5).astype(np.float32)).save(tmp_path / "centred.tif")
    with pytest.raises(ConfigError, match="do not show which are black and white"):
        find_value_range([tmp_path / "centred.tif"])
    with pytest.raises(ImageError, match=r"centred.tif: values from .* set data.value_range=\[low, high\]"):
        load_image(tmp_path / "centred.tif")


def test_value_range__integers_and_floats_together(tmp_path):
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "a.tif")
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(ConfigError, match=r"data.value_range: some images contain integers and some floats"):
        find_value_range([tmp_path / "a.tif", tmp_path / "b.tif"])


def test_value_range__none_for_eight_bits(tmp_path):
    PHOTOGRAPH.save(tmp_path / "a.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert find_value_range([tmp_path / "a.jpg", tmp_path / "broken.jpg"]) == (None, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16"])
def test_transparent_colour__becomes_white(mode, tmp_path):
    """PNG can name one transparent colour instead of an alpha channel."""
    right = np.zeros(GREY.shape, bool)
    right[:, 120:] = True
    if mode == "I;16":
        stored, colour = Image.fromarray(np.where(right, 1234, GREY * 257).astype(np.uint16)), 1234
    elif mode == "RGB":
        stored, colour = Image.fromarray(np.where(right[..., None], (1, 2, 3), PHOTOGRAPH).astype(np.uint8)), (1, 2, 3)
    else:
        stored, colour = Image.fromarray(np.where(right, 7, np.maximum(GREY, 8)).astype(np.uint8)), 7
        if mode == "P":
            stored = stored.convert("P")
            colour = stored.getpixel((200, 100))
    stored.save(tmp_path / "keyed.png", transparency=colour)
    found = np.asarray(load_image(tmp_path / "keyed.png"))
    assert (found[:, 120:] == 255).all()
    assert found[:, :120].mean() < 200


@pytest.mark.parametrize(
    "payload",
    [
        b"Exif\0\0garbage",
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x02\0\x12\x01\x03\0\x01\0\0\0\x03\0\0\0\x1a\x01\x0a\0\x01\0\0\0\x26\0\0\0\0\0\0\0"
        b"\xff\xff\xff\xff\0\0\0\0",  # orientation 3, and a rational number with denominator 0
    ],
    ids=["garbage", "empty", "bad rational"],
)
def test_exif__other_entries_do_not_matter(payload, tmp_path):
    upright = "bad rational" if b"\x1a\x01" in payload else ""
    buffer = io.BytesIO()
    (PHOTOGRAPH.rotate(180) if upright else PHOTOGRAPH).save(buffer, "JPEG", quality=95, subsampling=0)
    body = buffer.getvalue()
    segment = b"\xff\xe1" + (len(payload) + 2).to_bytes(2, "big") + payload
    (tmp_path / "camera.jpg").write_bytes(body[:2] + segment + body[2:])
    assert difference(tmp_path / "camera.jpg") < 2.5


def test_extensions__all_that_pillow_decodes():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".tif", ".bmp", ".gif", ".ppm", ".jp2"} <= set(
        image_extensions()
    )
    assert not {".pdf", ".eps", ".mpg", ".h5", ".txt", ".wmf"} & set(image_extensions())


COLOURS = np.asarray(PHOTOGRAPH, np.uint16)


def write_png_of_16_bits(path, values):
    """Write (H, W, 3), or (H, W, 4) with alpha, as PNG of 16 bits per channel, which Pillow cannot write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize(("scale", "white"), [(257, 65535), (16, 4095)])
@pytest.mark.parametrize("kind", ["png", "png with alpha", "tiff", "big-endian tiff", "compressed tiff"])
def test_sixteen_bit_colours__keep_their_low_bytes(kind, scale, white, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values, path = COLOURS * scale, tmp_path / ("a.png" if "png" in kind else "a.tif")
    if kind == "png":
        write_png_of_16_bits(path, values)
    elif kind == "png with alpha":
        write_png_of_16_bits(path, np.dstack([values, np.full(values.shape[:2], 65535, np.uint16)]))
    else:
        order, compression = (">" if "big" in kind else "<"), ("zlib" if "compressed" in kind else None)
        tifffile.imwrite(path, values, photometric="rgb", byteorder=order, compression=compression)
    assert find_value_range([path]) == ((0, white), 1)
    assert difference(path, Image.fromarray(np.rint(values / white * 255).astype(np.uint8))) == 0


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_signed_integers__of_real_files(dtype, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", (GREY * 128).astype(dtype))
    assert np.abs(np.asarray(load_image(tmp_path / "a.tif"))[..., 0] - GREY * 128 / 32767 * 255).max() <= 0.5
    tifffile.imwrite(tmp_path / "b.tif", (GREY * 128 - 1000).astype(dtype))
    with pytest.raises(ImageError, match=r"values from -\d+ to \d+ do not show which are black and white"):
        load_image(tmp_path / "b.tif")


@pytest.mark.parametrize("name", ["a.jpg", "turned.jpg", "deep.png", "palette.gif"])
def test_decode_image__as_load_image_from_bytes(name, tmp_path):
    path, exif = tmp_path / name, Image.Exif()
    if name == "turned.jpg":
        exif[0x0112] = 6
        PHOTOGRAPH.save(path, exif=exif)
    elif name == "deep.png":  # 16-bit colours, whose low bytes are read in a second pass
        write_png_of_16_bits(path, COLOURS * 250 + 100)
    else:
        PHOTOGRAPH.save(path)
    data = path.read_bytes()
    for given in (data, memoryview(data)):
        assert np.array_equal(decode_image(given, "x", "type"), load_image(path, "type"))
    with pytest.raises(ImageError, match=r"^archive.tar: a/b: not a readable image \("):
        decode_image(data[: len(data) // 2], "archive.tar: a/b")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "webp"])
def test_read_header__has_the_size_of_the_upright_image(extension, orientation, tmp_path):
    """Pillow's own size is the upright one for TIFFs and the stored one for others."""
    path, exif = tmp_path / f"image.{extension}", Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    header = read_header(path)
    assert header.size == size_of(read_image(path)) == ((20, 30) if orientation < 5 else (30, 20))
    assert header.is_turned == (orientation != 1)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_read_header__names_what_is_no_image(content, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"broken\.png: not a readable image \("):
        read_header(path)
