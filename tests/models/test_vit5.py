import pytest
import timm
import torch

import vitrail  # noqa: F401
from checkpointed import assert_same_gradients
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads, load_checkpoint
from vitrail.models.vit5 import drop_rotary_bands


def small(name="vit5_small", **kwargs):
    torch.manual_seed(0)
    config = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(name, **{**config, **kwargs})
    for block in model.blocks:  # initially 1e-4, which hides the blocks
        torch.nn.init.ones_(block.gamma_1)
        torch.nn.init.ones_(block.gamma_2)
    return model


class Shuffle(torch.nn.Module):
    """Patch dropout that keeps all 16 patches of two images, in random order."""

    def forward(self, x):
        order = torch.stack([torch.randperm(16), torch.randperm(16)])
        patches = x[:, 5:].gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
        return torch.cat((x[:, :5], patches), 1), order


def test_registers__rotated_like_a_grid():
    """Two registers with the same content differ in what they contribute, because of their places."""
    rotation = small()._pos_embed(torch.zeros(1, 16, 32))[1]
    assert rotation.shape == (4 + 16, 2 * 16)
    assert not torch.equal(rotation[0], rotation[3])
    assert torch.equal(rotation[0], rotation[4])  # both are the first cell of their grids
    assert small(num_reg_tokens=0)._pos_embed(torch.zeros(1, 16, 32))[1].shape == (16, 32)
    with pytest.raises(ValueError, match="num_reg_tokens=3: registers form a square grid"):
        small(num_reg_tokens=3)


def test_arguments__of_timm_work():
    images = torch.randn(2, 3, 32, 32)
    model = small(drop_rate=0.1, patch_drop_rate=0.5, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.2)
    assert model.train()(images).shape == (2, 5)
    assert small(global_pool="avg")(images).shape == (2, 5)
    assert small(in_chans=1)(images[:, :1]).shape == (2, 5)
    assert small(num_classes=0)(images).shape == (2, 32)
    assert small(dynamic_img_size=True)(torch.randn(2, 3, 48, 64)).shape == (2, 5)
    maps = timm.create_model("vit5_small", features_only=True, img_size=32, embed_dim=32, num_heads=2)(images)
    assert [list(level.shape) for level in maps] == [[2, 32, 2, 2]] * 3
    assert small().no_weight_decay() == {"pos_embed", "cls_token", "reg_token"}


def test_methods__of_timm_work():
    images, model = torch.randn(2, 3, 32, 32), small().eval()
    features = model.forward_features(images)
    assert features.shape == (2, 1 + 4 + 16, 32)
    torch.testing.assert_close(model.forward_head(features), model(images))
    last, levels = model.forward_intermediates(images)
    torch.testing.assert_close(last, features)
    assert [level.shape for level in levels] == [(2, 32, 4, 4)] * 2
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.set_input_size((48, 64))
    assert model(torch.randn(2, 3, 48, 64)).shape == (2, 7)


def test_training__same_gradients_with_checkpointing():
    images = torch.randn(2, 3, 32, 32)
    assert_same_gradients(small, lambda model: model(images).square().mean())


def test_patch_dropout__keeps_the_rotation_of_each_patch():
    """With the rate 0 in evaluation, and with all patches kept in another order, the logits stay the same."""
    images, model = torch.randn(2, 3, 32, 32), small(patch_drop_rate=0.5).eval()
    expected = model(images)
    torch.testing.assert_close(small()(images), expected)

    model.patch_drop = Shuffle()
    torch.testing.assert_close(model(images), expected)


def test_token_head__logits_of_patches_only():
    model = create_model("vit5_small", 5, 32, token_head=True, embed_dim=32, depth=1, num_heads=2, patch_size=8)
    assert model.token_grid((32, 32)) == (4, 4)
    assert forward_heads(model, torch.randn(2, 3, 32, 32)).tokens.shape == (2, 16, 5)


def test_mixed_precision__close_to_float32():
    images, model = torch.randn(4, 3, 32, 32), small().eval()
    with torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(images)
    assert (half - exact).abs().max() < 0.05 * exact.std()


def test_official_checkpoint__another_rotation_is_refused(tmp_path):
    model = small()
    bands = 10_000 ** -(torch.arange(4) / 4)
    kept = drop_rotary_bands({"head.bias": torch.zeros(5), "blocks.0.attn.rope.freqs": bands})
    assert list(kept) == ["head.bias"]
    weights = {**model.state_dict(), "blocks.0.attn.rope_reg.freqs": bands}
    torch.save({"model": weights}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"rope_reg.freqs does not match the rotary embedding of ViT-5 \(base 100\);"):
        load_checkpoint(model, tmp_path / "x.pth")


def test_official_checkpoint__without_registers_is_refused(tmp_path):
    torch.save(small(num_reg_tokens=0).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="missing keys"):
        load_checkpoint(small(), tmp_path / "x.pth")
