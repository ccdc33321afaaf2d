import pytest
import timm
import torch
from timm.models.volo import VOLO

from checkpointed import assert_same_gradients
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.models.heads import add_token_head, declared_outputs, token_grid
from vitrail.models.volo import TokenVOLO, declare_token_logits
from vitrail.training.fsdp import blocks_of


def small(**kwargs):
    torch.manual_seed(0)
    sizes = {"layers": [2, 1, 1, 1], "embed_dims": [16, 32, 32, 32], "num_heads": [2] * 4, "stem_hidden_dim": 8}
    return declare_token_logits(VOLO(**{**sizes, "img_size": 64, "num_classes": 5, **kwargs}))


def test_create_model__declares_tokens_and_mixtoken():
    """No token head needs to be added, and timm's own model has the same logits."""
    model = create_model("volo_d1_224", 5, 32).eval()
    assert declared_outputs(model) == {"cls", "tokens"}
    assert model.mixes_tokens
    plain = timm.create_model("volo_d1_224", num_classes=5, img_size=32).eval()
    plain.load_state_dict(model.state_dict())
    images, box = torch.randn(2, 3, 32, 32), torch.tensor([0, 0, 1, 2])
    with torch.no_grad():
        heads, own = forward_heads(model, images, box), forward_heads(plain, images, box)
        torch.testing.assert_close(model(images), plain(images))
    torch.testing.assert_close(heads[:2], own[:2])
    assert type(plain) is VOLO


@pytest.mark.parametrize(("size", "grid"), [((64, 64), (4, 4)), ((48, 80), (3, 5)), ((72, 72), (4, 4))])
def test_token_grid__matches_the_token_logits(size, grid):
    model, images = small(img_size=size), torch.randn(2, 3, *size)
    assert token_grid(model, size) == grid
    for training in (False, True):
        heads = forward_heads(model.train(training), images)
        assert heads.tokens.shape == (2, grid[0] * grid[1], 5)
        model.eval()
        heads = forward_heads(model, images)
        torch.testing.assert_close(model(images), heads.cls + 0.5 * heads.tokens.amax(1))


def test_mixtoken_of_timm__is_refused():
    with torch.device("meta"), pytest.raises(ConfigError, match=r"model\.use_mix_token=true: .* use mixing=mixtoken"):
        create_model("volo_d1_224", 5, 64, use_mix_token=True)


def test_create_model__sizes_are_multiples_of_the_patches():
    """An odd number of patches is fine: the last row and column have no tokens."""
    with torch.device("meta"):
        model = create_model("volo_d1_224", 5, (72, 48))
        assert model(torch.empty(1, 3, 72, 48)).shape == (1, 5)
        assert token_grid(model, (72, 48)) == (4, 3)
        with pytest.raises(ConfigError, match=r"data.image_size=223: volo_d1_224 needs a multiple of its patch size 8"):
            create_model("volo_d1_224", 5, 223)
        with pytest.raises(ConfigError, match=r"unexpected keyword argument 'qk_scale' \(model.qk_scale=0.1\)"):
            create_model("volo_d1_224", 5, qk_scale=0.1)


def test_mixtoken__swaps_patches_before_the_outlookers_and_restores_the_order_of_logits():
    model, images = small().eval(), torch.randn(4, 3, 64, 64)
    inputs = []
    model.network[0].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    box = torch.tensor([1, 0, 3, 2])
    forward_heads(model, images)
    forward_heads(model, images, box)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 0:4] = True
    before, after = inputs
    torch.testing.assert_close(after[:, inside], before.flip(0)[:, inside])
    torch.testing.assert_close(after[:, ~inside], before[:, ~inside])
    whole = forward_heads(model, images, torch.tensor([0, 0, 4, 4]))  # every image replaced by its partner
    plain = forward_heads(model, images)
    torch.testing.assert_close(whole.tokens, plain.tokens)
    torch.testing.assert_close(whole.cls, plain.cls.flip(0))
    empty = forward_heads(model, images, torch.tensor([2, 2, 2, 2]))
    torch.testing.assert_close(empty[:2], plain[:2])


def test_reset_classifier__resets_both():
    model, images = small(), torch.randn(2, 3, 64, 64)
    model.reset_classifier(7)
    heads = forward_heads(model, images)
    assert (heads.cls.shape, heads.tokens.shape) == ((2, 7), (2, 16, 7))
    assert [head.out_features for head in model.get_classifier()] == [7, 7]


def test_token_head__without_class_token_or_classifier_is_refused():
    for options in ({"global_pool": "avg", "post_layers": None}, {"use_aux_head": False}):
        model = small(**options)
        assert type(model) is VOLO
        assert forward_heads(model, torch.randn(2, 3, 64, 64)).tokens is None
        with pytest.raises(ConfigError, match=r"model.token_head=true: this VOLO lacks its class token or"):
            add_token_head(model)
    assert type(add_token_head(small())) is TokenVOLO


def test_training__same_gradients_with_checkpointing():
    images, box = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
    assert_same_gradients(
        small, lambda model: sum(head.square().mean() for head in forward_heads(model, images, box)[:2])
    )


def test_blocks__each_is_sharded_on_its_own():
    model = small()
    names = {id(module): name for name, module in model.named_modules()}
    stages = ["network.0.0", "network.0.1", "network.1", "network.2.0", "network.3.0", "network.4.0"]
    assert [names[id(block)] for block in blocks_of(model)] == [*stages, "post_network.0", "post_network.1"]


@pytest.mark.slow
def test_compile__one_graph():
    torch._dynamo.reset()
    model, images, box = small(layers=[1, 1, 1, 1]), torch.randn(2, 3, 64, 64), torch.tensor([0, 1, 2, 4])
    expected = forward_heads(model.eval(), images, box)
    found = torch.compile(forward_heads, fullgraph=True, backend="aot_eager")(model, images, box)
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-4, atol=1e-5)
    found.tokens.sum().backward()
