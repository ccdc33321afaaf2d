"""What explains predictions: where the kept tokens are, what the tokens are called, and gradients by hand."""

import pytest
import timm
import torch

from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.attention_maps import attention_weights
from vitrail.models.explanations import KINDS, check_kinds, explain
from vitrail.models.gradient_maps import gradient_map


def network(name, size=64, **arguments):
    torch.manual_seed(0)
    model = create_model(name, 5, size, **arguments).eval()
    heads = model.get_classifier()
    for module in torch.nn.ModuleList(heads if isinstance(heads, tuple) else [heads]).modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.1)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["dynamicvit_lvvit_nano", "evo_deit_tiny_patch16_224"])
@pytest.mark.parametrize("stage_wise", [False, True])
def test_attention__of_a_network_that_selects_tokens(images, name, stage_wise):
    """Tokens that are left out attend to themselves only, and nothing attends to them."""
    model = network(name)
    model.stage_wise_prune = stage_wise
    kept = forward_heads(model, images).extras["decisions"].bool()  # (B, S, N)
    weights = attention_weights(model, images)
    assert len(weights) == len(model.blocks)
    for block, attention in enumerate(weights):
        torch.testing.assert_close(attention.sum(2), torch.ones(2, attention.shape[1]))
        selection = sum(start <= block for start in model.selection_blocks) - 1
        if selection < 0:
            assert (attention > 0).all()
            continue
        for row, chosen in zip(attention, kept[:, selection], strict=True):
            left_out = torch.cat((torch.tensor([False]), ~chosen))
            assert torch.equal(row[left_out], torch.eye(len(row))[left_out])
            assert (row[~left_out][:, left_out] == 0).all()
            assert (row[~left_out][:, ~left_out] > 0).all()


def test_attention__keeping_everything_is_the_dense_network(images):
    """With a keep ratio of 1, the attention equals that of the LV-ViT with the same weights."""
    pruned = network("dynamicvit_lvvit_nano", keep_ratio=1.0)
    dense = network("lvvit_nano", token_head=True)
    dense.load_state_dict({key: value for key, value in pruned.state_dict().items() if "predictor" not in key})
    for one, other in zip(attention_weights(pruned, images), attention_weights(dense, images), strict=True):
        torch.testing.assert_close(one, other)


def test_gradient__of_a_cnn_by_hand(images):
    model = network("test_resnet")
    activations = []
    layer = model.get_submodule(model.feature_info[-1]["module"])
    handle = layer.register_forward_hook(lambda _, __, output: activations.append(output))
    logits = model(images)
    (gradient,) = torch.autograd.grad(logits[0, 3] + logits[1, 0], activations)
    handle.remove()
    expected = (gradient * activations[0]).sum(1).clamp_min(0)
    with torch.inference_mode():  # as Lightning validates
        found = gradient_map(model, images.clone(), torch.tensor([3, 0]))
    torch.testing.assert_close(found, expected.detach())
    assert found.any()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["deit_nano", "swin_tiny_patch4_window7_224", "levit_128s", "lvvit_nano"])
def test_gradient__of_every_kind_of_network(name):
    size = 64 if name.endswith("nano") else 224
    found = gradient_map(network(name, size), torch.randn(1, 3, size, size), torch.tensor([2]))
    assert found.ndim == 3
    assert found.any()
    assert (found >= 0).all()


def test_gradient__of_dropped_tokens_is_zero(images):
    model = network("dynamicvit_lvvit_nano")
    found = explain(model, images, ["gradient", "kept"])
    assert found.heats["gradient"].any()
    assert (found.heats["gradient"][found.kept[:, -1] == 0] == 0).all()


def test_tokens__are_the_softmax_of_the_token_logits(images):
    model = network("lvvit_nano", token_head=True)
    found = explain(model.train(), images, ["tokens"])
    assert model.training
    with torch.no_grad():
        expected = forward_heads(model.eval(), images).tokens.softmax(-1)
    torch.testing.assert_close(found.tokens.flatten(2).mT, expected)
    assert found.kept is None
    assert found.heats == {}


def test_tokens__dropped_ones_have_no_class(images):
    model = network("dynamicvit_lvvit_nano")
    found = explain(model, images, ["tokens", "kept"])
    assert found.kept.mean((0, 2, 3)).tolist() == pytest.approx([0.7, 0.49, 0.34], abs=0.02)
    kept = found.kept[:, -1].bool()
    sums = found.tokens.sum(1)
    torch.testing.assert_close(sums[kept], torch.ones(kept.sum()))
    assert (sums[~kept] == 0).all()
    one = found.of(1)
    assert torch.equal(one.tokens[0], found.tokens[1])
    assert torch.equal(one.kept, found.kept[1:])


def test_kept__of_evo_levit_on_the_first_grid():
    model = network("evo_levit_128s", 224)
    kept = explain(model, torch.randn(1, 3, 224, 224), ["kept"]).kept
    assert kept.shape[2:] == (14, 14)
    assert set(kept.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("deit_nano", "tokens", "explain=tokens: .* does not classify its patch tokens; use model.token_head=true."),
        ("deit_nano", "kept", "explain=kept: .* keeps all its tokens; choose a DynamicViT or Evo-ViT."),
        ("deit_nano", "colours", f"explain=colours: cannot be drawn; choose from {', '.join(KINDS)}."),
        ("test_resnet", "rollout", "explain=rollout: ResNet has no attention over all its patch tokens."),
        ("evo_levit_128s", "gradient", "explain=gradient: EvoLevit selects tokens within its stages"),
    ],
)
def test_check__one_sentence(name, kind, message):
    size = 224 if name.startswith("evo") else 64
    with pytest.raises(ConfigError, match=message):
        check_kinds(network(name, size), [kind], (size, size))


def test_check__token_classifier_of_a_linear_probe():
    model = network("lvvit_nano", token_head=True)
    torch.nn.init.zeros_(model.aux_head.weight)
    with pytest.raises(ConfigError, match="explain=tokens: the classifier of patch tokens is zero"):
        check_kinds(model, ["tokens"], (64, 64))


def test_gradient__needs_captum(monkeypatch, images):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'vitrail\[explain\]'"):
        gradient_map(timm.create_model("test_resnet"), images, torch.tensor([0, 0]))
