"""Properties of token targets that the recorded cases do not cover."""

import pytest
import torch
from torchvision.ops import roi_align

from vitrail.data.label_maps import sparse_token_targets, token_targets

CLASSES = 12


def maps(batch, height, width, top_k=3):
    torch.manual_seed(height * width)
    scores = torch.randn(batch, top_k, height, width) * 3
    classes = torch.rand(batch, CLASSES, height, width).argsort(1)[:, :top_k]
    return scores, classes


def crops(batch):
    torch.manual_seed(0)
    corner, size = torch.rand(batch, 2) * 0.6, 0.05 + torch.rand(batch, 2) * 0.35
    boxes = torch.cat((corner, corner + size), 1)
    boxes[0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    boxes[1] = torch.tensor([0.9, 0.0, 1.0, 0.02])  # less than one cell
    return boxes, torch.arange(batch) % 2 == 0


@pytest.mark.parametrize("shape", [(18, 18), (7, 11), (40, 24), (28, 28), (1, 1)])
@pytest.mark.parametrize("grid", [(14, 14), (24, 24), (5, 9), (1, 1)])
def test_dense__equals_torchvisions_roi_align(shape, grid):
    scores, classes = maps(6, *shape)
    boxes, flipped = crops(6)
    targets = token_targets(scores, classes, boxes, flipped, grid, CLASSES, smoothing=0.0)
    dense = torch.zeros(6, CLASSES, *shape).scatter_(1, classes, scores)
    for i in range(6):
        image = dense[i : i + 1].flip(-1) if flipped[i] else dense[i : i + 1]
        scale = torch.tensor([shape[1], shape[0], shape[1], shape[0]])
        for size, ours in ((grid, targets.tokens[i]), ((1, 1), targets.cls[i : i + 1])):
            pooled = roi_align(image, [boxes[i : i + 1] * scale - 0.5], size)
            torch.testing.assert_close(ours, pooled[0].flatten(1).softmax(0).T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(18, 18), (7, 11), (40, 24), (28, 28), (1, 1)])
@pytest.mark.parametrize("grid", [(14, 14), (24, 24), (5, 9), (1, 1)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sparse__equals_dense(shape, grid, smoothing):
    arguments = (*maps(6, *shape), *crops(6), grid, CLASSES, smoothing)
    dense, sparse = token_targets(*arguments), sparse_token_targets(*arguments)
    torch.testing.assert_close(sparse.tokens.to_dense(), dense.tokens, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sparse.cls, dense.cls)
    total = 1 + smoothing / CLASSES
    torch.testing.assert_close(dense.tokens.sum(-1), torch.full((6, grid[0] * grid[1]), total))


@pytest.mark.parametrize("largest", [100.0, 20_000.0, -20_000.0])
def test_sparse__scores_with_overflowing_exponentials(largest):
    scores, classes = maps(6, 18, 18)
    arguments = (scores / scores.abs().max() * largest, classes, *crops(6), (14, 14), CLASSES)
    dense, sparse = token_targets(*arguments), sparse_token_targets(*arguments)
    torch.testing.assert_close(sparse.tokens.to_dense(), dense.tokens, rtol=1e-4, atol=1e-4)


def test_crop__selects_the_same_area_as_in_the_image():
    """A hot cell in the upper right corner shows only in a crop of that corner, or of the upper left one if flipped."""
    scores, classes = torch.zeros(3, 1, 10, 20), torch.zeros(3, 1, 10, 20, dtype=torch.long)
    scores[:, :, 1, 17], classes[:, :, 1, 17] = 20.0, 3
    boxes = torch.tensor([[0.75, 0.0, 1.0, 0.5], [0.0, 0.5, 0.25, 1.0], [0.0, 0.0, 0.25, 0.5]])
    flipped = torch.tensor([False, False, True])
    targets = token_targets(scores, classes, boxes, flipped, (5, 5), 4, smoothing=0.0).tokens.unflatten(1, (5, 5))
    assert targets[0, 1, 2, 3] > 0.9
    assert targets[1, ..., 3].max() == pytest.approx(0.25)
    assert targets[2, 1, 2, 3] > 0.9


def test_mixed__tokens_of_two_images():
    arguments = (*maps(4, 9, 9), *crops(4), (3, 3), CLASSES)
    sparse = sparse_token_targets(*arguments).tokens
    share = torch.tensor([1.0, 1, 0, 1, 0.5, 0, 1, 1, 0.25])
    dense = sparse.to_dense()
    expected = share[:, None] * dense + (1 - share[:, None]) * dense.flip(0)
    torch.testing.assert_close(sparse.mixed(share).to_dense(), expected)


def test_inputs__are_not_modified_and_are_checked():
    scores, classes = maps(2, 5, 5)
    boxes, flipped = crops(2)
    before = [tensor.clone() for tensor in (scores, classes, boxes)]
    token_targets(scores, classes, boxes, flipped, (2, 2), CLASSES)
    torch.testing.assert_close([scores, classes, boxes], before)
    with pytest.raises(ValueError, match="label maps contain class 11, but the data has 10 classes"):
        token_targets(scores, torch.full_like(classes, 11), boxes, flipped, (2, 2), 10)
    with pytest.raises(ValueError, match=r"must both be \(B, K, H, W\)"):
        token_targets(scores, classes[:1], boxes, flipped, (2, 2), CLASSES)
    with pytest.raises(ValueError, match=r"must be \(B, 4\) and \(B,\)"):
        token_targets(scores, classes, boxes[:, :2], flipped, (2, 2), CLASSES)
