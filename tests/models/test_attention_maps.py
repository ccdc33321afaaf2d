"""Attention maps against attention that is computed by hand, for backbones of timm and vitrail."""

import pytest
import timm
import torch
import torch.nn.functional as F

from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.models.attention_maps import attention_rollout, attention_weights, class_attention, rollout

SMALL = {"img_size": 32, "depth": 3, "embed_dim": 32, "num_heads": 2, "patch_size": 8}


def recorded_by_hooks(model, images):
    """Return timm's attention weights (B, T, T) of each block, as its code without fused attention computes them."""
    weights, handles = [], []
    for block in model.blocks:
        block.attn.fused_attn = False
        keep = lambda _, arguments, __: weights.append(arguments[0].mean(1))  # noqa: E731
        handles.append(block.attn.attn_drop.register_forward_hook(keep))
    with torch.no_grad():
        model.eval()(images)
    for block, handle in zip(model.blocks, handles, strict=True):
        block.attn.fused_attn = True
        handle.remove()
    return weights


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_weights__equal_timms_own(name):
    torch.manual_seed(0)
    model, images = timm.create_model(name, **SMALL), torch.randn(2, 3, 32, 32)
    expected = recorded_by_hooks(model, images)
    found = attention_weights(model.train(), images)
    assert model.training
    assert len(found) == 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    maps = class_attention(model, images)
    prefix = model.num_prefix_tokens
    patches = expected[-1][:, 0, prefix:]
    torch.testing.assert_close(maps.flatten(1), patches / patches.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert maps.shape == (2, 4, 4)


def test_rollout__by_hand():
    """Two tokens, two blocks: ((A2 + I) / 2) ((A1 + I) / 2)."""
    first = torch.tensor([[[0.5, 0.5], [0.0, 1.0]]])
    second = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    expected = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]) @ torch.tensor([[[0.75, 0.25], [0.0, 1.0]]])
    torch.testing.assert_close(rollout([first, second]), expected)
    torch.testing.assert_close(rollout([first, second[:, :1]]), expected[:, :1])  # a last block of the class token only


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["t2t_vit_7", "lvvit_t", "evo_deit_tiny_patch16_224", "vit5_small", "so_vit_7", "volo_d1_224"]
)
def test_maps__of_vitrails_backbones(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, img_size=64).eval()
    images = torch.randn(2, 3, 64, 64)
    for maps in (class_attention(model, images), attention_rollout(model, images)):
        assert maps.shape == (2, 4, 4)
        assert (maps >= 0).all()
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(2))


def test_maps__of_volo_are_those_of_its_class_attention():
    """The class token sees the patches through two blocks; the patches see one another through the blocks before."""
    torch.manual_seed(0)
    model = create_model("volo_d1_224", num_classes=5, img_size=64).eval()
    images, kept = torch.randn(2, 3, 64, 64), []
    for block in model.post_network:
        block.attn.attn_drop.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0].mean(1)))
    weights = attention_weights(model, images)
    first, second = kept
    assert [tuple(one.shape) for one in weights] == [(2, 17, 17)] * (sum(map(len, model.network[2:])) + 2)
    expected = second[:, 0, 1:] / second[:, 0, 1:].sum(1, keepdim=True)
    torch.testing.assert_close(class_attention(model, images).flatten(1), expected)
    seen = (second[:, :, 1:] + (1 + second[:, :, :1]) * first[:, :, 1:] / 2) / 2  # (B, 1, N), with the residual paths
    patches = torch.eye(16)
    for block in weights[:-2]:
        patches = (block[:, 1:, 1:] + torch.eye(16)) / 2 @ patches
    flow = (seen @ patches)[:, 0]
    torch.testing.assert_close(attention_rollout(model, images).flatten(1), flow / flow.sum(1, keepdim=True))


def test_maps__of_a_cnn_are_refused():
    model = timm.create_model("resnet18", num_classes=2)
    with pytest.raises(ConfigError, match="ResNet has no attention"):
        class_attention(model, torch.randn(1, 3, 64, 64))


def test_maps__find_the_token_that_is_attended_to():
    """A ViT whose keys make one patch stand out: both maps have their maximum there."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **SMALL, class_token=True).eval()
    images = 0.01 * torch.randn(1, 3, 32, 32)
    images[:, :, 16:24, 8:16] += 5  # patch (2, 1)
    with torch.no_grad():
        for block in model.blocks:
            tokens = block.norm1(model.patch_embed(images))[:, 2 * 4 + 1]
            query, key, value = block.attn.qkv.weight.split(32)
            block.attn.qkv.bias[:32] = 20 * F.normalize(tokens @ key.T, dim=-1)[0]
            query.zero_()
            key.mul_(5)
            value.mul_(0.01)
    for maps in (class_attention(model, images), attention_rollout(model, images)):
        assert divmod(int(maps[0].argmax()), 4) == (2, 1)
