"""Metrics of a validation.

Shapes: B images, C classes.
"""

from typing import Any

from torch import Tensor, nn
from torchmetrics import SumMetric

from vitrail.types import IGNORE


class ValidationMetrics(nn.Module):
    """Mean cross-entropy, top-1 and top-5 of all images not labelled `IGNORE`, over all processes.

    Args:
        num_classes: number of classes, C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.top = {f"top{k}": min(k, num_classes) for k in (1, 5)}
        # `disable`: do not hide a NaN loss. Sums, because selecting the counted images would wait for the device.
        self.sums: Any = nn.ModuleDict(
            {name: SumMetric(nan_strategy="disable") for name in ("images", "loss", *self.top)}
        )

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of logits (B, C) and labels (B,)."""
        counted = labels != IGNORE
        self._add("images", counted)
        self._add("loss", nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORE))
        hits = logits.topk(max(self.top.values())).indices == labels[:, None]  # (B, 5)
        for name, k in self.top.items():
            self._add(name, hits[:, :k].any(1) & counted)

    def _add(self, name: str, values: Tensor) -> None:
        self.sums[name].update(values.float().sum())

    def compute_and_reset(self, prefix: str) -> dict[str, Tensor]:
        """Return the scalar loss and the accuracies in % since the last call."""
        sums = {name: total.compute() for name, total in self.sums.items()}
        for total in self.sums.values():
            total.reset()
        images = sums.pop("images")
        return {f"{prefix}{name}": (100 if name in self.top else 1) * total / images for name, total in sums.items()}
