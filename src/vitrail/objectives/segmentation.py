"""Cross-entropy of every labelled pixel, with an auxiliary head, as in mmsegmentation and the published recipes.

Shapes: B images, C classes, H x W pixels, h x w positions of the logits.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from vitrail.objectives.contract import Objective
from vitrail.types import MASK_IGNORE, Outputs, Targets
from vitrail_runtime.checking import NonNegative, checked


@checked
class SegmentationLoss(Objective):
    """Cross-entropy of the decoder plus a weighted one of the auxiliary head; logits are resized to the masks.

    Args:
        auxiliary_weight: weight of the auxiliary head's loss.
        average: `labelled` divides by the labelled pixels of the batch; `all` by all pixels, ignored ones included, as
            mmsegmentation does by default: images with much unlabelled area then weigh less.
    """

    needs = frozenset({"masks"})
    optional = frozenset({"outputs.auxiliary"})

    def __init__(self, auxiliary_weight: NonNegative = 0.4, average: Literal["labelled", "all"] = "labelled") -> None:
        super().__init__()
        self.auxiliary_weight, self.average = auxiliary_weight, average

    def forward(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Return the scalar `loss`, and its parts if there are two, from logits (B, C, h, w) and masks (B, H, W)."""
        decoder = self._loss(outputs.cls, targets.cls)
        auxiliary = outputs.extras.get("auxiliary")
        if auxiliary is None:
            return {"loss": decoder}
        loss = self._loss(auxiliary, targets.cls)
        return {"loss": decoder + self.auxiliary_weight * loss, "decoder_loss": decoder, "auxiliary_loss": loss}

    def _loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return the mean over pixels; 0 for a batch without a labelled pixel, for which PyTorch's mean is NaN."""
        masks = masks.long()
        resized = F.interpolate(logits.float(), masks.shape[-2:], mode="bilinear", align_corners=False)
        total = F.cross_entropy(resized, masks, ignore_index=MASK_IGNORE, reduction="sum")
        count = masks.numel() if self.average == "all" else (masks != MASK_IGNORE).sum().clamp(min=1)
        return total / count
