"""Teachers: trained classifiers whose logits a student learns (Touvron et al., arXiv:2012.12877)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.annotator import Annotator


class Teacher(nn.Module):
    """The logits (B, C) of a trained classifier for the student's batches (B, 3, H, W), mixed and erased as they are.

    The batch is brought to the classifier's own normalisation and resized to its own image size. The classifier stays
    in evaluation mode and gets no gradients.

    Args:
        classifier: the trained network with its normalisation, image size and classes.
        mean: of the student's normalisation, for R, G and B in [0, 1].
        std: likewise.
        classes: names of the student's classes; they are found among the classifier's by their names.

    Raises:
        ConfigError: another number of classes, which names do not explain.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, classifier: Annotator, mean: Sequence[float], std: Sequence[float], classes: Sequence[str]
    ) -> None:
        super().__init__()
        self.model = classifier.model.requires_grad_(False).eval()
        self.name, self.image_size = classifier.name, classifier.image_size
        self.interpolation = classifier.interpolation
        self.chosen = classifier.matching(classes)
        if self.chosen is None and classifier.num_classes != len(classes):
            raise ConfigError(
                f"teacher: {self.name} has {classifier.num_classes} classes, the data has {len(classes)}."
            )
        own_mean, own_std = torch.tensor(classifier.mean), torch.tensor(classifier.std)
        student_mean, student_std = torch.tensor(tuple(mean)), torch.tensor(tuple(std))
        # (x * student_std + student_mean - own_mean) / own_std
        self.register_buffer("scale", (student_std / own_std)[:, None, None])
        self.register_buffer("shift", ((student_mean - own_mean) / own_std)[:, None, None])

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C)."""
        if tuple(images.shape[-2:]) != self.image_size:
            mode = "bicubic" if self.interpolation == "bicubic" else "bilinear"
            images = F.interpolate(images.float(), self.image_size, mode=mode, align_corners=False, antialias=True)
        logits = self.model(images * self.scale + self.shift)
        return logits if self.chosen is None else logits[:, self.chosen]

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever the student does."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Nothing trains it: copies of the student, such as its average, share the one teacher."""
        return self
