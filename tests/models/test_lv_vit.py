import pytest
import timm
import torch

import vitrail  # noqa: F401
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.lv_vit import ConvStem


def small(name="lvvit_s", **kwargs):
    torch.manual_seed(0)
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model(name, **{**config, **kwargs})


@pytest.mark.parametrize("patch", [2, 4, 8, 16])
@pytest.mark.parametrize("size", [(32, 32), (48, 80), (31, 33)])
def test_stem__grid_matches_output(patch, size):
    stem = ConvStem(size, patch, embed_dim=8, width=4)
    assert stem(torch.randn(1, 3, *size)).shape == (1, stem.num_patches, 8)
    kept = ConvStem(size, patch, embed_dim=8, width=4, output_fmt="NHWC")
    assert kept(torch.randn(1, 3, *size)).shape == (1, *stem.grid_size, 8)
    with pytest.raises(ValueError, match="patch_size=7: the convolutional stem halves"):
        ConvStem(size, 7)


def test_logits__class_plus_half_the_maximum_over_tokens():
    model, images = small(), torch.randn(4, 3, 32, 32)
    for training in (False, True):
        heads = forward_heads(model.train(training), images)
        assert heads.tokens.shape == (4, 16, 5)
        torch.testing.assert_close(model(images), heads.cls + 0.5 * heads.tokens.amax(1))
    assert forward_heads(small("lvvit"), images).tokens is None


def test_residual_scale__divides_the_branches():
    """With branches divided by 2, a block adds half of what it adds with a scale of 1."""
    scaled, plain = small(depth=1), small(depth=1, skip_lam=1)
    plain.load_state_dict(scaled.state_dict())
    block_scaled, block_plain = scaled.blocks[0], plain.blocks[0]
    for block in (block_scaled, block_plain):
        torch.nn.init.zeros_(block.mlp.fc2.weight)
    x = torch.randn(2, 17, 32)
    torch.testing.assert_close(2 * (block_scaled(x) - x), block_plain(x) - x, rtol=1e-4, atol=1e-6)


def test_mixtoken__swaps_patches_and_restores_the_order_of_logits():
    """With blocks that are the identity, a token's logits depend only on its own patch and position."""
    model = small(depth=1).eval()
    for weight in (model.blocks[0].attn.proj.weight, model.blocks[0].mlp.fc2.weight):
        torch.nn.init.zeros_(weight)
    images = torch.randn(4, 3, 32, 32)
    plain = forward_heads(model, images)
    box = torch.tensor([1, 0, 3, 2])
    mixed = forward_heads(model, images, box)
    torch.testing.assert_close(mixed.tokens, plain.tokens)  # swapped twice
    features = []
    model.blocks[0].register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0][:, 1:] - model.pos_embed[:, 1:])
    )
    forward_heads(model, images)
    forward_heads(model, images, box)
    before, after = (x.unflatten(1, (4, 4)) for x in features)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[1:3, 0:2] = True
    torch.testing.assert_close(after[:, inside], before.flip(0)[:, inside])
    torch.testing.assert_close(after[:, ~inside], before[:, ~inside])


def test_mixtoken__empty_box_changes_nothing():
    model, images = small().eval(), torch.randn(4, 3, 32, 32)
    mixed, plain = forward_heads(model, images, torch.tensor([2, 2, 2, 4])), forward_heads(model, images)
    torch.testing.assert_close(mixed[:2], plain[:2])


def test_reset_classifier__resets_both():
    model = small()
    model.reset_classifier(9)
    heads = forward_heads(model, torch.randn(2, 3, 32, 32))
    assert heads.cls.shape == (2, 9)
    assert heads.tokens.shape == (2, 16, 9)
    assert [layer.out_features for layer in model.get_classifier()] == [9, 9]
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    assert small(num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize("name", ["lvvit_s", "vit"])
def test_training__same_gradients_with_checkpointing(name):
    images, grads = torch.randn(4, 3, 32, 32), []
    for checkpointing in (False, True):
        model = small(name)
        model.set_grad_checkpointing(checkpointing)
        sum(head.square().mean() for head in forward_heads(model, images)[:3] if head is not None).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1])


def test_dynamic_image_size__equals_a_model_of_that_size():
    fixed, dynamic = small().eval(), small(dynamic_img_size=True).eval()
    dynamic.load_state_dict(fixed.state_dict())
    images, box = torch.randn(2, 3, 32, 32), torch.tensor([0, 0, 2, 3])
    for left, right in zip(forward_heads(dynamic, images, box), forward_heads(fixed, images, box), strict=True):
        if left is not None:
            torch.testing.assert_close(left, right)
    assert forward_heads(dynamic, torch.randn(2, 3, 40, 64)).tokens.shape == (2, 40, 5)


def test_image_size__not_a_multiple_of_the_patch_size():
    with pytest.raises(ConfigError, match=r"data.image_size=40: lvvit_t needs a multiple of its patch size 16"):
        create_model("lvvit_t", 5, img_size=40)
