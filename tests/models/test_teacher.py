import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.pretrained import PretrainedClassifier
from vitrail.models.teacher import Teacher

HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def classifier(size=32, classes=("a", "b", "c", "d")):
    torch.manual_seed(0)
    model = create_model("test_resnet", len(classes), size)
    return PretrainedClassifier(model, "test_resnet", (size, size), *HALF, classes=list(classes))


def test_logits__images_are_converted_to_the_teachers_input():
    """Images are converted to the teacher's normalisation and resized to its image size."""
    torch.manual_seed(1)
    pixels = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    trained = classifier()
    teacher = Teacher(trained, *IMAGENET, "abcd")
    small = F.interpolate(pixels, (32, 32), mode="bicubic", antialias=True)
    expected = trained.model((small - 0.5) / 0.5)
    assert_close(teacher((pixels - mean) / std), expected, rtol=1e-4, atol=1e-5)


def test_teacher__is_not_trained():
    teacher = Teacher(classifier(), *IMAGENET, "abcd").train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher(torch.rand(2, 3, 32, 32, requires_grad=True)).requires_grad
    assert copy.deepcopy(teacher) is teacher


def test_classes__are_found_by_name():
    images = torch.rand(2, 3, 32, 32)
    whole = Teacher(classifier(), *IMAGENET, "abcd")(images)
    assert_close(Teacher(classifier(), *IMAGENET, "db")(images), whole[:, [3, 1]])
    with pytest.raises(ConfigError, match="teacher: test_resnet has 4 classes, the data has 3"):
        Teacher(classifier(), *IMAGENET, "xyz")


def test_heads_and_features__are_those_of_the_dense_backbone():
    torch.manual_seed(0)
    model = create_model("lvvit_s", 4, 32, embed_dim=32, depth=1, num_heads=2)
    dense = PretrainedClassifier(model, "lvvit_s", (32, 32), *HALF, classes=list("abcd"))
    teacher, images = Teacher(dense, *HALF, "db"), torch.randn(2, 3, 32, 32)
    expected = forward_heads(model, images)
    found = teacher.heads(images)
    assert_close(found.cls, expected.cls[:, [3, 1]])
    assert_close(found.tokens, expected.tokens[..., [3, 1]])
    logits, features = teacher.logits_and_features(images)
    assert_close(logits, teacher(images))
    assert_close(features, teacher.features(images))
    assert_close(Teacher(dense, *HALF, "abcd").heads(images).cls, expected.cls)
