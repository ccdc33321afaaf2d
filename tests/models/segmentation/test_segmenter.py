"""Segmentation networks: sizes, gradients, parameter counts, and the layout of published checkpoints."""

import re

import pytest
import torch
from timm.layers import DropPath
from timm.models import register_model

from vitrail.checkpoints.fitting import load_checkpoint
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads, linear_segmenter, upernet
from vitrail.models.features import intermediate_shapes, unused_tokens
from vitrail.models.heads import declared_outputs
from vitrail.training import OptimizerFactory

pytestmark = pytest.mark.thorough


def small(name="lvvit_nano", num_classes=5, size=64, **options):
    torch.manual_seed(0)
    return upernet(name, num_classes, size, **{"channels": 16, "auxiliary_channels": 8, **options})


def millions(*modules):
    return [sum(parameter.numel() for parameter in module.parameters()) / 1e6 for module in modules]


@pytest.mark.parametrize(("name", "channels", "options", "taps", "total", "parts"), [
    ("lvvit_s", 256, {}, (6, 9, 12, 15), 44.5, (25.7, 4.2, 13.6, 0.9)),
    ("lvvit_m", 256, {}, (10, 13, 16, 19), 77.3, (55.2, 7.1, 13.7, 1.2)),
    ("lvvit_l", 512, {"skip_lam": 1.0}, (14, 17, 20, 23), 208.7, (149.1, 15.2, 40.8, 3.6)),
])  # fmt: skip
def test_lv_vit__has_the_published_size(name, channels, options, taps, total, parts):
    """README of TokenLabeling: 44, 77 and 209 M."""
    with torch.device("meta"):
        model = upernet(name, 150, 512, channels=channels, auxiliary_channels=channels, **options)
    assert model.taps == taps
    assert millions(model) == pytest.approx([total], abs=0.06)
    found = millions(model.backbone, model.neck, model.decode_head, model.auxiliary_head)
    assert found == pytest.approx(parts, abs=0.06)


@pytest.mark.parametrize("name", [
    "lvvit_nano", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "t2t_vit_7", "vit5_small", "so_vit_7",
    "evo_deit_tiny_patch16_224", "volo_d1_224", "resnet18", "convnext_atto", "vit_small_patch16_dinov3", "pvt_v2_b0",
])  # fmt: skip
def test_every_backbone__gives_logits_and_trains_all_its_parameters(name):
    model = small(name)
    images = torch.randn(2, 3, 64, 64)
    outputs = forward_heads(model, images)
    assert outputs.cls.shape[:2] == outputs.extras["auxiliary"].shape[:2] == (2, 5)
    (outputs.cls.square().mean() + outputs.extras["auxiliary"].square().mean()).backward()
    missing = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not missing  # DDP would wait for their gradients
    model.eval()
    with torch.no_grad():
        assert model(images).shape == (2, 5, 64, 64)
        assert not forward_heads(model, images).extras
    assert "masks" in declared_outputs(model)


@pytest.mark.parametrize(("pyramid", "sizes", "widths"), [
    ("lvvit", [32, 16, 8, 8], [64, 64, 64, 2048]), ("beit", [32, 16, 8, 4], [64] * 4),
    ("mln", [32, 16, 8, 4], [64] * 4), ("none", [8, 8, 8, 8], [64] * 4),
])  # fmt: skip
def test_pyramids__resolutions_and_widths(pyramid, sizes, widths):
    model = small(pyramid=pyramid)
    maps = model.neck(model.features(torch.randn(2, 3, 64, 64)))
    assert [part.shape[-1] for part in maps] == sizes
    assert [part.shape[1] for part in maps] == widths
    assert model.forward_outputs(torch.randn(2, 3, 64, 64)).cls.shape[-1] == sizes[0]


def official(model):
    """Return a model's weights under the names of TokenLabeling's checkpoints, whose backbone contains the pyramid."""
    weights = {re.sub(r"^neck\.", "backbone.", key): value.clone() for key, value in model.state_dict().items()}
    weights["backbone.norm.weight"] = torch.zeros(64)  # a classifier's norm, which is not used
    return {"meta": {"epoch": 1}, "state_dict": weights, "optimizer": {}}


def test_official_checkpoint__loads_by_its_names(tmp_path):
    saved = small().eval()
    torch.save(official(saved), tmp_path / "official.pth")
    model = small().eval()
    for value in model.parameters():
        value.data.fill_(0.5)
    load_checkpoint(model, tmp_path / "official.pth", same_classes=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), saved(images))
    names = set(official(saved)["state_dict"])
    for name in (
        "backbone.side_layer1.0.weight", "backbone.side_layer1.4.running_var", "backbone.side_layer4.1.weight",
        "decode_head.psp_modules.3.1.bn.weight", "decode_head.bottleneck.conv.weight",
        "decode_head.lateral_convs.2.conv.weight", "decode_head.fpn_convs.0.bn.bias",
        "decode_head.fpn_bottleneck.conv.weight", "decode_head.conv_seg.bias", "auxiliary_head.convs.0.conv.weight",
        "auxiliary_head.conv_seg.weight", "backbone.patch_embed.conv1.weight", "backbone.blocks.0.attn.qkv.weight",
    ):  # fmt: skip
        assert name in names
    assert not any(name.endswith("side_layer1.0.bias") for name in names)


def test_official_checkpoint__of_another_size_resizes_its_positions(tmp_path):
    torch.save(official(small()), tmp_path / "official.pth")
    model = small(size=128)
    load_checkpoint(model, tmp_path / "official.pth")
    assert model.backbone.pos_embed.shape[1] == 257
    torch.save(official(small(num_classes=7)), tmp_path / "seven.pth")
    with pytest.raises(ConfigError, match="has 7 classes, the model has 5"):
        load_checkpoint(small(), tmp_path / "seven.pth", same_classes=True)


def test_wrong_file__is_refused(tmp_path):
    torch.save(small("deit_tiny_patch16_224").state_dict(), tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="does not fit"):
        load_checkpoint(small(), tmp_path / "other.pth")


def test_layer_decay__the_decoder_has_factor_one():
    model = small(drop_path_rate=0.0)
    optimizer = OptimizerFactory(lr=1.0, layer_decay=0.5, lr_scaling="none").build(model, 16)
    names = {id(value): name for name, value in model.named_parameters()}
    scales = {names[id(value)]: group["lr_scale"] for group in optimizer.param_groups for value in group["params"]}
    assert scales["decode_head.conv_seg.weight"] == scales["neck.side_layer1.0.weight"] == 1
    assert [scales[f"backbone.blocks.{block}.attn.qkv.weight"] for block in (3, 2, 1, 0)] == [0.5, 0.25, 0.125, 0.0625]
    assert scales["backbone.pos_embed"] == scales["backbone.patch_embed.proj.weight"] == 0.5**5
    decays = {names[id(value)]: group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    assert (
        decays["backbone.pos_embed"] == decays["backbone.cls_token"] == decays["decode_head.bottleneck.bn.weight"] == 0
    )


@pytest.mark.parametrize("layer_decay", [None, 0.9])
def test_decay_all__as_in_the_published_code(layer_decay):
    model = small()
    groups = OptimizerFactory(decay_all=True, weight_decay=0.01, layer_decay=layer_decay).build(model, 16).param_groups
    assert {group["weight_decay"] for group in groups} == {0.01}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_mlp_dropout__rises_with_depth():
    model = small(mlp_dropout=0.3, drop_path_rate=0.0)
    assert [block.mlp.drop1.p for block in model.backbone.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [block.mlp.drop2.p for block in model.backbone.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert not any(isinstance(module, DropPath) for module in model.modules())
    assert small(norm_eps=1e-6).backbone.blocks[0].norm1.eps == 1e-6


def test_linear__keeps_the_backbone_frozen():
    torch.manual_seed(0)
    model = linear_segmenter("lvvit_nano", 5, 64)
    model.train()
    assert not model.backbone.training
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    optimizer = OptimizerFactory(lr=1e-2).build(model, 4)
    outputs = model.forward_outputs(torch.randn(2, 3, 64, 64))
    outputs.cls.square().mean().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert {key for key, value in model.named_parameters() if value.requires_grad} == {
        *("decode_head.batchnorm.weight", "decode_head.batchnorm.bias"),
        *("decode_head.conv_seg.weight", "decode_head.conv_seg.bias"),
    }
    features = create_model("lvvit_nano", 0, 64).eval()
    features.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        images = torch.randn(1, 3, 64, 64)
        expected = features.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (8, 8))
        assert torch.allclose(model.features(images)[0], expected, atol=1e-5)


def test_linear__of_several_blocks():
    model = linear_segmenter("lvvit_nano", 5, 64, taps=[1, 3], frozen=False)
    assert model.decode_head.conv_seg.in_channels == 128
    assert all(value.requires_grad for value in model.backbone.parameters())


@pytest.mark.parametrize(("name", "options", "message"), [
    ("lvvit_nano", {"depth": 2}, "has 2 blocks, segmentation needs at least 4"),
    ("lvvit_nano", {"taps": [0, 1, 2]}, "must be 4 different blocks"),
    ("lvvit_nano", {"taps": [3, 2, 1, 0]}, "in ascending order"),
    ("lvvit_nano", {"taps": [0, 1, 2, 4]}, "model.taps: 4 is not a block"),
    ("lvvit_nano", {"auxiliary_map": 4}, "model.auxiliary_map=4"),
    ("resnet18", {"mlp_dropout": 0.1}, "model.mlp_dropout: resnet18 has no"),
    ("swin_huge", {}, "no such backbone"),
])  # fmt: skip
def test_unfit_options__are_one_sentence(name, options, message):
    with pytest.raises(ConfigError, match=message):
        small(name, **options)


@register_model
def without_maps(pretrained=False, num_classes=10, **options):
    """A backbone of a user, known to timm's registry, with a classifier only."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(num_classes))
    model.pretrained_cfg = model.default_cfg = {"input_size": (3, 64, 64)}
    return model


@pytest.mark.parametrize("build", [upernet, linear_segmenter])
def test_backbone_without_spatial_features__is_refused(build):
    with pytest.raises(ConfigError, match=r"model\.name=without_maps: has no spatial features"):
        build("without_maps", 5)


def test_backbone_without_norm_of_its_maps__names_the_option():
    with pytest.raises(ConfigError, match=r"normalization of features not supported.*or set model\.norm=false\.$"):
        linear_segmenter("hiera_tiny_224", 5)
    assert linear_segmenter("hiera_tiny_224", 5, norm=False).decode_head.conv_seg.in_channels == 768


def test_unused_tokens__are_those_without_influence_on_the_maps():
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))

        def forward_intermediates(self, images, **_):
            return [images * self.used + 0 * self.unused.detach()]

    tokens = Tokens().requires_grad_(False)
    assert unused_tokens(tokens, [0], 64) == [tokens.unused]
    assert not tokens.used.requires_grad


def test_shapes_that_depend_on_values__are_computed():
    class Values(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward_intermediates(self, images, **_):
            return [images[:, :, : int(images.sum() + 2 * self.scale), :4]]

    assert intermediate_shapes(Values(), [0], 64) == [(1, 3, 2, 4)]
