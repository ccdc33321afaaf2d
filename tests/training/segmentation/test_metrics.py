"""mIoU, mAcc and aAcc against values computed by hand and by another formula."""

import pytest
import torch
from torchmetrics.classification import MulticlassJaccardIndex

from vitrail.training.segmentation import SegmentationMetrics
from vitrail.types import MASK_IGNORE


def test_scores__equal_those_computed_by_hand():
    """Class 0: 2 right of 3 labelled and 3 predicted; class 1: 1, 2, 3; class 2: only predicted; class 3: absent."""
    masks = torch.tensor([[0, 0, 0, 1, 1, MASK_IGNORE, MASK_IGNORE]], dtype=torch.uint8)
    predictions = torch.tensor([[0, 0, 1, 1, 2, 2, 3]])
    metrics = SegmentationMetrics(4)
    metrics.update(predictions, masks)
    scores = metrics.scores()
    assert scores.iou.tolist() == pytest.approx([2 / 3, 1 / 3, 0, float("nan")], nan_ok=True)
    assert scores.accuracy.tolist() == pytest.approx([2 / 3, 1 / 2, float("nan"), float("nan")], nan_ok=True)
    found = metrics.compute_and_reset("val/")
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {"val/mIoU": 100 / 3, "val/mAcc": 700 / 12, "val/aAcc": 60}
    )
    assert metrics.latest.iou.shape == (4,)
    assert metrics.scores().summary()["mIoU"].isnan()


def test_areas__are_summed_over_the_set_and_not_averaged_over_images():
    generator = torch.Generator().manual_seed(0)
    metrics, oracle = SegmentationMetrics(6), MulticlassJaccardIndex(6, ignore_index=MASK_IGNORE)
    means = []
    for size in ((5, 7), (12, 3), (30, 30)):
        masks = torch.randint(6, size, generator=generator)
        predictions = torch.where(torch.rand(size, generator=generator) < 0.6, masks, torch.randint(6, size))
        masks[torch.rand(size, generator=generator) < 0.2] = MASK_IGNORE
        metrics.update(predictions, masks.byte())
        oracle.update(predictions.flatten(), masks.flatten())
        alone = SegmentationMetrics(6)
        alone.update(predictions, masks)
        means.append(alone.scores().summary()["mIoU"])
    found = metrics.scores().summary()["mIoU"]
    assert found.item() == pytest.approx(100 * oracle.compute().item(), rel=1e-5)
    assert found.item() != pytest.approx(torch.stack(means).mean().item(), rel=1e-3)
