import copy
import re

import pytest
import torch

from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.training import OptimizerFactory
from vitrail.training.muon import describe_routing, first_and_last


def names_of(model, optimizer, **conditions):
    wanted = {
        id(parameter)
        for group in optimizer.param_groups
        if all(group.get(key) == value for key, value in conditions.items())
        for parameter in group["params"]
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def test_weight_decay__same_parameters_as_in_the_published_recipes():
    """DeiT decays matrices and the patch kernel, but not biases, norms, position embedding and class token."""
    model = create_model("deit_tiny_patch16_224", num_classes=10, img_size=32)
    optimizer = OptimizerFactory(weight_decay=0.05).build(model, 512)
    decayed, free = names_of(model, optimizer, weight_decay=0.05), names_of(model, optimizer, weight_decay=0.0)
    assert decayed | free == {name for name, _ in model.named_parameters()}
    assert {"cls_token", "pos_embed", "blocks.0.norm1.weight", "blocks.3.attn.qkv.bias", "head.bias"} <= free
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "head.weight"} <= decayed
    assert len(decayed) == 2 + 12 * 4


@pytest.mark.parametrize(("rule", "lr"), [("linear", 1e-3), ("sqrt", 5e-4 * 2**0.5), ("none", 5e-4)])
def test_lr__scaled_to_the_effective_batch(rule, lr):
    factory = OptimizerFactory(lr=5e-4, lr_scaling=rule, lr_reference_batch=512)
    optimizer = factory.build(torch.nn.Linear(2, 2), 1024)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
    assert "effective batch 1024" in factory.describe(1024)
    assert f"lr {lr:.3g}" in factory.describe(1024)


def test_layer_decay__lower_for_earlier_blocks():
    model = create_model("vit_nano", 10, 32)
    optimizer = OptimizerFactory(layer_decay=0.5).build(model, 512)
    scale = {
        name: group["lr_scale"]
        for group in optimizer.param_groups
        for name, parameter in model.named_parameters()
        if any(parameter is member for member in group["params"])
    }
    assert scale["head.weight"] == 1
    ratios = [scale[f"blocks.{n}.mlp.fc1.weight"] / scale[f"blocks.{n + 1}.mlp.fc1.weight"] for n in range(3)]
    assert ratios == pytest.approx([0.5] * 3)
    assert scale["patch_embed.proj.weight"] == pytest.approx(scale["blocks.0.mlp.fc1.weight"] / 2)


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd", "lion", "muon"])
def test_name__any_optimiser_of_timm(name):
    model = create_model("vit_nano", 10, 32)
    assert OptimizerFactory(name=name).build(model, 512).param_groups


def test_options__invalid_ones_are_refused():
    with pytest.raises(ConfigError, match=r"lr_scaling=quadratic: must be one of none, linear, sqrt"):
        OptimizerFactory(lr_scaling="quadratic")
    with pytest.raises(ConfigError, match=r"optimizer.name=adamm"):
        OptimizerFactory(name="adamm").build(torch.nn.Linear(2, 2), 512)
    with pytest.raises(ConfigError, match=r"optimizer.name=adamw: .*colour"):
        OptimizerFactory(colour="red").build(torch.nn.Linear(2, 2), 512)


def test_decay_also__overrides_the_models_exemptions():
    """DeiT's code applied weight decay to the distillation token, because its version of timm did not exempt it."""
    model = create_model("deit_nano_distilled", 10, 32)
    optimizer = OptimizerFactory(decay_also=["dist_token"]).build(model, 512)
    assert "dist_token" in names_of(model, optimizer, weight_decay=0.05)
    assert {"cls_token", "pos_embed"} <= names_of(model, optimizer, weight_decay=0.0)
    with pytest.raises(ConfigError, match=r"optimizer.decay_also: dist_token is not a parameter of VisionTransformer"):
        OptimizerFactory(decay_also=["dist_token"]).build(create_model("deit_nano", 10, 32), 512)


@pytest.mark.parametrize(
    ("name", "heads"), [("deit_nano_distilled", ("head.", "head_dist.")), ("lvvit_nano", ("head.",))]
)
def test_backbone_lr_scale__scales_all_but_the_classifiers(name, heads):
    model = create_model(name, 10, 64)
    optimizer = OptimizerFactory("sgd", 0.05, 5e-4, "none", backbone_lr_scale=0.01).build(model, 64)
    fast, slow = names_of(model, optimizer, lr=0.05), names_of(model, optimizer, lr=5e-4)
    assert fast == {key for key, _ in model.named_parameters() if key.startswith(heads)}
    assert fast | slow == {key for key, _ in model.named_parameters()}
    assert {"blocks.0.attn.qkv.weight", "pos_embed"} <= slow


@pytest.mark.parametrize("name", ["adamw", "lamb", "lookahead_adamw"])
def test_load_state_dict__moments_from_the_checkpoint_and_settings_from_the_config(name):
    model = create_model("deit_nano", 10, 32)

    def built(**changed):
        return OptimizerFactory(name, lr_scaling="none", **{"betas": (0.9, 0.95), "layer_decay": 0.5, **changed})

    before = built(lr=1e-3).build(model, 512)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before.step()
    after = built(lr=2e-3, weight_decay=0.2, layer_decay=0.8, betas=(0.8, 0.99)).build(model, 512)
    fresh = [dict(group) for group in after.param_groups]
    after.load_state_dict(before.state_dict())
    for group, wanted, old in zip(after.param_groups, fresh, before.param_groups, strict=True):
        for key in ("lr", "lr_scale", "weight_decay", "betas"):
            assert group[key] == wanted[key]
        for key in ("step", "lookahead_step"):
            assert group.get(key) == old.get(key)
    moments = [state["exp_avg"] for state in before.state_dict()["state"].values()]
    assert all(map(torch.equal, moments, [state["exp_avg"] for state in after.state_dict()["state"].values()]))


def test_options__that_the_optimiser_cannot_use_are_named():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"^optimizer.name=adamw: .* \(optimizer.betas=\[0.9\]\)$"):
        OptimizerFactory("adamw", betas=[0.9]).build(model, 512)


MUON = {"momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-7, "adamw_first_last": True}


def hidden(name):
    return re.fullmatch(r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight", name) is not None


@pytest.mark.parametrize(
    ("backbone", "options", "parts"),
    [
        ("deit_nano_distilled", {"layer_decay": 0.75}, {}),
        ("lvvit_nano", {"token_head": True}, {"projection": torch.nn.Linear(64, 32)}),
        ("lvvit_nano", {"backbone_lr_scale": 0.1}, {}),
    ],
)
def test_muon__hidden_matrices_only(backbone, options, parts):
    """The log line, the groups and what timm's optimiser does agree."""
    options = dict(options)
    model = create_model(backbone, 10, 64, token_head=options.pop("token_head", False))
    optimizer = OptimizerFactory("nadamuon", **MUON, **options).build(model, 512, parts)
    names = {id(value): name for name, value in model.named_parameters()}
    names |= {id(value): f"objective.{part}.{name}" for part in parts for name, value in parts[part].named_parameters()}
    members = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(names[id(member)] for member in members) == sorted(names.values())
    for member in members:
        member.grad = torch.randn_like(member)
    optimizer.step()
    by_muon = {names[id(member)] for member in members if optimizer.state[member]["use_muon"]}
    assert by_muon == {name for name in names.values() if hidden(name)}
    line = describe_routing(optimizer, {"": model, **{f"objective.{name}.": part for name, part in parts.items()}})
    first, second = line.split("; ")
    assert first.startswith("AdaMuon: blocks.*.attn.proj.weight, blocks.*.attn.qkv.weight, blocks.*.mlp.fc1.weight, ")
    assert second.startswith("NAdamW: ")
    assert {"biases", "head.weight", "patch_embed.proj.weight", "pos_embed"} <= set(re.split(r"[ ,]+", second))
    assert ("aux_head.weight" in second) == ("aux_head.weight" in names.values())
    assert ("objective.projection.weight" in second) == bool(parts)


def test_muon__first_layer_of_a_model_without_timms_groups():
    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
    layers.num_classes = 8
    assert first_and_last(layers) == {id(layers[0].weight), *map(id, layers[2].parameters())}


def test_muon__the_first_step_is_that_of_timm():
    """Matrices move by lr x 0.2 sqrt(max(out, in)) x orthogonalised momentum, whose singular values are near 1."""
    torch.manual_seed(0)
    model = create_model("deit_nano", 10, 32)
    before = copy.deepcopy(model)
    optimizer = OptimizerFactory("muon", lr=1e-3, lr_scaling="none", weight_decay=0.0, **MUON).build(model, 512)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    step = (before.blocks[0].mlp.fc1.weight - model.blocks[0].mlp.fc1.weight) / (1e-3 * 0.2 * 256**0.5)
    values = torch.linalg.svdvals(step)
    assert 0.6 < values.min() < values.max() < 1.3
    head = before.head.weight - model.head.weight
    torch.testing.assert_close(head.abs(), torch.full_like(head, 1e-3), rtol=1e-3, atol=1e-6)  # AdamW's first step


def test_muon__other_optimisers_have_no_routing():
    model = create_model("vit_nano", 10, 32)
    assert describe_routing(OptimizerFactory("adamw").build(model, 512), {"": model}) is None
    with pytest.raises(ConfigError, match=r"optimizer.adamw_first_last=true: adamw is not a variant of Muon; omit it"):
        OptimizerFactory("adamw", adamw_first_last=True).build(model, 512)


@pytest.mark.parametrize("scale_min_lr", [False, True])
def test_backbone_options__apply_to_all_but_the_declared_new_modules(scale_min_lr):
    model = create_model("dynamicvit_deit_tiny", 10, 32, depth=2, selection_blocks=[1])
    factory = OptimizerFactory(
        lr=1e-3, lr_scaling="none", backbone_lr_scale=0.01, scale_min_lr=scale_min_lr, backbone_freeze_epochs=5
    )
    optimizer = factory.build(model, 64)
    frozen = names_of(model, optimizer, freeze_epochs=5)
    assert frozen == {key for key, _ in model.named_parameters() if not key.startswith("score_predictor.")}
    key, value = ("lr_scale", 0.01) if scale_min_lr else ("lr", 1e-5)
    assert names_of(model, optimizer, **{key: value}) == frozen


def test_untrained__parameters_are_in_no_group():
    model = create_model("deit_nano", 10, 32)
    optimizer = OptimizerFactory(untrained=["cls_token", "pos_embed"]).build(model, 512)
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = {key for key, value in model.named_parameters() if id(value) not in trained}
    assert left == {"cls_token", "pos_embed"}
    with pytest.raises(ConfigError, match=r"optimizer.untrained: cls is not a parameter of VisionTransformer"):
        OptimizerFactory(untrained=["cls"]).build(model, 512)
