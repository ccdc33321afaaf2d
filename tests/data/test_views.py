"""Views: the recorded geometry matches the pixels, and label maps follow it."""

import numpy as np
import pytest
import torch
from PIL import Image

from peers.recorded import recorded
from vitrail.data import Augmentation, MixToken
from vitrail.data.dataset import TrainingTransform, ViewDataset
from vitrail.data.label_maps import LabelMapJoin, LabelMapStore, token_targets
from vitrail.data.render import PILRenderer
from vitrail.data.sampling import Draw
from vitrail.data.views import geometry
from vitrail.errors import ConfigError
from vitrail.types import Geometry, InputSpec, Sample

PIXELS = InputSpec((56, 56), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def position_image(width, height):
    """Return an image whose red is the column, green the row (0 to 255), and blue 255 everywhere."""
    x = np.broadcast_to(np.linspace(0, 255, width)[None], (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack((x, y, 0 * x + 255), axis=-1).round().astype(np.uint8))


class TwoImages:
    """Split of two images that are not square."""

    labels = np.array([0, 1])

    def __init__(self):
        self.images = [position_image(200, 120), position_image(90, 150)]

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return Sample(self.images[index], index, f"c/{index}")

    def keys(self):
        return ["c/0", "c/1"]


def transform_of(augment, hflip=0.5):
    return TrainingTransform(augment.views(PIXELS, hflip), PILRenderer(PIXELS), warps=augment.warp_label_maps)


def test_view__matches_the_origin_of_the_pixels():
    transform = transform_of(Augmentation())
    for draw in range(40):
        view = transform.views.draw_view((300, 400), draw)
        pixels, (x1, y1, x2, y2) = transform.renderer(position_image(400, 300), view), geometry(view).box
        across = pixels[0].mean(0)  # red along a row
        seen = 1 - across if geometry(view).flipped else across  # columns of the mirrored image count from its right
        step = (x2 - x1) / 56
        assert seen[0].item() == pytest.approx(x1 + step / 2, abs=0.02)
        assert seen[-1].item() == pytest.approx(x2 - step / 2, abs=0.02)
        down = pixels[1].mean(1)
        assert down[0].item() == pytest.approx(y1 + (y2 - y1) / 112, abs=0.02)
        assert down[-1].item() == pytest.approx(y2 - (y2 - y1) / 112, abs=0.02)


def position_maps(axis, cells, folder, center_square_maps="placed", **about):
    """Return label maps of the two images, in which the class of a cell is its column (or row)."""
    position = np.arange(cells)
    classes = np.broadcast_to(position[None, :] if axis == "column" else position[:, None], (cells, cells))
    writer = LabelMapStore.create(folder, 2, 1, (cells, cells), cells, ["c/0", "c/1"], **about)
    for index in range(2):
        writer.write(index, np.full((1, cells, cells), 40.0), classes[None])
    names = [str(cell) for cell in range(cells)]
    return LabelMapJoin(writer.finish(), ["c/0", "c/1"], names, center_square_maps=center_square_maps)


def targets_and_pixels(transform, axis, cells, folder, epochs):
    """Return per token: origin by targets, origin by pixels, share of image, highest probability."""
    dataset = ViewDataset(TwoImages(), transform, seed=1, maps=position_maps(axis, cells, folder))
    results = []
    for epoch in range(epochs):
        samples = [dataset[Draw(index, epoch, False)] for index in range(2)]
        maps = torch.utils.data.default_collate([sample.label_map for sample in samples])
        targets = token_targets(*maps, grid=(7, 7), num_classes=cells, smoothing=0.0).tokens  # (2, 49, cells)
        expected = (targets @ (torch.arange(cells) + 0.5)) / cells
        seen = torch.nn.functional.avg_pool2d(torch.stack([sample.image for sample in samples]), 8).flatten(2)
        results.append((expected, seen[:, 0 if axis == "column" else 1], seen[:, 2], targets.amax(-1)))
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("axis", ["column", "row"])
def test_token_targets__match_the_pixels_of_their_token(axis, tmp_path):
    transform = transform_of(Augmentation())
    expected, seen, _, _ = targets_and_pixels(transform, axis, 36, tmp_path / "maps", epochs=20)
    assert (expected - seen).abs().mean() < 0.02, "half a cell is 0.014"
    assert (expected - seen).abs().max() < 0.06


@pytest.mark.parametrize("crop_last", [True, False])
@pytest.mark.parametrize("axis", ["column", "row"])
def test_token_targets__follow_rotations_shears_and_shifts(axis, crop_last, tmp_path):
    """Apply two operations to every image, at RandAugment's strength; the empty area has no class."""
    augment = Augmentation(scale=(0.5, 1.0), auto_augment="rand-n2-m9-mstd0.5-inc1", crop_last=crop_last)
    transform = transform_of(augment)
    geometric = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
    policy = transform.views.policy
    policy.operations = [part._replace(prob=1.0) for part in policy.operations if part.name in geometric]
    expected, seen, blue, highest = targets_and_pixels(transform, axis, 36, tmp_path / "maps", epochs=60)
    whole, empty = blue > 0.999, blue < 0.001
    assert whole.float().mean() > 0.4
    assert empty.float().mean() > 0.05
    errors = (expected - seen)[whole].abs()
    assert errors.mean() < 0.02, "half a cell is 0.014"
    assert errors.quantile(0.99) < 0.06
    assert highest[empty].median() == pytest.approx(1 / 36, abs=1e-3)
    assert (highest[empty] < 0.1).float().mean() > 0.9, (
        "tokens at the border of the empty area overlap cells of the image"
    )


@pytest.mark.parametrize(("center_square_maps", "x"), [("placed", (0.2, 0.8)), ("stretched", (0.0, 1.0))])
def test_join__maps_of_the_central_square(center_square_maps, x, tmp_path):
    """The first image has 200 x 120 pixels, so its central square starts at a fifth of its width."""
    maps = position_maps("column", 60, tmp_path / "maps", center_square_maps, coverage="center square")
    made = maps(0, 0, Geometry((0.0, 0.0, 1.0, 1.0), False), (200, 120))
    labelled = made.scores[0].bool()
    columns = (torch.arange(60) + 0.5) / 60
    torch.testing.assert_close(labelled.any(0), (columns > x[0]) & (columns < x[1]))
    seen = (made.classes[0, 30][labelled[30]] + 0.5) / 60 * (x[1] - x[0]) + x[0]
    torch.testing.assert_close(seen, columns[labelled[30]], atol=0.01, rtol=0)


def test_view__no_warps_if_turned_off():
    augment = Augmentation(auto_augment="rand-n2-m9-mstd0.5-inc1", warp_label_maps=False)
    views = [augment.views(PIXELS, 0.5).draw_view((60, 90), draw) for draw in range(20)]
    assert not any(geometry(view, augment.warp_label_maps).warps for view in views)
    assert any(geometry(view).warps for view in views)


def store_of(path, keys, num_classes=3, value=5.0):
    writer = LabelMapStore.create(path, len(keys), 2, (2, 2), num_classes, keys)
    for index in range(len(keys)):
        writer.write(index, np.full((2, 2, 2), value), np.array([1, 2])[:, None, None].repeat(2, 1).repeat(2, 2))
    return writer.finish()


def test_join__finds_keys_in_any_order(tmp_path):
    store = store_of(tmp_path / "maps", ["c/1", "x/9", "c/0"])
    assert LabelMapJoin(store, ["c/0", "c/1"], list("abc")).records.tolist() == [2, 0]
    assert LabelMapJoin(store, ["c/1", "x/9", "c/0"], list("abc")).records.tolist() == [0, 1, 2]


def test_join__missing_maps(tmp_path, caplog):
    store = store_of(tmp_path / "maps", ["c/0"])
    with pytest.raises(ConfigError, match=r"1 of 2 images have no map, the first is c/1; .*data.on_missing_map=ignore"):
        LabelMapJoin(store, ["c/0", "c/1"], list("abc"))
    with caplog.at_level("WARNING"):
        join = LabelMapJoin(store, ["c/0", "c/1"], list("abc"), on_missing="ignore")
    assert "1 of 2 images have no label map" in caplog.text
    view = geometry(Augmentation().views(PIXELS, 0.5).draw_view((80, 80), 0))
    maps = torch.utils.data.default_collate([join(0, 0, view, (80, 80)), join(1, 2, view, (80, 80))])
    targets = token_targets(*maps, grid=(2, 2), num_classes=3, smoothing=0.0)
    torch.testing.assert_close(targets.tokens[1], torch.tensor([0.0, 0, 1]).expand(4, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(targets.cls[0], torch.tensor([0.0, 5, 5]).softmax(0))


def test_join__maps_of_other_data(tmp_path):
    store = store_of(tmp_path / "maps", ["c/0"])
    with pytest.raises(ConfigError, match="the maps have 3 classes, the data has 5"):
        LabelMapJoin(store, ["c/0"], list("abcde"))
    with pytest.raises(
        ConfigError, match="contains no map of any image; its keys look like c/0, the images' keys like train/c/0"
    ):
        LabelMapJoin(store, ["train/c/0"], list("abc"))
    with pytest.raises(ConfigError, match=r"on_missing=skip: must be one of error, ignore"):
        LabelMapJoin(store, ["c/0"], list("abc"), on_missing="skip")


@pytest.mark.parametrize(
    ("augment", "key"),
    [
        ({"vflip": 0.5}, "augment.vflip"),
        ({"enabled": False}, "augment.enabled"),
        ({"shift": 0.1}, "augment.shift"),
        ({"auto_augment": "augmix-m5"}, "augment.auto_augment=augmix-m5: label maps cannot follow AugMix"),
    ],
)
def test_view__unsupported_augmentation(augment, key):
    with pytest.raises(ConfigError, match=key):
        Augmentation(**augment).check_label_maps()


@pytest.mark.parametrize(
    "case", recorded("token_label_loss.json")["mixtoken_boxes"], ids=lambda case: str(case["np_seed"])
)
def test_mixtoken__draws_the_official_boxes(case):
    random = np.random.RandomState(case["np_seed"])
    grid = tuple(case.get("grid_hw") or [case["grid"]] * 2)
    for _, x1, y1, x2, y2 in case["draws_lam_x1_y1_x2_y2"]:
        assert MixToken().draw(grid, random) == (x1, y1, x2, y2)


def test_mixtoken__box_depends_only_on_key_and_share_matches_box():
    mixing = MixToken()
    boxes = [mixing.box((14, 20), (0, step, 0)) for step in range(50)]
    for step, (box, share) in enumerate(boxes):
        again, _ = mixing.box((14, 20), (0, step, 0))
        assert box.tolist() == again.tolist()
        top, left, bottom, right = box.tolist()
        assert 0 <= top <= bottom <= 14
        assert 0 <= left <= right <= 20
        assert share == pytest.approx(1 - (bottom - top) * (right - left) / 280)
    assert len({tuple(box.tolist()) for box, _ in boxes}) > 30
    with pytest.raises(ConfigError, match=r"alpha=0: must be a number above 0"):
        MixToken(alpha=0)


@pytest.mark.parametrize(("whole_sides", "area"), [(False, 0.27), (True, 0.29)])
def test_mixtoken__mean_area(whole_sides, area):
    """Published boxes are smaller than the drawn share; parts outside the grid are cut off in both variants."""
    random = np.random.RandomState(0)
    areas = []
    for _ in range(4000):
        top, left, bottom, right = MixToken(whole_sides=whole_sides).draw((14, 14), random)
        areas.append((bottom - top) * (right - left) / 196)
    assert np.mean(areas) == pytest.approx(area, abs=0.02)


def test_check__maps_in_another_class_order(tmp_path, caplog):
    """Check maps of 40 images of two classes: all correct, two thirds correct, and all swapped."""
    keys, labels = [f"c/{index}" for index in range(40)], np.arange(40) % 2
    for name, wrong in (("right", 0), ("poor", 14), ("other", 40)):
        writer = LabelMapStore.create(tmp_path / name, 40, 1, (2, 2), 2, keys)
        for index in range(40):
            map_class = labels[index] ^ (index < wrong)
            writer.write(index, np.full((1, 2, 2), 9.0), np.full((1, 2, 2), map_class))
        writer.finish()
    joins = {
        name: LabelMapJoin(LabelMapStore.open(tmp_path / name), keys, ["a", "b"]) for name in ("right", "poor", "other")
    }
    joins["right"].check(labels)
    joins["poor"].check(labels)
    assert not caplog.text
    with pytest.raises(ConfigError, match=r"0.0% of 40 maps agree with their image's class \(chance: 50.0%\)"):
        joins["other"].check(labels)
