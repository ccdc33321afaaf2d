import copy

import pytest
import timm
import torch
from torch.testing import assert_close

import vitrail  # noqa: F401
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads

SMALL = {"img_size": 64, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5, "stages": (1, 3)}


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("evo_deit_tiny_patch16_224", **{**SMALL, **kwargs})


@pytest.mark.thorough
@pytest.mark.parametrize("stage_wise", [False, True])
def test_training_and_evaluation__compute_the_same(stage_wise):
    model, images = small(), torch.randn(3, 3, 64, 64)
    model.stage_wise_prune = stage_wise
    trained = forward_heads(model.train(), images)
    assert trained.extras["decisions"].shape == (3, 2 if stage_wise else 3, 16)
    assert (trained.extras["decisions"].sum(2) == 8).all()
    (trained.cls.sum() + trained.extras["class_token"].sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.no_grad():
        assert_close(model.eval()(images), trained.cls)
        assert model.forward_features(images).shape == (3, 17, 32)
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), trained.cls)
    assert set(trained.extras) == model.outputs


def test_left_out_tokens__are_carried_unchanged():
    model, images = small(stages=(3,)).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        left_out = forward_heads(model, images).extras["decisions"][:, 0] == 0
        features = model.forward_features(images)
        before = model.forward_intermediates(images, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
    assert_close(features[:, 1:][left_out], before[left_out])
    assert not torch.isclose(features[:, 1:][~left_out], before[~left_out]).all(-1).any()


def test_384_pixels__positions_and_decisions_follow_the_grid():
    with torch.device("meta"):
        model = create_model("evo_deit_base_patch16_224", 1000, 384)
        outputs = forward_heads(model, torch.empty(1, 3, 384, 384))
    assert model.pos_embed.shape == (1, 577, 768)
    assert sum(parameter.numel() for parameter in model.parameters()) == 87_630_032
    assert (outputs.cls.shape, outputs.extras["decisions"].shape[-1]) == ((1, 1000), 576)


def test_keep_ratio_of_one__is_a_plain_vit():
    model, images = small(keep_ratio=1.0).eval(), torch.randn(2, 3, 64, 64)
    plain = timm.create_model(
        "vit_tiny_patch16_224", global_pool="avg", **{key: value for key, value in SMALL.items() if key != "stages"}
    )
    plain.load_state_dict({key: model.state_dict()[key] for key in plain.state_dict()})
    with torch.no_grad():
        assert_close(model(images), plain.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tradeoff", "scored"), [([1, 1, 1, 0.5], 1), ([1, 0.5, 1, 0.5], 1), ([1, 1, 0.5, 0.5], 2)])
def test_scores_that_the_next_block_replaces__are_not_computed(tradeoff, scored, monkeypatch):
    model, images, calls = small(stages=(3,), tradeoff=tradeoff).eval(), torch.randn(2, 3, 64, 64), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        found = model(images)
        assert sum("scored" in kwargs for kwargs in calls) == scored
        monkeypatch.setattr(model, "_first_scored", 0)
        assert torch.equal(found, model(images))
    assert sum("scored" in kwargs for kwargs in calls[len(model.blocks) :]) == 3


def test_mode__changes_with_the_epoch_and_is_in_the_state_dict():
    model = small()
    modes = []
    for epoch in range(300):
        model.begin_epoch(epoch, 300)
        modes.append(model.stage_wise_prune)
    assert modes == [False] * 200 + [True] * 100
    assert copy.deepcopy(model).stage_wise_prune
    fresh = small()
    assert not fresh.stage_wise_prune
    fresh.load_state_dict(model.state_dict())
    assert fresh.stage_wise_prune


def test_timm_methods__work():
    model, images = small(drop_path_rate=0.1), torch.randn(2, 3, 64, 64)
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(1)
        model.train()(images).sum().backward()
        gradients.append(model.blocks[2].mlp.fc1.weight.grad.clone())
        model.zero_grad()
    assert_close(*gradients)
    assert {"pos_embed", "cls_token"} <= model.no_weight_decay()
    model.set_input_size((96, 32))
    model.reset_classifier(7)
    heads = forward_heads(model, torch.randn(2, 3, 96, 32))
    assert heads.cls.shape == heads.extras["class_token"].shape == (2, 7)
    assert [head.out_features for head in model.get_classifier()] == [7, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0}, r"keep_ratio=.*: needs 12 numbers, one per block, above 0"),
        ({"tradeoff": [1.0]}, r"tradeoff=\[1.0\]: needs 12 numbers"),
        ({"stages": [0, 4]}, r"stages=\[0, 4\]: needs ascending numbers of blocks after the first"),
        ({"patch_drop_rate": 0.5}, r"patch_drop_rate: this backbone drops patches itself"),
    ],
)
def test_options__invalid_ones_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        create_model("evo_deit_tiny_patch16_224", 10, 64, **options)
