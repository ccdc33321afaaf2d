import math

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch.utils.flop_counter import FlopCounterMode

import vitrail  # noqa: F401
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.sinusoid import sinusoid_table
from vitrail.models.tokens_to_token import TokenPerformer

SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 5}


def small(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("t2t_vit_7", **{"img_size": 48, **SMALL, **kwargs})


def plain_performer(k, q, v, w, eps=1e-8):
    """Return the attention by the paper's formula with the official eps and direct exponentials."""
    features = [torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0]) for x in (k, q)]
    denominator = features[1] @ features[0].sum(1).unsqueeze(-1)
    return features[1] @ (features[0].mT @ v) / (denominator + eps)


@pytest.mark.parametrize("length", [0.1, 1.0, 2.0])
def test_performer__equals_the_plain_formula(length):
    torch.manual_seed(1)
    layer = TokenPerformer(10, 16)
    k, q, v = (torch.randn(2, 50, 16) for _ in range(3))
    k, q = k * length, q * length
    expected = plain_performer(*(x.double() for x in (k, q, v, layer.w)))
    torch.testing.assert_close(layer.attend(k, q, v), expected.float(), rtol=1e-5, atol=1e-5)
    if length == 1.0:
        plain = plain_performer(k, q, v, layer.w)
        torch.testing.assert_close(layer.attend(k, q, v), plain, rtol=1e-5, atol=1e-5)


def test_performer__long_keys_and_queries_stay_finite():
    torch.manual_seed(1)
    layer = TokenPerformer(10, 16)
    k, q, v = (torch.randn(2, 50, 16) * 40 for _ in range(3))
    assert not plain_performer(k, q, v, layer.w).any()  # everything underflows, so the official output is 0
    k.requires_grad_(), q.requires_grad_()
    out = layer.attend(k, q, v)
    out.sum().backward()
    assert out.abs().max() < 1e-6  # the same with the published eps
    assert k.grad.isfinite().all()
    layer.eps = 0.0
    assert layer.attend(k, q, v).abs().mean() > 1  # without eps attention still works
    half = layer.attend(k.half(), q.half(), v.half())
    assert half.isfinite().all()


def test_random_features__are_orthogonal():
    w = TokenPerformer(10, 64).w
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), atol=1e-4, rtol=0)


@pytest.mark.thorough
@pytest.mark.parametrize("size", [(48, 48), (32, 80), (220, 220), (49, 65)])
def test_image_sizes__any_size(size):
    model = small(img_size=size).eval()
    rows, columns = model.patch_embed.grid_size
    assert model.pos_embed.shape[1] == rows * columns + 1
    images = torch.randn(2, 3, *size)
    assert model(images).shape == (2, 5)
    _, maps = model.forward_intermediates(images)
    assert [list(x.shape) for x in maps] == [[2, 64, rows, columns]] * 3
    with pytest.raises(AssertionError, match=r"images of 16x16 pixels do not fit a model built for img_size="):
        model(torch.randn(2, 3, 16, 16))


def test_image_sizes__published_grid():
    assert small(img_size=224).patch_embed.grid_size == (14, 14)
    assert small(img_size=384).patch_embed.grid_size == (24, 24)
    assert create_model("t2t_vit_7", 5, img_size=(100, 227)).patch_embed.grid_size == (7, 15)


def test_dynamic_image_size__equals_a_model_of_that_size():
    fixed, dynamic = small(), small(dynamic_img_size=True).eval()
    dynamic.load_state_dict(fixed.state_dict())
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(dynamic(images), fixed.eval()(images))
    assert dynamic(torch.randn(2, 3, 80, 64)).shape == (2, 5)


def test_set_input_size__resizes_the_table_and_keeps_it_fixed():
    model = small()
    model.set_input_size((80, 64))
    assert model.pos_embed.shape == (1, 21, 64)
    assert "pos_embed" not in dict(model.named_parameters())
    assert list(model.state_dict())[:2] == ["cls_token", "pos_embed"]
    assert model(torch.randn(2, 3, 80, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="has fixed strides"):
        model.set_input_size((80, 64), patch_size=8)


def test_fixed_tables__are_buffers_and_are_reinitialised():
    model = small()
    names = {name for name, _ in model.named_parameters()}
    assert not {"pos_embed", "tokens_to_token.attention1.w"} & names
    torch.testing.assert_close(model.pos_embed, sinusoid_table(10, 64))
    model.pos_embed.zero_()
    model.init_weights(needs_reset=True)
    torch.testing.assert_close(model.pos_embed, sinusoid_table(10, 64))


def test_meta_device__initialised_later():
    with torch.device("meta"):
        model = timm.create_model("t2t_vit_7", img_size=48, **SMALL)
    model = model.to_empty(device="cpu")
    model.init_weights(needs_reset=True)
    assert model.eval()(torch.randn(2, 3, 48, 48)).isfinite().all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14", "t2t_vit_14_se", "t2t_vit_16_ghost", "t2t_vit_dense"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training__same_logits_and_gradients_as_evaluation(name, checkpointing):
    """Skipping other tokens in the last block and recomputing activations does not change the results."""
    kwargs = {} if "dense" in name else {"depth": 2}
    model = timm.create_model(
        name, img_size=32, num_classes=5, **kwargs, **({} if "_t_" in name else {"token_drop": 0.0})
    )
    model.set_grad_checkpointing(checkpointing)
    images, logits, grads = torch.randn(2, 3, 32, 32), [], []
    for training in (False, True):
        model.train(training).zero_grad()
        logits.append(model(images))
        logits[-1].square().sum().backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(logits[0], logits[1])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_training__last_block_computes_only_the_class_token():
    """10 tokens of width 64: the last block saves 9/10 of q (64 x 64), projection (64 x 64) and MLP (2 x 64 x 128)."""
    model, macs = small(depth=2), []
    for training in (False, True):
        with FlopCounterMode(display=False) as counter:
            model.train(training)(torch.randn(1, 3, 48, 48))
        counts = {str(op): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}
        macs.append(sum(count for op, count in counts.items() if "attention" not in op))
    assert macs[0] - macs[1] == 9 * (64 * 64 + 64 * 64 + 2 * 64 * 128)
    model = create_model("t2t_vit_7", 5, img_size=48, token_head=True, embed_dim=64, depth=2, num_heads=2)
    assert model(torch.randn(2, 3, 48, 48)).shape == (2, 5)  # a token head needs the other tokens
    assert forward_heads(model, torch.randn(2, 3, 48, 48)).tokens.shape == (2, 9, 5)


def test_stochastic_depth__drops_the_whole_last_block():
    model = small(depth=1, drop_path_rate=0.0, token_drop=0.0)
    model.blocks[0].drop_path1 = model.blocks[0].drop_path2 = torch.nn.Dropout(1.0)
    model.train()
    expected = model.head(model.norm(model.cls_token + model.pos_embed[:, :1]))[:, 0].expand(2, 5)
    torch.testing.assert_close(model(torch.randn(2, 3, 48, 48)), expected)


def test_layer_decay__scales_of_stem_blocks_and_head():
    model = small()
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale_of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    scales = {name: scale_of[id(parameter)] for name, parameter in model.named_parameters()}
    assert scales["tokens_to_token.attention1.kqv.weight"] == scales["cls_token"] == 0.5**4
    assert scales["blocks.0.attn.qkv.weight"] == 0.5**3
    assert scales["head.weight"] == 1


def test_dense_variant__widths():
    model = timm.create_model("t2t_vit_dense", img_size=32, features_only=True, out_indices=(2, 3, -1))
    assert model.feature_info.channels() == [320, 160, 584]
    assert [x.shape[1] for x in model(torch.randn(1, 3, 32, 32))] == [320, 160, 584]
    by_block = timm.create_model("t2t_vit_dense", drop_path_rate=0.1, drop_path_by="block")
    assert by_block.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    model = timm.create_model("t2t_vit_dense", img_size=32)
    model.reset_classifier(7)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("t2t_vit_7", {"tokens_type": "convolution"}, "tokens_type=convolution: choose performer or transformer"),
        ("t2t_vit_7", {"patch_size": 8}, "patch_size=8: the splits of T2T-ViT fix the patch size; use 16"),
        ("t2t_vit_16_ghost", {"mlp_ratio": 4}, "mlp_ratio=4: the ghost MLP needs a ratio of 3"),
        ("t2t_vit_16_ghost", {"qk_norm": True}, "ghost attention has no norms"),
        ("t2t_vit_dense", {"drop_path_by": "layer"}, "drop_path_by=layer: choose stage or block"),
    ],
)
def test_create_model__invalid_arguments(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        create_model(name, 5, img_size=32, **arguments)


@pytest.mark.skipif(
    tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31),
    reason="older timm assumes that every first layer is a convolution",
)
def test_pretrained__first_layer_adapts_to_other_channels():
    source = small().state_dict()
    for prefix in ("tokens_to_token.attention1.",):
        source[prefix + "norm1.weight"].uniform_(0.9, 1.1)
    overlay = {"state_dict": source, "num_classes": 5, "input_size": (3, 48, 48)}
    gray = small(in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    key = "tokens_to_token.attention1.kqv.weight"
    torch.testing.assert_close(gray.state_dict()[key], source[key].reshape(192, 3, 49).sum(1))
    norm = "tokens_to_token.attention1.norm1.weight"
    torch.testing.assert_close(gray.state_dict()[norm], source[norm].reshape(3, 49).mean(0))
    four = small(in_chans=4, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(four.state_dict()[norm], torch.cat((source[norm], source[norm][:49])))
    assert four(torch.randn(2, 4, 48, 48)).shape == (2, 5)
