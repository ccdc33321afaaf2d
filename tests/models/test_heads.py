import copy

import pytest
import torch

from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.heads import add_token_head, mix_tokens, token_grid


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("deit_nano", 16), ("deit_nano_distilled", 16), ("vit_nano", 4), ("t2t_vit_7", 1), ("deit3_small_patch16_224", 1)],
)
def test_token_head__any_vit(name, tokens):
    torch.manual_seed(0)
    size = {"depth": 1} | ({"img_size": 16})
    plain = create_model(name, 5, **size)
    model = create_model(name, 5, token_head=True, **size)
    assert set(model.state_dict()) - set(plain.state_dict()) == {"aux_head.weight", "aux_head.bias"}
    assert list(model.state_dict())[-2:] == ["aux_head.weight", "aux_head.bias"]
    images = torch.randn(2, 3, 16, 16)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.eval(), model.eval()
    heads = forward_heads(model, images)
    assert heads.tokens.shape == (2, tokens, 5)
    cls = heads.cls if heads.distill is None else (heads.cls + heads.distill) / 2
    torch.testing.assert_close(cls, plain(images))
    torch.testing.assert_close(model(images), cls + 0.5 * heads.tokens.amax(1))
    model.reset_classifier(7)
    assert forward_heads(model, images).tokens.shape == (2, tokens, 7)


def test_token_head__works_after_copying_and_keeps_timm_methods():
    model = create_model("deit_nano", 5, img_size=16, token_head=True).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(copy.deepcopy(model)(images), model(images))
    assert type(model).__name__ == "VisionTransformerWithTokenHead"
    assert type(create_model("deit_nano", 5, token_head=True)) is type(model)
    assert len(model.forward_intermediates(images, indices=[0], intermediates_only=True)) == 1
    assert create_model("lvvit_t", 5, token_head=True).aux_head.out_features == 5


FAMILIES = [
    ("mixer_s16_224", {}, 224, (14, 14)),
    ("swin_tiny_patch4_window7_224", {"depths": (1, 1)}, 64, (8, 8)),
    ("convnext_atto", {"depths": (1, 1, 1, 1)}, 64, (2, 2)),
    ("volo_d1_224", {}, 64, (4, 4)),
    ("resnet10t", {}, (64, 96), (2, 3)),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "options", "size", "grid"), FAMILIES)
def test_token_head__other_families_of_timm(name, options, size, grid):
    """Any spatial feature map or token sequence gives token logits, and class logits stay the same."""
    torch.manual_seed(0)
    sides = (size, size) if isinstance(size, int) else size
    plain = create_model(name, 5, sides, **options).eval()
    model = create_model(name, 5, sides, token_head=True, **options)
    plain.load_state_dict(model.state_dict(), strict=False)
    model.eval()
    images = torch.randn(2, 3, *sides)
    assert token_grid(model, sides) == grid
    outputs = forward_heads(model, images)
    assert outputs.tokens.shape == (2, grid[0] * grid[1], 5)
    torch.testing.assert_close(model(images), outputs.cls + 0.5 * outputs.tokens.amax(1))
    if not name.startswith("volo"):  # its own `forward` already merges both heads
        torch.testing.assert_close(outputs.cls, plain(images))
    else:
        torch.testing.assert_close(model(images), plain(images))
    model.train()
    forward_heads(model, images).tokens.sum().backward()
    assert model.aux_head.weight.grad.abs().sum() > 0
    model.reset_classifier(7)
    assert forward_heads(model, images).tokens.shape == (2, grid[0] * grid[1], 7)


def test_token_grid__leaves_the_weights_of_shared_modules_in_place():
    model = create_model("coat_lite_tiny", 5, 64, token_head=True).eval()
    before = {name: tensor.clone() for name, tensor in model.named_parameters(remove_duplicate=False)}
    assert token_grid(model, (64, 64)) == (2, 2)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert forward_heads(model, torch.randn(1, 3, 64, 64)).tokens.isfinite().all()


def test_token_head__depends_only_on_its_position():
    """Each position of a feature map is normalised and classified by `aux_head` separately."""
    torch.manual_seed(0)
    model = create_model("convnext_atto", 5, token_head=True, depths=(1, 1, 1, 1)).eval()
    images = torch.randn(1, 3, 64, 64)
    features = model.forward_features(images)
    position = features[:, :, 1, 0][..., None, None]
    expected = model.aux_head(model.head(position, pre_logits=True))
    torch.testing.assert_close(forward_heads(model, images).tokens[:, 2], expected)


def test_token_head__no_spatial_features():
    with pytest.raises(ConfigError, match=r"model.token_head=true: Linear has no spatial features"):
        add_token_head(torch.nn.Linear(3, 3))


def test_mixtoken__needs_a_backbone_that_swaps_tokens():
    with pytest.raises(ConfigError, match=r"MixToken needs a backbone that swaps tokens.*VisionTransformer does not"):
        forward_heads(create_model("deit_nano", 5), torch.randn(2, 3, 32, 32), torch.tensor([0, 0, 1, 1]))


def test_mix_tokens__by_hand():
    x = torch.arange(12.0).reshape(2, 6, 1)  # a grid of 2 x 3
    mixed = mix_tokens(x, torch.tensor([0, 1, 2, 2]), (2, 3))
    assert mixed.flatten().tolist() == [0, 7, 2, 3, 10, 5, 6, 1, 8, 9, 4, 11]
    torch.testing.assert_close(mix_tokens(mixed, torch.tensor([0, 1, 2, 2]), (2, 3)), x)
