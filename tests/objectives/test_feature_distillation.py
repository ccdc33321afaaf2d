"""Feature distillation: its loss, its projection, and the features of backbones and teachers.

Shapes: B images, N patch tokens, D channels.
"""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.heads import declared_outputs, return_features, token_grid
from vitrail.models.pretrained import PretrainedClassifier
from vitrail.models.teacher import Teacher
from vitrail.objectives import CrossEntropy, FeatureDistillation
from vitrail.objectives.contract import trained_parts
from vitrail.training import ImageClassifier, TargetBuilder
from vitrail.types import Batch, Outputs, Targets

HALF = ((0.5,) * 3, (0.5,) * 3)


def teacher(name="deit_nano", side=32, **options):
    model = create_model(name, 0, side, **options)
    return Teacher(PretrainedClassifier(model, name, (side, side), *HALF), *HALF)


@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_loss__equals_the_plain_formula(kind):
    torch.manual_seed(0)
    objective = FeatureDistillation(kind, weight=0.5)
    assert trained_parts(objective) == {}
    objective.build_parts({"outputs.features": 6, "teacher_features": 4})
    assert trained_parts(objective) == {"projection": objective.projection}
    logits, labels = torch.randn(2, 3), torch.tensor([0, 2])
    features, wanted = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    losses = objective(Outputs(logits, extras={"features": features}), Targets(labels, teacher_features=wanted))
    student = features @ objective.projection.weight.T + objective.projection.bias
    normal = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    if kind == "cosine":
        distance = 1 - ((student * normal).sum(-1) / (student.norm(dim=-1) * normal.norm(dim=-1))).mean()
    else:
        distance = (student - normal).square().mean()
    assert_close(losses["feature_loss"], distance)
    assert_close(losses["base_loss"], CrossEntropy(0.1)(Outputs(logits), Targets(labels))["loss"])
    assert_close(losses["loss"], losses["base_loss"] + 0.5 * losses["feature_loss"])


def test_loss__incomplete_inputs_are_named():
    objective, labels = FeatureDistillation(), torch.tensor([0])
    outputs = Outputs(torch.randn(1, 3), extras={"features": torch.randn(1, 4, 6)})
    with pytest.raises(ValueError, match="needs features of the backbone and of a teacher"):
        objective(outputs, Targets(labels))
    with pytest.raises(ValueError, match=r"\(1, 4, 6\) and the teacher's \(1, 9, 6\) are on different grids"):
        objective(outputs, Targets(labels, teacher_features=torch.randn(1, 9, 6)))
    with pytest.raises(ValueError, match="has no projection yet"):
        objective(outputs, Targets(labels, teacher_features=torch.randn(1, 4, 6)))


@pytest.mark.parametrize(
    ("name", "token_head", "grid"),
    [
        ("deit_nano_distilled", False, (16, 16)),
        ("lvvit_nano", False, (8, 8)),
        ("lvvit_nano", True, (8, 8)),
        ("test_resnet", False, (2, 2)),
        ("test_convnext", True, None),
        ("vit_small_patch16_dinov3", False, (4, 4)),
    ],
)
def test_features__of_timms_models(name, token_head, grid):
    """They are the patch tokens of `forward_features`; the logits are unchanged."""
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2} if "dinov3" in name else {}
    model = create_model(name, 10, 64, token_head=token_head, **options).eval()
    images = torch.randn(2, 3, 64, 64)
    before = forward_heads(model, images)
    assert return_features(model)
    assert "features" in declared_outputs(model)
    after = forward_heads(model, images)
    assert_close(after.merged(), before.merged())
    features = model.forward_features(images)
    patches = features[:, model.num_prefix_tokens :] if features.ndim == 3 else features.flatten(2).transpose(1, 2)
    assert_close(after.extras["features"], patches)
    rows, columns = token_grid(model, (64, 64))
    assert rows * columns == patches.shape[1]
    assert grid in (None, (rows, columns))


def test_features__mixtoken_swaps_them_back():
    model = create_model("lvvit_nano", 10, 64, token_head=True).eval()
    return_features(model)
    images, box = torch.randn(2, 3, 64, 64), torch.tensor([0, 0, 8, 8])  # the whole image: the two images change places
    outputs, plain = forward_heads(model, images, box), forward_heads(model, images)
    assert_close(outputs.extras["features"], plain.extras["features"], rtol=1e-4, atol=1e-5)
    assert_close(outputs.tokens, plain.tokens, rtol=1e-4, atol=1e-5)


def test_features__backbones_without_them_are_refused():
    class Plain(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    assert not return_features(Plain())
    with pytest.raises(ConfigError, match=r"the width of outputs\.features is not known; Plain needs an attribute"):
        ImageClassifier(Plain(), FeatureDistillation(), 3)
    with pytest.raises(ConfigError, match="the width of teacher_features is not known; the teacher needs"):
        ImageClassifier(create_model("vit_nano", 3, 32), FeatureDistillation(), 3)


def test_teacher__features_follow_the_students_grid():
    """A teacher without classes; its grid of 4 x 4 is resampled to 8 x 8, bilinearly."""
    taught, images = teacher(patch_size=8), torch.randn(2, 3, 64, 64)
    own = taught.features(images)
    assert own.shape == (2, 16, taught.num_features)
    assert_close(taught.features(images, (4, 4)), own)
    planes = own.transpose(1, 2).reshape(2, -1, 4, 4)
    expected = F.interpolate(planes, (8, 8), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    assert_close(taught.features(images, (8, 8)), expected)


def test_teacher__dinov3_has_prefix_tokens_and_no_classes():
    taught = teacher("vit_small_patch16_dinov3", 64, embed_dim=24, depth=1, num_heads=2)
    assert taught.features(torch.randn(2, 3, 48, 48)).shape == (2, 16, 24)


def test_training_step__trains_backbone_and_projection():
    model = create_model("lvvit_nano", 10, 64)
    module = ImageClassifier(model, FeatureDistillation(), 10, targets=TargetBuilder(teacher=teacher(patch_size=8)))
    module.log_dict = Mock()
    loss = module.training_step(Batch(torch.randn(2, 3, 64, 64), torch.tensor([1, 2]), ["a", "b"]), 0)
    loss.backward()
    assert module.objective.projection.weight.shape == (64, 64)
    assert all(value.grad is not None for value in module.objective.parameters())
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
