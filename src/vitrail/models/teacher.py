"""Teachers: trained classifiers that a student learns from (Touvron et al., arXiv:2012.12877).

Shapes: B images, C classes, N positions, D channels of the teacher, H x W pixels, M positions of all images.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.features import patch_features
from vitrail.models.heads import forward_heads
from vitrail.models.pretrained import PretrainedClassifier
from vitrail.types import Outputs


class Teacher(nn.Module):
    """A trained classifier that labels the student's batches (B, 3, H, W), after mixing and erasing.

    The batch is converted to the classifier's own normalisation and resized to its image size. The classifier stays in
    evaluation mode and gets no gradients.

    Args:
        classifier: the trained network with its normalisation, image size and classes.
        mean: mean of the student's normalisation, for R, G and B in [0, 1].
        std: standard deviation of the student's normalisation.
        classes: names of the student's classes; they are looked up among the classifier's. None if only the teacher's
            features are used: it then needs no classes.

    Raises:
        ConfigError: the numbers of classes differ, and the student's names are not all among the classifier's.
    """

    provides = frozenset({"teacher_logits", "teacher_features", "teacher_heads"})
    scale: Tensor
    shift: Tensor
    chosen: Tensor | None

    def __init__(
        self,
        classifier: PretrainedClassifier,
        mean: Sequence[float],
        std: Sequence[float],
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.model = classifier.model.requires_grad_(False).eval()
        self.name, self.image_size = classifier.name, classifier.image_size
        self.interpolation = classifier.interpolation
        chosen = None if classes is None else self._find(classifier, classes)
        # A buffer: an index in a list would be copied to the device at each step, and a GPU would wait for it.
        self.register_buffer("chosen", None if chosen is None else torch.tensor(chosen), persistent=False)
        own_mean, own_std = torch.tensor(classifier.mean), torch.tensor(classifier.std)
        student_mean, student_std = torch.tensor(tuple(mean)), torch.tensor(tuple(std))
        # (x * student_std + student_mean - own_mean) / own_std
        self.register_buffer("scale", (student_std / own_std)[:, None, None])
        self.register_buffer("shift", ((student_mean - own_mean) / own_std)[:, None, None])

    def _find(self, classifier: PretrainedClassifier, classes: Sequence[str]) -> list[int] | None:
        """Return the indices of `classes` among the classifier's; None if they are the same."""
        unknown = [name for name in classes if classifier.classes is not None and name not in classifier.classes]
        if classifier.num_classes != len(classes) and (unknown or classifier.classes is None):
            raise ConfigError(
                f"teacher: {self.name} has {classifier.num_classes} classes, the data has {len(classes)};"
                " use a teacher that was trained on the data's classes."
            )
        if unknown:
            raise ConfigError(
                f"teacher: {len(unknown)} of the data's {len(classes)} classes are not among those of {self.name}"
                f" ({unknown[0]}, for example); use a teacher that was trained on the data's classes, or set"
                " teacher.classes=data if only their names differ and the order is the same."
            )
        return classifier.matching(classes)

    @property
    def num_features(self) -> int:
        """Channels of the features, D."""
        return int(self.model.num_features)  # type: ignore[arg-type]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, C), in the student's class order, for the student's images (B, 3, H, W)."""
        logits = self.model(self._teacher_input(images))
        return logits if self.chosen is None else logits[:, self.chosen]

    @torch.no_grad()
    def features(self, images: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Return the last features (B, N, D), in row-major order, for the student's images (B, 3, H, W).

        Args:
            images: (B, 3, H, W).
            grid: (rows, columns) to resample the features to (bilinear, antialiased); None keeps the teacher's grid.
        """
        model: Any = self.model
        features = model.forward_features(self._teacher_input(images))
        patches, own = patch_features(self.model, features, self.image_size)
        if grid is None or tuple(grid) == own:
            return patches
        planes = patches.transpose(1, 2).unflatten(2, own).float()  # (B, D, rows, columns)
        planes = F.interpolate(planes, tuple(grid), mode="bilinear", align_corners=False, antialias=True)
        return planes.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def logits_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `forward` and `features` return, from one forward pass."""
        model: Any = self.model
        features = model.forward_features(self._teacher_input(images))
        logits = model.forward_head(features)
        tokens, _ = patch_features(self.model, features, self.image_size)
        return (logits if self.chosen is None else logits[:, self.chosen]), tokens

    @torch.no_grad()
    def heads(self, images: Tensor) -> Outputs:
        """Return class logits (B, C), and token logits (B, N, C) if any, for the student's images (B, 3, H, W)."""
        found = forward_heads(self.model, self._teacher_input(images))
        if self.chosen is None:
            return found
        tokens = None if found.tokens is None else found.tokens[..., self.chosen]
        return Outputs(found.cls[:, self.chosen], tokens)

    def _teacher_input(self, images: Tensor) -> Tensor:
        if tuple(images.shape[-2:]) != self.image_size:
            mode = "bicubic" if self.interpolation == "bicubic" else "bilinear"
            images = F.interpolate(images.float(), self.image_size, mode=mode, align_corners=False, antialias=True)
        return images * self.scale + self.shift

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, also when the student is set to training mode."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """Return the teacher itself: it is never trained, so copies of the student share it."""
        return self
