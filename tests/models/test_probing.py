"""Pooled features, and linear classifiers of them as the classifier of a backbone."""

import pytest
import torch
from torch import nn

from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.models.probing import check_probe, pooled_features, write_classifier

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vit_nano", 32, {}),
        ("vit_small_patch16_dinov3", 32, SMALL),
        ("lvvit_nano", 32, {"token_head": True}),
        ("deit_tiny_distilled_patch16_224", 32, {**SMALL, "token_head": True}),
        ("deit_tiny_patch16_224", 32, {**SMALL, "pool": "second_order"}),
        ("dynamicvit_deit_tiny", 64, {}),
        ("evo_deit_tiny_patch16_224", 64, {}),
        ("t2t_vit_7", 32, {"depth": 2}),
        ("vit5_small", 32, SMALL),
        ("so_vit_7", 64, {"depth": 2}),
        ("tf_efficientnet_lite0", 32, {}),
        ("convnext_atto", 32, {"token_head": True}),
        pytest.param("volo_d1_224", 64, {}, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", 224, {}, marks=pytest.mark.slow),
    ],
)
def test_write_classifier__makes_the_logits_linear_in_the_features(name, size, options):
    torch.manual_seed(0)
    model = create_model(name, 5, size, **options).eval()
    check_probe(model, (size, size))
    images, weight, bias = torch.randn(2, 3, size, size), None, torch.randn(5)
    with torch.no_grad():
        features = pooled_features(model, images)
        weight = torch.randn(5, features.shape[1])
        write_classifier(model, weight, bias)
        torch.testing.assert_close(model(images), features @ weight.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("levit_128s", 224, "probe: the classifier of LevitDistilled is not a linear layer with a bias"),
        ("crossvit_tiny_240", 240, "probe: the classifier of CrossVit is not a linear layer with a bias"),
    ],
)
def test_check_probe__refuses_other_classifiers(name, size, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_probe(create_model(name, 5, size).eval(), (size, size))


def test_check_probe__refuses_logits_that_are_not_linear():
    model = create_model("vit_nano", 5, 32).eval()
    model.register_forward_hook(lambda *found: found[-1].square())
    with pytest.raises(ConfigError, match=r"probe: the logits of .* are not a linear function of its pooled features"):
        check_probe(model, (32, 32))


def test_check_probe__needs_timms_methods():
    with pytest.raises(ConfigError, match="probe: Flatten does not have timm's methods forward_features"):
        check_probe(nn.Flatten(), (32, 32))
