import huggingface_hub
import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from timm.models import register_model

import vitrail  # noqa: F401
from programs import PROJECT
from vitrail.errors import ConfigError
from vitrail.models import create_model, forward_heads
from vitrail.runs.config import instantiate

# Published parameter counts with 1000 classes: the DeiT paper's table (5M, 22M, 86M), and timm's ViTs.
PARAMETERS = {
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_large_patch16_224": 304_326_632,
    "vit_huge_patch14_224": 632_045_800,
    "vit_giant_patch14_224": 1_012_611_432,
    "vit_gigantic_patch14_224": 1_844_440_680,
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", PARAMETERS)
def test_families__published_parameter_counts(name):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        config = compose("train", [f"model={name.partition('_')[0]}", f"model.name={name}"])
    with torch.device("meta"):
        model = instantiate(config.model, "model", num_classes=1000, img_size=224)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_registry__importing_vitrail_registers_models():
    assert {"vit_nano", "deit_nano", "deit_nano_distilled"} <= set(timm.list_models())
    model = timm.create_model("vit_nano", num_classes=7, img_size=28, in_chans=1)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert timm.create_model("deit_nano", num_classes=0)(torch.zeros(1, 3, 32, 32)).shape == (1, 64)


def test_create_model__image_size_only_if_weights_depend_on_it():
    assert create_model("resnet18", num_classes=3, img_size=64)(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    model = create_model("deit_tiny_patch16_224", num_classes=3, img_size=64)
    assert model.pos_embed.shape == (1, 17, 192)
    assert create_model("vit_nano", num_classes=3, img_size=(16, 32)).pos_embed.shape == (1, 8, 64)
    assert create_model("deit_nano", num_classes=3, img_size=(16, 32)).pos_embed.shape == (1, 33, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "deit_smal_patch16_224"}, "did you mean deit_small_patch16_224"),
        ({"name": "deit_nano", "img_size": 30}, "data.image_size=30: deit_nano needs a multiple of its patch size 4"),
        ({"name": "vit_nano", "colour": "red"}, "model.name=vit_nano: .*colour"),
    ],
)
def test_create_model__invalid_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        create_model(num_classes=3, **arguments)


def test_forward_heads__both_heads_of_distilled_models():
    torch.manual_seed(0)
    model = create_model("deit_nano_distilled", num_classes=5, img_size=16).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.head_dist.weight)
    images = torch.randn(3, 3, 16, 16)
    heads = forward_heads(model, images)
    assert heads.tokens is None
    torch.testing.assert_close((heads.cls + heads.distill) / 2, model(images))
    assert not torch.allclose(heads.cls, heads.distill)
    model.train()
    model.set_distilled_training(True)
    trained = forward_heads(model, images)
    torch.testing.assert_close((trained.cls, trained.distill), model(images))


def test_forward_heads__one_head_of_other_models():
    model = create_model("vit_nano", num_classes=5, img_size=16).eval()
    images = torch.randn(2, 3, 16, 16)
    heads = forward_heads(model, images)
    assert heads.distill is None
    torch.testing.assert_close(heads.cls, model(images))


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_dense", "t2t_vit_16_ghost", "lvvit_t", "so_vit_7", "sot_tiny"])
def test_device_and_precision__apply_to_every_layer(name):
    model = timm.create_model(name, img_size=32, device="meta", dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in tensors} <= {torch.bfloat16, torch.int64}
    model = timm.create_model(name, img_size=32, dtype=torch.bfloat16)
    assert model(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_blocks__accept_other_layers_of_timm():
    from timm.layers import SwiGLU

    for name in ("t2t_vit_7", "lvvit_t"):
        model = timm.create_model(name, img_size=32, depth=1, mlp_layer=SwiGLU, qk_norm=True, init_values=1e-4)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 1000)


def test_plain_vit__fixed_positions_for_any_size():
    """The table is big_vision's: a quarter each of sin x, cos x, sin y, cos y; frequencies from 1 to 1 / 10,000."""
    model = create_model("vit_plain_small_patch16_224", 7, (32, 48))
    assert "pos_embed" not in dict(model.named_parameters())
    assert not model.head.weight.any()
    frequencies = 10_000.0 ** -(torch.arange(96) / 95)
    for (rows, columns), size in (((2, 3), None), ((4, 2), (64, 32))):
        if size is not None:
            model.set_input_size(img_size=size)
        table = model.pos_embed.unflatten(1, (rows, columns))[0]
        x, y = columns - 1, rows - 1
        expected = [
            torch.sin(x * frequencies),
            torch.cos(x * frequencies),
            torch.sin(y * frequencies),
            torch.cos(y * frequencies),
        ]
        torch.testing.assert_close(table[y, x], torch.cat(expected))
        assert model(torch.randn(1, 3, 16 * rows, 16 * columns)).shape == (1, 7)


def test_patch_size__may_be_one_number():
    assert create_model("xcit_nano_12_p16_224", 5, 64)(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_pretrained__without_a_network(monkeypatch, tmp_path):
    """A server that cannot be reached is not asked again and again, which takes a minute."""
    constants = huggingface_hub.constants
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match=r"model.name=resnet10t.c3_in1k: its pretrained weights could not be downloaded"
    ):
        create_model("resnet10t.c3_in1k", 1000, pretrained=True)
    assert constants.HF_HUB_OFFLINE


@register_model
def of_a_user(pretrained=False, num_classes=10, **options):
    """A backbone without timm's default configuration."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, num_classes))


def test_registered_function__needs_no_default_configuration():
    assert create_model("of_a_user", 5, 4)(torch.randn(2, 3, 4, 4)).shape == (2, 5)


def test_name_that_timm_has_replaced__is_refused_with_similar_ones():
    with pytest.raises(ConfigError, match=r"ig_resnext101_32x8d: no such backbone; did you mean resnext101_32x8d"):
        create_model("ig_resnext101_32x8d", 5)
