import copy

import pytest
import torch

from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.heads import mix_tokens


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("deit_nano", 16), ("deit_nano_distilled", 16), ("vit_nano", 4), ("t2t_vit_7", 1), ("deit3_small_patch16_224", 1)],
)
def test_dense_head__for_every_vit(name, tokens):
    torch.manual_seed(0)
    size = {"depth": 1} | ({"img_size": 16})
    plain = create_model(name, 5, **size)
    model = create_model(name, 5, dense_head=True, **size)
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


def test_dense_head__survives_copies_and_keeps_timm_methods():
    model = create_model("deit_nano", 5, img_size=16, dense_head=True).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(copy.deepcopy(model)(images), model(images))
    assert type(model).__name__ == "DenseVisionTransformer"
    assert type(create_model("deit_nano", 5, dense_head=True)) is type(model)
    assert len(model.forward_intermediates(images, indices=[0], intermediates_only=True)) == 1
    assert create_model("lvvit_t", 5, dense_head=True).aux_head.out_features == 5


def test_dense_head__refuses_what_has_no_patch_tokens():
    with pytest.raises(ConfigError, match=r"model.dense_head=true: ResNet has no patch tokens"):
        create_model("resnet10t", 5, dense_head=True)


def test_mixtoken__needs_a_dense_head():
    with pytest.raises(ConfigError, match=r"MixToken needs token logits.*model.dense_head=true"):
        forward_heads(create_model("deit_nano", 5), torch.randn(2, 3, 32, 32), torch.tensor([0, 0, 1, 1]))


def test_mix_tokens__by_hand():
    x = torch.arange(12.0).reshape(2, 6, 1)  # a grid of 2 x 3
    mixed = mix_tokens(x, torch.tensor([0, 1, 2, 2]), (2, 3))
    assert mixed.flatten().tolist() == [0, 7, 2, 3, 10, 5, 6, 1, 8, 9, 4, 11]
    torch.testing.assert_close(mix_tokens(mixed, torch.tensor([0, 1, 2, 2]), (2, 3)), x)
