"""Compare every backbone with the official implementation: keys, logits of all heads, gradients, cost."""

import hashlib

import pytest
import timm
import torch

import vitrail  # noqa: F401
from peers.recorded import assert_tensor, draw, fill, images, recorded
from vitrail.models import forward_heads
from vitrail.models.cost import measure_cost
from vitrail.models.sinusoid import sinusoid_table
from vitrail.models.tokens_to_token import TokenPerformer, TokenTransformer
from vitrail.training import OptimizerFactory

pytestmark = pytest.mark.thorough

RECORDS = {**recorded("backbones.json"), **recorded("second_order.json")}
PARTS = recorded("backbone_parts.json")

LARGE = (
    "deit_base",
    "deit3_base",
    "t2t_vit_t_24",
    "lvvit_s_384",
    "so_vit_19",
    "sot_small",
)  # by default only with recipe B, which is the stronger test


# Recorded in float32: vitrail's float32 and float64 gradients agree to 1e-5, and differ from the record by 1.3e-4.
GRADIENT_RTOL = {("sot_small", "A"): 1.5e-4}

QUICK = ("deit_tiny_distilled_patch16_224", "t2t_vit_7", "lvvit_t", "so_vit_toy_112", "sot_toy_112")


def marks_of(name, recipe):
    """Which suites skip a record."""
    if recipe == "A" and name.startswith(LARGE):
        return [pytest.mark.slow]
    return [] if name in QUICK and recipe == "B" else [pytest.mark.thorough]


BACKBONES = pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name, "B")) for name in RECORDS])


def build(name):
    if name == "lvvit_s_384":
        return timm.create_model("lvvit_s", img_size=384)
    return timm.create_model(RECORDS[name].get("model", name), **RECORDS[name].get("kwargs", {}))


def official(key):
    """Return the official name of a key; timm renames DeiT III's LayerScale."""
    return key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2")


def without_randomness(model):
    """Turn off all dropout and stochastic depth, including the performer's dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model


@BACKBONES
def test_keys_and_cost__as_official(name):
    record, model = RECORDS[name], build(name)
    rows = [f"{official(key)} {list(tensor.shape)}" for key, tensor in model.state_dict().items()]
    assert hashlib.sha1("\n".join(rows).encode()).hexdigest() == record["keys_sha1"]
    cost = measure_cost(model, (record["img_size"],) * 2)
    assert cost.parameters == record["params"]
    assert cost.macs == pytest.approx(record["macs"], rel=2e-4)
    trained = dict(model.named_parameters())
    frozen = [key for key, flag in zip(model.state_dict(), record["decay"], strict=True) if flag == "-"]
    assert not [key for key in frozen if key in trained]
    assert len(frozen) + len(trained) == len(model.state_dict())


@BACKBONES
def test_weight_decay__same_parameters_as_official(name):
    record, model = RECORDS[name], build(name)
    also = ["dist_token"] if "distilled" in name else []
    optimizer = OptimizerFactory("adamw", weight_decay=0.05, decay_also=also).build(model, 512)
    decayed = {id(p): group["weight_decay"] > 0 for group in optimizer.param_groups for p in group["params"]}
    ours = [decayed.get(id(tensor)) for tensor in model.state_dict(keep_vars=True).values()]
    assert "".join("-" if flag is None else str(int(flag)) for flag in ours) == record["decay"]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [pytest.param(name, recipe, marks=marks_of(name, recipe)) for name in RECORDS for recipe in ("A", "B")],
)
@pytest.mark.sample(5)
def test_outputs_and_gradients__as_official(name, recipe):
    record = RECORDS[name]
    golden, x = record[recipe], images(record["img_size"])
    model = without_randomness(build(name))
    fill(model, record["fill"], recipe, official)
    model.eval()
    with torch.no_grad():
        assert_tensor(model(x), golden["eval"])
        heads = forward_heads(model, x)
        for head, value in {"head_cls": heads.cls, "head_dist": heads.distill}.items():
            if head in golden:
                assert_tensor(value, golden[head])
        if "evalbn_cls" in golden:
            assert_tensor(heads.cls, golden["evalbn_cls"])
            assert_tensor(heads.tokens, golden["evalbn_aux"])
            model.train()
            trained = forward_heads(model, x)
            assert_tensor(trained.cls, golden["train_cls"])
            assert_tensor(trained.tokens, golden["train_aux"])
            mixed = forward_heads(model, x, torch.tensor(golden["mixtoken"]["box"]))
            assert_tensor(mixed.cls, golden["mixtoken"]["train_cls"])
            assert_tensor(mixed.tokens, golden["mixtoken"]["train_aux"])
        if "train" in golden:
            assert_tensor(model.train()(x), golden["train"])
    if "grad" in golden:
        fill(model, record["fill"], recipe, official)  # training changed BatchNorm's statistics
        assert_gradients(model, x, golden["grad"], GRADIENT_RTOL.get((name, recipe), 1e-4))


def assert_gradients(model, x, expected, rtol):
    model.train()
    losses = [head.logsumexp(-1).mean() for head in forward_heads(model, x)[:3] if head is not None]
    loss = sum(losses)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-4)
    parameters, largest = dict(model.named_parameters()), max(norm for norm in expected["norms"] if norm)
    # PyTorch's own float32 norm of a gradient loses 1e-4 in large kernels.
    for key, norm in zip(model.state_dict(), expected["norms"], strict=True):
        if norm is None:
            assert key not in parameters
        else:
            assert parameters[key].grad.double().norm().item() == pytest.approx(norm, rel=rtol, abs=1e-6 * largest), key


@pytest.mark.parametrize("case", PARTS["isolated_modules"], ids=lambda case: case["name"])
def test_token_layers__as_official(case):
    import numpy as np

    layer = {"Token_performer": TokenPerformer, "Token_transformer": TokenTransformer}[case["name"]](147, 64).eval()
    assert [row[0] for row in case["state_dict"]] == list(layer.state_dict())
    with torch.no_grad():
        for key, shape, _, _, letter in case["state_dict"]:
            layer.state_dict()[key].copy_(draw(key, shape, letter, "B"))
        x = np.random.RandomState(case["input"]["seed"]).standard_normal(case["input"]["shape"]).astype(np.float32)
        out = layer(torch.from_numpy(x))
    np.testing.assert_allclose(out[0, 0, :8], case["out_[0,0,:8]"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out[-1, -1, :8], case["out_[-1,-1,:8]"], rtol=1e-4, atol=1e-5)
    assert out.double().norm().item() == pytest.approx(case["l2"], rel=1e-5)


@pytest.mark.parametrize("case", PARTS["sinusoid_tables"], ids=lambda case: str(case["shape"]))
def test_sinusoid_table__as_official(case):
    table = sinusoid_table(case["n"], case["d"])
    assert list(table.shape) == case["shape"]
    torch.testing.assert_close(table[0, 1, :8], torch.tensor(case["row1_first8"]), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(table[0, -1, -4:], torch.tensor(case["rowlast_last4"]), rtol=1e-6, atol=1e-7)
    flat = table.double().flatten()
    weights = torch.arange(flat.numel(), dtype=torch.float64) / flat.numel()
    assert (flat * weights).sum().item() == pytest.approx(case["weighted_sum"], rel=1e-7)


@pytest.mark.parametrize("name", PARTS["drop_path_per_block_at_rate_0.1"])
def test_stochastic_depth__as_official(name):
    model = timm.create_model(name, drop_path_rate=0.1)
    rates = [getattr(getattr(block, "drop_path1", None), "drop_prob", 0.0) for block in model.blocks]
    expected = PARTS["drop_path_per_block_at_rate_0.1"][name]
    assert rates == pytest.approx([rate or 0.0 for rate in expected], rel=1e-5)


@pytest.mark.parametrize("name", PARTS["init_stats"])
def test_initial_weights__distributed_as_official(name):
    torch.manual_seed(0)
    state = timm.create_model(name).state_dict()
    for key, mean, std, low, high in PARTS["init_stats"][name]:
        values = state[key].double()
        n = values.numel()
        assert values.std(correction=0).item() == pytest.approx(std, rel=0.05 + 4 / n**0.5, abs=1e-9), key
        assert values.mean().item() == pytest.approx(mean, abs=8 * std / n**0.5 + 1e-9), key
        bound = max(abs(low), abs(high))
        assert values.abs().max().item() <= 1.5 * bound + 1e-9, key
