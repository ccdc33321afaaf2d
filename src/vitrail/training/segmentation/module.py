"""The LightningModule of semantic segmentation.

Shapes: B images, C classes, H x W pixels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.segmentation.decoders import resize_map
from vitrail.training.classifier import ImageClassifier
from vitrail.training.segmentation.inference import DenseInference
from vitrail.training.segmentation.metrics import SegmentationMetrics
from vitrail.types import Batch
from vitrail_runtime.compat import shares_batch_norm


class SemanticSegmenter(ImageClassifier):
    """LightningModule that trains a segmentation network on crops, and validates it on whole images.

    Optimiser, schedule, compilation, seeds, checkpoints and resuming are those of `ImageClassifier`.

    Logs, per epoch: `train/<loss>`, `train/grad_norm`, `train/lr`, `val/mIoU`, `val/mAcc`, `val/aAcc` (in %).

    Args:
        model: network that declares `masks`.
        objective: maps (Outputs, Targets) to a dict of losses.
        num_classes: number of classes, C.
        inference: how whole images are predicted.
        on_prediction: called in evaluation with key, image (3, H, W) and predicted classes (H, W) of each image.
        kwargs: further arguments of `ImageClassifier`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: nn.Module,
        num_classes: int,
        inference: DenseInference,
        on_prediction: Callable[[str, Tensor, Tensor], None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, objective, num_classes, **kwargs)
        self.inference, self.on_prediction = inference, on_prediction

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C, H, W), float32, for images (B, 3, H, W)."""
        return resize_map(super().forward(images).float(), images.shape[-2:])

    def setup(self, stage: str) -> None:
        """Check that BatchNorm can normalise the batches of a training.

        Raises:
            ConfigError: a batch has one image, and BatchNorm normalises pooled features of one position: there is no
                variance then.
        """
        super().setup(stage)
        if stage != "fit" or getattr(self.trainer.datamodule, "batch_size", 2) > 1:  # type: ignore[attr-defined]
            return
        pooled = any(getattr(module, "output_size", None) in (1, (1, 1)) for module in self.model.modules())
        if pooled and not (self.trainer.world_size > 1 and shares_batch_norm(self.trainer)):
            raise ConfigError(
                "data.batch_size=1: the decoder's BatchNorm needs at least 2 images per device; raise it, or set"
                " trainer.sync_batchnorm=true on several GPUs."
            )

    def token_grid(self, images: Tensor) -> tuple[int, int] | None:
        """Return None: segmentation has no targets of tokens."""
        return None

    def new_metrics(self) -> SegmentationMetrics:
        """Return empty validation metrics, such as for the EMA weights."""
        return SegmentationMetrics(self.num_classes)

    def measure(self, batch: Batch, metrics: Any) -> None:
        """Update `metrics`, a result of `new_metrics`, with whole images (B, 3, H, W), uint8, and masks (B, H, W)."""
        for key, image, mask in zip(batch.key, batch.image, batch.label, strict=True):
            predicted = self.predicted_mask(image)
            metrics.update(predicted, mask)
            if self.on_prediction is not None:
                self.on_prediction(key, image, predicted)

    def predicted_mask(self, image: Tensor) -> Tensor:
        """Return the predicted classes (H, W) of a whole image (3, H, W), uint8; all processes must call this."""
        idle = self._idle_passes((image.shape[-2], image.shape[-1]))
        predicted = self.inference(self, image).argmax(0)
        for _ in range(idle):
            self(image.new_zeros(1, 3, *self.inference.window, dtype=next(self.parameters()).dtype))
        return predicted

    def _idle_passes(self, size: tuple[int, int]) -> int:
        """Return the forward passes to add for this image, because processes that share one model need equally many."""
        if not hasattr(self.trainer.strategy, "shard"):
            return 0
        own = self.inference.forward_passes(size)
        most = torch.tensor(own, device=self.device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most) - own
