import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch.testing import assert_close

import vitrail  # noqa: F401
from checkpointed import assert_same_gradients
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads, load_checkpoint

SMALL = {"img_size": 96, "embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (3, 2, 2)}


def small(**kwargs):
    """Return a model with grids of 6 x 6, 3 x 3 and 2 x 2 tokens whose residual branches do something."""
    torch.manual_seed(0)
    model = timm.create_model("evo_levit_128s", **{**SMALL, "num_classes": 5, **kwargs})
    for name, value in model.named_parameters():
        if name.endswith("bn.weight"):
            torch.nn.init.uniform_(value, 0.5, 1.5)
    torch.nn.init.normal_(model.cls_token, std=0.1)
    return model


def all_logits(outputs):
    return (outputs.cls, outputs.distill, outputs.extras["class_token"], outputs.extras["class_token_distill"])


@pytest.mark.parametrize("stage_wise", [False, True])
def test_decisions__half_of_the_tokens_of_each_grid(stage_wise):
    model, images = small(), torch.randn(3, 3, 96, 96)
    model.stage_wise_prune = stage_wise
    trained = forward_heads(model.train(), images)
    sum(head.square().sum() for head in all_logits(trained)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert bool(model.tradeoff_logit.grad.any()) == stage_wise
    selections = (1, 1, 1) if stage_wise else (1, 2, 2)
    decisions = trained.extras["decisions"].unflatten(2, (6, 6)).split(selections, 1)
    assert (decisions[0].sum((2, 3)) == 18).all()  # of 6 x 6
    assert (decisions[1][:, :, ::2, ::2].sum((2, 3)) == 4).all()  # of 3 x 3
    assert (decisions[2][:, :, ::4, ::4].sum((2, 3)) == 2).all()  # of 2 x 2
    assert_close(decisions[1], decisions[1][:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3))
    with torch.no_grad():
        outputs = forward_heads(model.eval(), images)
        assert_close(model(images), (outputs.cls + outputs.distill) / 2)
    assert {"distill", *outputs.extras} == model.outputs


def test_left_out_tokens__get_the_change_of_their_weighted_mean():
    stage, x, rows = small().eval().stages[0], torch.randn(2, 37, 32), torch.arange(2)[:, None]
    with torch.no_grad():
        found, scores, decisions = stage(x, None, torch.full((3, 1), 0.25), False)
        x, first = stage.blocks[0](x)
        x, second = stage.blocks[1](x)
        expected_scores = 0.75 * first + 0.25 * second
        kept = expected_scores.topk(18).indices
        left_out = torch.ones(2, 36).scatter(1, kept, 0.0)
        shares = expected_scores * left_out
        mean = (shares / shares.sum(1, keepdim=True))[:, None] @ x[:, 1:]
        computed, third = stage.blocks[2](torch.cat((x[:, :1], x[:, 1:][rows, kept], mean), 1))
    expected = x + computed[:, -1:] - mean
    expected[:, :1], expected[rows, 1 + kept] = computed[:, :1], computed[:, 1:-1]
    expected_scores[rows, kept] = 0.75 * expected_scores[rows, kept] + 0.25 * third[:, :-1]
    assert_close(found, expected)
    assert_close(scores, expected_scores)
    assert_close(decisions[:, 0], 1 - left_out)


def test_keep_ratio_of_one__selects_nothing():
    model, images = small(keep_ratio=1.0).eval(), torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        layer_wise = forward_heads(model, images)
        model.stage_wise_prune = True
        assert_close(model(images), layer_wise.merged())  # the scores serve nothing
    assert layer_wise.extras["decisions"].shape == (2, 0, 36)


def test_arguments__of_timm_work():
    images = torch.randn(2, 3, 96, 96)
    assert small(drop_rate=0.1, drop_path_rate=0.2).train()(images).shape == (2, 5)
    assert small(in_chans=1)(images[:, :1]).shape == (2, 5)
    assert small(num_classes=0)(images).shape == (2, 64)
    assert small(img_size=(64, 96)).eval()(images[:, :, :64]).shape == (2, 5)
    assert small(img_size=32).eval()(images[:, :, :32, :32]).shape == (2, 5)  # one token in the last stages
    maps = timm.create_model("evo_levit_128s", features_only=True, out_indices=(0, 2), **SMALL)(images)
    assert [tuple(level.shape) for level in maps] == [(2, 32, 6, 6), (2, 64, 2, 2)]


def test_methods__of_timm_work():
    images, model = torch.randn(2, 3, 96, 96), small().eval()
    features = model.forward_features(images)
    assert features.shape == (2, 1 + 4, 64)
    assert_close(model.forward_head(features), model(images))
    last, levels = model.forward_intermediates(images)
    assert_close(last, features)
    assert [level.shape[1:] for level in levels] == [(32, 6, 6), (48, 3, 3), (64, 2, 2)]
    tables = {"pos_embed", *(f"stages.{stage}.downsample.attn_downsample.pos_embed" for stage in (1, 2))}
    assert model.no_weight_decay() == {*tables, "tradeoff_logit"}
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    lowest = min(group["lr_scale"] for group in groups)
    first = {id(value) for group in groups if group["lr_scale"] == lowest for value in group["params"]}
    assert {id(model.cls_token), id(model.pos_embed), id(model.stem.conv1.linear.weight)} <= first
    model.reset_classifier(7)
    assert {head.shape for head in all_logits(forward_heads(model, images))} == {(2, 7)}
    assert [head.linear.out_features for head in model.get_classifier()] == [7] * 4


@pytest.mark.slow
@pytest.mark.parametrize("stage_wise", [False, True])
def test_compile__one_graph(stage_wise):
    torch._dynamo.reset()
    model, images = small(), torch.randn(2, 3, 96, 96)
    model.stage_wise_prune = stage_wise
    expected = forward_heads(model.train(), images)
    found = torch.compile(forward_heads, fullgraph=True, backend="aot_eager")(model, images)
    assert_close(all_logits(found), all_logits(expected), rtol=1e-4, atol=1e-5)
    found.extras["class_token"].sum().backward()


def test_training__same_gradients_with_checkpointing():
    images = torch.randn(2, 3, 96, 96)
    assert_same_gradients(small, lambda model: model(images).square().mean())


def test_half_precision__trains():
    model, images = small().train(), torch.randn(2, 3, 96, 96)
    with torch.autocast("cpu", torch.bfloat16):
        forward_heads(model, images).cls.float().sum().backward()
    assert torch.isfinite(model.pos_embed.grad).all()
    assert small().bfloat16().eval()(images.bfloat16()).dtype == torch.bfloat16


def test_load_checkpoint__resizes_every_position_table(tmp_path):
    torch.save(small().state_dict(), tmp_path / "small.pth")
    model = small(img_size=(128, 160))
    notes = load_checkpoint(model, tmp_path / "small.pth")
    resized = [note for note in notes if note.startswith("position embeddings resized")]
    assert [note.split(" (")[0].split("resized ")[1] for note in resized] == ["from 6x6", "from 6x6", "from 3x3"]
    assert model.eval()(torch.randn(1, 3, 128, 160)).shape == (1, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0}, r"keep_ratio=.*: needs 9 numbers, one per block, above 0"),
        ({"keep_ratio": [0.5] * 9}, r"keep_ratio=.*: the first block has no scores"),
        ({"tradeoff": 2.0}, r"tradeoff=\[2.0\]: needs 1 numbers"),
        ({"first_selection": 0}, r"first_selection=0: needs a number of blocks from 1 to 9"),
        ({"use_conv": True}, r"use_conv=true: the tokens are selected from a sequence"),
        ({"img_size": 100}, r"img_size=\[100, 100\]: needs multiples of 16"),
    ],
)
def test_options__invalid_ones_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        create_model("evo_levit_128s", 10, **{"img_size": 96, **options})
