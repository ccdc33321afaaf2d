import pytest
import timm
import torch

import vitrail  # noqa: F401
from vitrail.checkpoints import load_checkpoint
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.cost import measure_cost
from vitrail.models.so_vit import VisualTokens
from vitrail.training import OptimizerFactory

NAMES = ["so_vit_7", "sot_tiny"]
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def small(name="so_vit_7", size=64, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=size, **{**SMALL, **kwargs})


@pytest.mark.parametrize("design", ["resnet", "densenet"])
@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("size", [(32, 32), (48, 80), (47, 63)])
def test_stem__grid_matches_output(design, patch, size):
    stem = VisualTokens(size, patch, embed_dim=8, design=design).eval()
    images = torch.randn(1, 3, *size)
    assert stem(images).shape == (1, stem.num_patches, 8)
    stem.flatten = False
    assert stem(images).shape == (1, *stem.grid_size, 8)


def test_stem__errors():
    with pytest.raises(ConfigError, match="patch_size=32: the stem of So-ViT supports 16 and 8"):
        create_model("so_vit_7", 5, 64, patch_size=32)
    with pytest.raises(ConfigError, match=r"stem=vgg: choose resnet or densenet. \(model.stem=vgg\)"):
        create_model("so_vit_7", 5, 64, stem="vgg")
    with pytest.raises(ConfigError, match="pool_center=token: choose head"):
        create_model("sot_tiny", 5, 64, pool_center="token")
    with pytest.raises(AssertionError, match="images of 32x32 pixels do not fit"):
        small()(torch.randn(2, 3, 32, 32))


def test_models__do_not_share_their_configuration():
    """The official builders change a shared configuration: the second model fails or loses its dropout."""
    with torch.device("meta"):
        models = {name: timm.create_model(name) for name in ("so_vit_7", "so_vit_10", "so_vit_19", "sot_base")}
    drops = {name: model.classifier.drop.p for name, model in models.items()}
    assert drops == {"so_vit_7": 0, "so_vit_10": 0, "so_vit_19": 0.5, "sot_base": 0.7}
    assert [len(model.blocks) for model in models.values()] == [7, 10, 19, 24]


@pytest.mark.parametrize("name", NAMES)
def test_initial_weights__as_official(name):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, depth=1)
    assert model.classifier.cls_fc.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not model.classifier.visual_fc.bias.any()
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    if name == "so_vit_7":
        projection = model.classifier.representation.conv_dr_block[0][0].weight  # fan-out of 48
        assert projection.std().item() == pytest.approx((2 / 48) ** 0.5, rel=0.05)
        assert model.classifier.normalization.weight.std().item() == pytest.approx(1, abs=0.4)
    else:
        assert model.classifier.representation.wr.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert "pos_embed" not in dict(model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_classifier__reset_and_features(name):
    model, images = small(name).eval(), torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    assert features.shape == (2, 17, 32)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[:, 0])
    assert len(model.forward_intermediates(images, indices=[0], intermediates_only=True)) == 1
    model.reset_classifier(9)
    assert [layer.out_features for layer in model.get_classifier()] == [9, 9]
    assert model(images).shape == (2, 9)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), features[:, 0])
    assert small(name, num_classes=0)(images).shape == (2, 32)
    pyramid = timm.create_model(name, img_size=64, features_only=True, out_indices=1, **SMALL)
    assert pyramid(images)[-1].shape == (2, 32, 4, 4)


def test_center__subtracts_the_mean_of_each_channel():
    """A constant added to each channel of a projection changes the published pooling, but not the centred one."""
    model = small("sot_tiny", pool_center="channel").classifier.representation
    published = small("sot_tiny").classifier.representation
    tokens = torch.randn(2, 16, 32)
    shifted = tokens + torch.randn(32)
    torch.testing.assert_close(model(shifted), model(tokens), rtol=1e-3, atol=1e-5)
    assert (published(shifted) - published(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_equal_tokens__finite_gradients(name):
    """The covariance of equal tokens is 0, whose square root has no finite derivative."""
    model = small(name).classifier
    tokens = torch.randn(2, 1, 32).expand(2, 16, 32).requires_grad_()
    model(tokens, tokens[:, 0]).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_training__same_gradients_with_checkpointing(name):
    images, grads = torch.randn(4, 3, 64, 64), []
    for checkpointing in (False, True):
        model = small(name)
        model.set_grad_checkpointing(checkpointing)
        model(images).square().mean().backward()
        grads.append({key: parameter.grad for key, parameter in model.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1])


def test_layer_decay__stem_first_and_classifier_last():
    model = small()
    groups = OptimizerFactory("adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5).build(model, 512).param_groups
    rates = {id(parameter): group["lr"] * group["lr_scale"] for group in groups for parameter in group["params"]}
    assert rates[id(model.visual_tokens.tokens.transition.weight)] == 0.5**3
    assert rates[id(model.blocks[0].mlp.fc1.weight)] == 0.5**2
    assert rates[id(model.classifier.visual_fc.weight)] == rates[id(model.classifier.normalization.weight)] == 1


def test_token_head__adds_token_logits():
    plain = small().eval()
    model = create_model("so_vit_7", 5, 64, token_head=True, embed_dim=32, depth=2, num_heads=2).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    heads = forward_heads(model, images)
    assert heads.tokens.shape == (2, 16, 5)
    torch.testing.assert_close(heads.cls, plain(images))
    torch.testing.assert_close(model(images), heads.cls + 0.5 * heads.tokens.amax(1))


@pytest.mark.parametrize("name", NAMES)
def test_load__official_checkpoint(name, tmp_path):
    """The official file has the same names, a frozen position table, and is wrapped as timm 0.3.4 saves it."""
    source = small(name)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"arch": "So_vit_7", "state_dict_ema": state, "state_dict": state}, tmp_path / "x.pth.tar")
    model = small(name, size=96, num_classes=3)
    notes = load_checkpoint(model, tmp_path / "x.pth.tar")
    assert any("position embeddings resized from 4x4" in note for note in notes)
    expected = "5 classes in the checkpoint, 3 in the model: classifier.cls_fc, classifier.visual_fc not loaded."
    assert expected in notes
    for key in ("blocks.1.attn.qkv.weight", "visual_tokens.tokens.transition.weight"):
        torch.testing.assert_close(model.state_dict()[key], source.state_dict()[key])
    overlay = {"state_dict": {"state_dict": state}}
    model = timm.create_model(
        name, img_size=64, pretrained=True, pretrained_cfg_overlay=overlay, **{**SMALL, "num_classes": 3}
    )
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 3)
    torch.testing.assert_close(model.cls_token, source.cls_token)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "parameters", "macs"), [("so_vit_10", 7_158_672, 1.787), ("sot_base", 76_878_982, 15.524)]
)
def test_cost__of_the_sizes_without_recorded_values(name, parameters, macs):
    with torch.device("meta"):
        cost = measure_cost(timm.create_model(name), (224, 224))
    assert (cost.parameters, cost.tokens) == (parameters, 197)
    assert cost.macs / 1e9 == pytest.approx(macs, rel=5e-4)
