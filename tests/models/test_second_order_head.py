import pytest
import torch

from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads, load_checkpoint


@pytest.mark.parametrize("name", ["deit_nano", "vit_nano", "t2t_vit_7"])
@pytest.mark.parametrize("token_head", [False, True])
def test_pool__adds_logits_of_the_patch_tokens(name, token_head):
    torch.manual_seed(0)
    options = {"depth": 1} if name == "t2t_vit_7" else {}
    plain = create_model(name, 5, 32, **options).eval()
    model = create_model(name, 5, 32, pool="second_order", token_head=token_head, **options).eval()
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    images = torch.randn(2, 3, 32, 32)
    patches = model.forward_features(images)[:, model.num_prefix_tokens :]
    heads = forward_heads(model, images)
    torch.testing.assert_close(heads.cls, plain(images) + model.second_order(patches))
    assert (heads.tokens is not None) == token_head
    assert len(model.get_classifier()) == 2 + token_head
    model.train()(images).sum().backward()  # T2T-ViT must not drop its patch tokens in training
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.second_order.representation.conv_dr_block[0][0].weight.grad.any()
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.embed_dim)


def test_pool__other_backbones_are_refused():
    for name in ("resnet10t", "so_vit_7", "lvvit_t", "deit_nano_distilled"):
        with pytest.raises(ConfigError, match=r"model.pool=second_order: .* is not a ViT with a single classifier"):
            create_model(name, 5, 32, pool="second_order")


def test_pool__starts_from_a_checkpoint_without_it(tmp_path):
    source = create_model("deit_nano", 5, 32)
    torch.save(source.state_dict(), tmp_path / "x.pth")
    model = create_model("deit_nano", 5, 32, pool="second_order")
    notes = load_checkpoint(model, tmp_path / "x.pth", allow=["second_order.*"])
    assert notes[-1].startswith("not in the checkpoint, kept untrained: second_order.normalization.weight")
    torch.save(model.state_dict(), tmp_path / "y.pth")
    notes = load_checkpoint(create_model("deit_nano", 3, 32, pool="second_order"), tmp_path / "y.pth")
    assert notes == ["5 classes in the checkpoint, 3 in the model: head, second_order.visual_fc not loaded."]
