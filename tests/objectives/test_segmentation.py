"""The segmentation loss: ignored pixels, batches without a label, the auxiliary head."""

import pytest
import torch
import torch.nn.functional as F

from vitrail.objectives import SegmentationLoss
from vitrail.types import MASK_IGNORE, Outputs, Targets


def loss_of(logits, masks, auxiliary=None, **options):
    extras = {} if auxiliary is None else {"auxiliary": auxiliary}
    return SegmentationLoss(**options)(Outputs(logits, extras=extras), Targets(masks))


@pytest.fixture
def masks():
    masks = torch.randint(5, (2, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks[0, :12] = MASK_IGNORE
    return masks


def test_loss__is_the_mean_over_labelled_pixels(masks):
    logits = torch.randn(2, 5, 16, 16)
    expected = F.cross_entropy(logits, masks.long(), ignore_index=MASK_IGNORE)
    assert loss_of(logits, masks)["loss"] == pytest.approx(expected.item(), rel=1e-6)
    counted = F.cross_entropy(logits, masks.long(), ignore_index=MASK_IGNORE, reduction="sum") / masks.numel()
    assert loss_of(logits, masks, average="all")["loss"] == pytest.approx(counted.item(), rel=1e-6)


def test_logits__are_resized_to_the_masks(masks):
    logits = torch.randn(2, 5, 4, 4)
    resized = F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    assert torch.allclose(loss_of(logits, masks)["loss"], loss_of(resized, masks)["loss"])


def test_auxiliary__is_weighted(masks):
    logits, auxiliary = torch.randn(2, 5, 16, 16), torch.randn(2, 5, 8, 8)
    losses = loss_of(logits, masks, auxiliary)
    assert losses["loss"] == pytest.approx((losses["decoder_loss"] + 0.4 * losses["auxiliary_loss"]).item())
    assert losses["auxiliary_loss"] == pytest.approx(loss_of(auxiliary, masks)["loss"].item())


def test_batch_without_labelled_pixel__has_loss_and_gradient_zero():
    logits = torch.randn(2, 5, 8, 8, requires_grad=True)
    masks = torch.full((2, 8, 8), MASK_IGNORE, dtype=torch.uint8)
    assert F.cross_entropy(logits, masks.long(), ignore_index=MASK_IGNORE).isnan()
    loss = loss_of(logits, masks)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_half_precision__is_computed_in_float32(masks):
    logits = torch.randn(2, 5, 16, 16)
    assert loss_of(logits.bfloat16(), masks)["loss"].dtype == torch.float32
