"""Teachers: trained classifiers that a student learns from (Touvron et al., arXiv:2012.12877)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.features import classify_places
from vitrail.models.pretrained import PretrainedClassifier


class Teacher(nn.Module):
    """A trained classifier, asked about the student's batches (B, 3, H, W), mixed and erased as they are.

    The batch is converted to the classifier's own normalisation and resized to its image size. The classifier stays in
    evaluation mode and gets no gradients.

    Args:
        classifier: the trained network with its normalisation, image size and classes.
        mean: of the student's normalisation, for R, G and B in [0, 1].
        std: of the student's normalisation.
        classes: names of the student's classes, which are looked up among the classifier's.

    Raises:
        ConfigError: another number of classes, and the names do not explain it.
    """

    provides = frozenset({"teacher_logits", "teacher_features"})
    scale: Tensor
    shift: Tensor

    def __init__(
        self, classifier: PretrainedClassifier, mean: Sequence[float], std: Sequence[float], classes: Sequence[str]
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
        """Return logits (B, C) of the student's classes for the student's images (B, 3, H, W)."""
        logits = self.model(self._own_input(images))
        return logits if self.chosen is None else logits[:, self.chosen]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return the last features of every place (B, N, D), row by row, for the student's images (B, 3, H, W)."""
        model: Any = self.model
        features = model.forward_features(self._own_input(images))
        return classify_places(self.model, features, self.image_size, _last_token)[0]

    def _own_input(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.image_size:
            mode = "bicubic" if self.interpolation == "bicubic" else "bilinear"
            images = F.interpolate(images.float(), self.image_size, mode=mode, align_corners=False, antialias=True)
        return images * self.scale + self.shift

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever the student does."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Return the teacher itself: nothing trains it, so copies of the student share it."""
        return self


def _last_token(place: Tensor) -> Tensor:
    """Return the features (M, D) of places given as (M, prefix + 1, D), (M, 1, 1, D) or (M, D, 1, 1)."""
    return place[:, -1] if place.ndim == 3 else place.flatten(1)
