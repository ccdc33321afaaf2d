import pytest
import timm
import torch
from torch.testing import assert_close

import vitrail
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5, "selection_blocks": (1, 2, 3)}
NAMES = ("dynamicvit_deit_tiny", "dynamicvit_lvvit_s")


def small(name, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **kwargs})
    for predictor in model.score_predictor:  # untrained ones score all tokens alike
        torch.nn.init.normal_(predictor.out_conv[4].weight)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_training__keeps_all_tokens_and_evaluation_drops_them(name):
    model, images = small(name, keep_ratio=[0.75, 0.5, 0.25]), torch.randn(3, 3, 64, 64)
    trained = forward_heads(model.train(), images)
    tokens = trained.tokens if trained.tokens is not None else trained.extras["features"]
    assert tokens.shape[:2] == (3, 16)
    decisions = trained.extras["decisions"]
    assert decisions.shape == (3, 3, 16)
    assert (decisions[:, 1:] <= decisions[:, :-1]).all()
    (decisions.mean() + trained.merged().sum()).backward()
    assert all(parameter.grad is not None for parameter in model.score_predictor.parameters())
    with torch.no_grad():
        found = forward_heads(model.eval(), images)
        assert model.forward_features(images).shape == (3, 5, 32)
        assert_close(found.merged(), model(images))
    assert found.extras["decisions"].sum(2).tolist() == [[12, 8, 4]] * 3
    assert set(found.extras) <= model.outputs


@pytest.mark.parametrize("name", NAMES)
def test_mask_and_gather__agree_for_the_same_tokens(name, monkeypatch):
    """Masked attention among the tokens that evaluation keeps gives the same class logits, up to the epsilon."""
    model, images = small(name, mask_eps=0.0).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        gathered = forward_heads(model, images)
        stages = iter(gathered.extras["decisions"].unbind(1))
        monkeypatch.setattr("vitrail.models.dynamic_vit.draw_decisions", lambda *_: next(stages))
        model.training = True  # BatchNorm stays in evaluation mode
        masked = forward_heads(model, images)
    assert_close(masked.cls, gathered.cls, rtol=1e-4, atol=1e-5)
    assert_close(masked.extras["decisions"], gathered.extras["decisions"])


@pytest.mark.parametrize("name", NAMES)
def test_timm_methods__work(name):
    model, images = small(name, keep_ratio=0.5, drop_path_rate=0.1), torch.randn(2, 3, 64, 64)
    losses = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(1)
        model.train()(images).sum().backward()
        losses.append(model.blocks[2].mlp.fc1.weight.grad.clone())
        model.zero_grad()
    assert_close(losses[0], losses[1])
    features, intermediates = model.forward_intermediates(images, indices=2)
    assert [tuple(feature.shape) for feature in intermediates] == [(2, 32, 4, 4)] * 2
    assert features.shape == (2, 17, 32)
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    model.set_input_size((96, 32))
    assert model(torch.randn(2, 3, 96, 32)).shape == (2, 5)
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 96, 32)).shape == (2, 7)


@pytest.mark.thorough
def test_compiled__equals_eager():
    model, images = small("dynamicvit_deit_tiny").eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 1.5}, r"keep_ratio=1.5: must be above 0"),
        ({"selection_blocks": [3, 12]}, r"selection_blocks=\[3, 12\]: needs ascending numbers of blocks"),
        ({"patch_drop_rate": 0.5}, r"patch_drop_rate: this backbone drops patches itself"),
    ],
)
def test_options__invalid_ones_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        create_model("dynamicvit_deit_tiny", 10, 64, **options)


def test_dense_weights__load_with_new_predictors(tmp_path):
    dense = timm.create_model("deit_tiny_patch16_224", **{k: v for k, v in SMALL.items() if k != "selection_blocks"})
    torch.save({"model": dense.state_dict()}, tmp_path / "dense.pth")
    model, images = small("dynamicvit_deit_tiny", keep_ratio=1.0).eval(), torch.randn(2, 3, 64, 64)
    with pytest.raises(ConfigError, match="30 missing keys"):
        vitrail.models.load_checkpoint(model, tmp_path / "dense.pth")
    allowed = [f"{name}.*" for name in model.new_modules]
    notes = vitrail.models.load_checkpoint(model, tmp_path / "dense.pth", allow=allowed)
    assert any("kept untrained: score_predictor" in note for note in notes)
    with torch.no_grad():
        assert_close(model(images), dense.eval()(images), rtol=1e-4, atol=1e-5)
