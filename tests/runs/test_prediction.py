"""`TrainedModel.predict`: the same for paths, Pillow's images, arrays and tensors, as a plain timm loop."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from vitrail.errors import ConfigError, ImageError
from vitrail.models import create_model
from vitrail.runs.images import find_images, open_image
from vitrail.runs.trained_model import TrainedModel
from vitrail.types import InputSpec


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = create_model("deit_nano_distilled", 3, 32, depth=2).eval()
    for head in (model.head, model.head_dist):
        torch.nn.init.normal_(head.weight, std=0.5)
    spec = InputSpec((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), "bicubic", 0.9)
    return TrainedModel(model, spec, ["ant", "bee", "cat"], {"model": {}}, "raw", ("raw",))


def plain(trained, files):
    """Return the probabilities (N, C) by a loop with timm's transform."""
    spec = trained.input
    transform = create_transform(
        32, mean=spec.mean, std=spec.std, crop_pct=spec.crop_pct, interpolation=spec.interpolation
    )
    with torch.inference_mode():
        return torch.stack([trained.model(transform(Image.open(file))[None])[0].softmax(-1) for file in files])


def chances(trained, predictions):
    """Return the probabilities (N, C) of predictions in the order of the classes."""
    rows = [dict(zip(item.classes, item.probabilities, strict=True)) for item in predictions]
    return torch.tensor([[row[name] for name in trained.classes] for row in rows])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_predict__equals_a_plain_loop(trained, image_tree, num_workers):
    files = sorted(image_tree.rglob("*.jpg"))
    expected = plain(trained, files)
    found = trained.predict(image_tree, batch_size=5, num_workers=num_workers)
    assert [item.image for item in found] == [str(file) for file in files]
    torch.testing.assert_close(chances(trained, found), expected, atol=1e-5, rtol=0)
    assert all(item.probabilities == sorted(item.probabilities, reverse=True) for item in found)
    best = trained.predict(files, top_k=1)
    assert [item.classes for item in best] == [[trained.classes[index]] for index in expected.argmax(1)]


def test_predict__images_in_memory_equal_files(trained, image_tree):
    files = sorted(image_tree.glob("val/*/*.jpg"))
    expected = plain(trained, files)
    pictures = [Image.open(file) for file in files]
    arrays = [np.asarray(picture) for picture in pictures]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    everything = (pictures, arrays, np.stack(arrays), tensors, torch.stack(tensors), torch.stack(tensors) / 255)
    for images in everything:
        found = trained.predict(images)
        assert [item.image for item in found] == [str(number) for number in range(len(files))]
        torch.testing.assert_close(chances(trained, found), expected, atol=1e-5, rtol=0)
    for single in (str(files[0]), pictures[0], arrays[0], tensors[0], iter(pictures[:1])):
        torch.testing.assert_close(chances(trained, trained.predict(single)), expected[:1], atol=1e-5, rtol=0)


def test_open_image__grey_and_deep_arrays():
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    expected = np.repeat(grey[..., None], 3, axis=2)
    for image in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None], expected):
        assert np.array_equal(np.asarray(open_image(image, "0")), expected)
    deep = grey.astype(np.uint16) * 257
    assert np.array_equal(np.asarray(open_image(deep, "0", (0, 65535))), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 2, 5), np.uint8), r"image 0: has the shape 2 x 2 x 5"),
        (torch.full((3, 4, 4), 1.5), r"image 0: floats must lie in \[0, 1\]"),
        (torch.full((3, 4, 4), torch.nan), r"image 0: floats must lie in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.int64), "image 0: is of type int64"),
        ("/nowhere.jpg", "nowhere.jpg: not a readable image"),
    ],
)
def test_predict__unreadable_image(trained, image, message):
    with pytest.raises(ImageError, match=message):
        trained.predict([image])


def test_predict__refuses(trained):
    for images, message in (
        (3, "images: int is not an image"),
        (b"bytes of a file", "images: bytes is not an image"),
        ({"a": 1}, "images: dict is not an image"),
        (BytesIO(), "images: BytesIO is not an image"),
        ("/nowhere", "images=/nowhere: no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            trained.predict(images)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "cuda:99"}, "device=cuda:99"),
        ({"top_k": "a"}, "top_k=a: must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
        ({"num_workers": "x"}, "num_workers=x: must be an integer of at least 0 or null"),
        ({"precision": "int8"}, "precision=int8: must be one of fp32, bf16, fp16"),
    ],
)
def test_predict__refuses_options(trained, option, message):
    with pytest.raises(ConfigError, match=message):
        trained.predict(np.zeros((4, 4, 3), np.uint8), **option)


def test_find_images__folder_pattern_and_list(image_tree, tmp_path):
    (image_tree / "val" / ".hidden.jpg").touch()
    (image_tree / "val" / "notes.md").touch()
    everything = sorted(str(file) for file in image_tree.glob("val/*/*.jpg"))
    assert find_images(image_tree / "val") == everything
    assert find_images(f"{image_tree}/val/flower/*") == everything[:3]
    assert find_images(f"{image_tree}/val/**/*.jpg") == everything
    assert find_images(everything[1]) == [everything[1]]
    listed = tmp_path / "list.txt"
    listed.write_text(f"{everything[2]}\n\n  /missing.jpg\n")
    assert find_images(listed) == [everything[2], "/missing.jpg"]


def test_find_images__refuses(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xff\n")
    for where, message in (
        (tmp_path / "empty", "contains no images"),
        (tmp_path / "list.txt", "lists no images"),
        (tmp_path / "latin.txt", "is not UTF-8 text"),
        (tmp_path / "*.gif", "no image matches"),
        (tmp_path / "nowhere", "no such file or folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_images(where)
