"""A ViT runs at several image sizes with one position table."""

import pytest
import timm
import torch

from vitrail.models import create_model, forward_heads
from vitrail.models.any_size import allow_any_size, resize_positions
from vitrail.models.cost import measure_cost

BACKBONES = [
    ("deit_nano", {}, 32, 24),
    ("deit_nano_distilled", {}, 32, 24),
    ("vit_nano", {}, 32, 24),
    ("lvvit_s", {"depth": 1}, 64, 48),
    ("lvvit_nano", {"token_head": True}, 64, 48),
    ("t2t_vit_7", {"depth": 2}, 64, 48),
    ("t2t_vit_dense", {}, 64, 48),
    ("so_vit_7", {"depth": 2}, 64, 48),
    ("sot_tiny", {"depth": 2, "token_head": True}, 64, 48),
    ("vit_plain_small_patch16_224", {"depth": 1}, 64, 32),
    ("deit3_small_patch16_224", {"depth": 1}, 64, 32),
    ("vit_little_patch16_reg4_gap_256", {"depth": 1}, 64, 48),
    ("vit_tiny_patch16_224", {"depth": 1, "token_head": True}, 64, 48),
    ("vit5_small", {"depth": 2}, 64, 48),
    ("vit_small_patch16_dinov3", {"depth": 2}, 64, 48),
    ("volo_d1_224", {}, 64, 96),
]


@pytest.mark.parametrize(("name", "arguments", "side", "other"), BACKBONES, ids=[row[0] for row in BACKBONES])
def test_any_size__same_logits_at_the_own_size_and_the_right_grid_at_others(name, arguments, side, other):
    torch.manual_seed(0)
    model = create_model(name, 5, side, **arguments).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        before, state = forward_heads(model, images), {key: value.shape for key, value in model.state_dict().items()}
        after = forward_heads(allow_any_size(model), images)
        smaller = forward_heads(model, torch.randn(2, 3, other, other))
    assert torch.equal(before.cls, after.cls)
    assert {key: value.shape for key, value in model.state_dict().items()} == state
    assert smaller.cls.shape == (2, 5)
    if smaller.tokens is not None:
        rows, columns = model.token_grid((other, other))
        assert smaller.tokens.shape == (2, rows * columns, 5)
        assert torch.equal(before.tokens, after.tokens)


@pytest.mark.parametrize("name", ["lvvit_s", "vit_tiny_patch16_224"])
def test_mix_token__follows_the_grid_of_the_images(name):
    """An image with itself as partner has the same logits as without MixToken, at another size too."""
    torch.manual_seed(0)
    model = allow_any_size(create_model(name, 5, 64, depth=1, token_head=True)).eval()
    image = torch.randn(1, 3, 48, 48).expand(2, -1, -1, -1)
    with torch.no_grad():
        plain, mixed = forward_heads(model, image), forward_heads(model, image, torch.tensor([0, 1, 2, 3]))
    torch.testing.assert_close(mixed.cls, plain.cls)
    torch.testing.assert_close(mixed.tokens, plain.tokens)


@pytest.mark.parametrize(("old", "new"), [((14, 14), (10, 10)), ((14, 14), (6, 6)), ((4, 6), (7, 3))])
def test_resize__equals_antialiased_bilinear_interpolation(old, new):
    table = torch.randn(1, 2 + old[0] * old[1], 8)
    expected = timm.layers.resample_abs_pos_embed(table, list(new), list(old), 2, interpolation="bilinear")
    torch.testing.assert_close(resize_positions(table, old, new, 2), expected)


def test_resize__every_cell_gets_a_gradient():
    """14 x 14 cells resized to 6 x 6: without antialiasing, a third of the cells would not train."""
    table = torch.randn(1, 14 * 14, 1, requires_grad=True)
    resize_positions(table, (14, 14), (6, 6), 0).sum().backward()
    assert (table.grad > 0).all()


def test_others__are_unchanged():
    for name in ("resnet18", "swin_tiny_patch4_window7_224"):
        model = create_model(name, 5, 224)
        assert type(allow_any_size(model)) is type(create_model(name, 5, 224))


@pytest.mark.thorough
def test_cost__is_that_of_the_size():
    """A ViT-S at 160 pixels has half the multiply-accumulates of 224."""
    model = allow_any_size(create_model("deit_small_patch16_224", 1000))
    shares = [measure_cost(model, (side, side)).macs / measure_cost(model, (224, 224)).macs for side in (96, 160, 192)]
    assert shares == pytest.approx([0.18, 0.49, 0.72], abs=0.005)
