"""Compare ViT-5 with its official implementation: names, logits, gradients, cost, rotation, checkpoints, optimiser."""

import hashlib

import numpy as np
import pytest
import timm
import torch
from torch import nn

import vitrail  # noqa: F401
from peers.recorded import assert_tensor, check_initial_weights, draw, images, recorded
from vitrail.data.sampling import EpochSampler
from vitrail.models import load_checkpoint
from vitrail.models.cost import measure_cost
from vitrail.models.vit5 import ViT5
from vitrail.objectives import BinaryCrossEntropy
from vitrail.training import OptimizerFactory
from vitrail.types import Outputs, Targets

RECORDS = recorded("vit5.json")
MODELS = RECORDS["models"]


def marks_of(name, recipe):
    """Which suites skip a record: the toys are run by default, the larger models by the slow suite only."""
    if name.startswith("vit5_toy"):
        return []
    return [
        pytest.mark.thorough,
        *([pytest.mark.slow] if name in ("vit5_base", "vit5_base_192", "vit5_xlarge") else []),
    ]


def build(name, **kwargs):
    record = MODELS[name]
    arguments = {"img_size": record["img_size"], **record["arguments"], **kwargs}
    return timm.create_model(record["builder"], **arguments) if record["builder"] else ViT5(**arguments)


def letter(key):
    """Return the fill of a key; LayerScale vectors are filled like norms, so that every block counts."""
    return "w" if "norm" in key or "gamma" in key else "n"


def weights(model, recipe):
    return {key: draw(key, value.shape, letter(key), recipe) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name, "B")) for name in MODELS])
def test_names_decay_and_cost__as_official(name):
    record = MODELS[name]
    with torch.device("meta"):
        model = build(name)
    exempt = model.no_weight_decay()
    rows = [
        f"{key} {list(value.shape)} {letter(key)} {int(value.ndim > 1 and key not in exempt)}"
        for key, value in sorted(model.state_dict().items())
    ]
    assert hashlib.sha1("\n".join(rows).encode()).hexdigest() == record["rows_sha1"]
    cost = measure_cost(model, (record["img_size"],) * 2)
    assert (cost.parameters, cost.tokens) == (record["params"], record["tokens"])
    assert cost.macs == pytest.approx(record["macs"], rel=2e-4)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(name, recipe, marks=marks_of(name, recipe))
        for name in MODELS
        for recipe in ("A", "B")
        if recipe in MODELS[name]
    ],
)
def test_outputs_and_gradients__as_official(name, recipe):
    record, model = MODELS[name], build(name)
    golden, x = record[recipe], images(record["img_size"])
    model.load_state_dict(weights(model, recipe))
    with torch.no_grad():
        assert_tensor(model.eval()(x), golden["eval"])
    loss = model.train()(x).logsumexp(-1).mean()
    loss.backward()
    assert loss.item() == pytest.approx(golden["grad"]["loss"], rel=1e-5)
    parameters, norms = dict(model.named_parameters()), golden["grad"]["norms"]
    for key, norm in zip(sorted(parameters), norms, strict=True):
        own = parameters[key].grad.double().norm().item()  # PyTorch's own sum of float32 loses 1e-4 in large matrices
        assert own == pytest.approx(norm, rel=1e-4, abs=1e-6 * max(norms)), key


@pytest.mark.parametrize("case", RECORDS["rope_tables"], ids=lambda case: f"{case['head_dim']}_{case['grid']}")
def test_rotation__as_official(case):
    """Base 10,000 for patches, 100 for registers; angle p turns channels 2p and 2p + 1."""
    width, grid = case["head_dim"], case["grid"]
    registers = grid**2 if case["theta"] == 100 else 0
    sizes = {"patch_size": 2, "embed_dim": width, "depth": 1, "num_heads": 1}
    model = ViT5(img_size=2 * grid, num_reg_tokens=registers, **sizes)
    table = model._pos_embed(torch.zeros(1, grid**2, width))[1][: grid**2]  # registers come first
    sin, cos = (half[:, ::2].double() for half in table.chunk(2, -1))
    index = torch.arange(sin.numel(), dtype=torch.float64) / sin.numel()
    assert (sin.flatten() * index).sum().item() == pytest.approx(case["weighted_sum_sin"], rel=1e-6)
    assert (cos.flatten() * index).sum().item() == pytest.approx(case["weighted_sum_cos"], rel=1e-6)
    if case["tokens"]:
        torch.testing.assert_close(cos[1], torch.tensor(case["tokens"]["cos"]).double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sin[1], torch.tensor(case["tokens"]["sin"]).double(), rtol=1e-6, atol=1e-6)


def test_attention__as_official():
    """The official order of tokens is class, patches, registers."""
    case = RECORDS["isolated_attention"]
    model = ViT5(img_size=96, embed_dim=96, depth=1, num_heads=3)
    attention = model.blocks[0].attn
    attention.load_state_dict({key: draw(key, shape, fill, "B") for key, shape, _, _, fill in case["state_dict"]})
    shape = case["input"]["shape"]
    drawn = np.random.RandomState(case["input"]["seed"]).standard_normal(shape).astype(np.float32)
    x = torch.from_numpy(drawn).requires_grad_()
    order = [0, *range(37, 41), *range(1, 37)]
    out = attention(x[:, order], rope=model._pos_embed(torch.zeros(1, 36, 96))[1])
    out = out[:, torch.tensor(order).argsort()]
    assert_tensor(out, case["output"])
    out.square().mean().backward()
    assert x.grad.norm().item() == pytest.approx(case["grad_input_l2"], rel=1e-4)


@pytest.mark.parametrize("case", RECORDS["rmsnorm"], ids=lambda case: f"scale {case['input_scale']}")
def test_norm__as_official(case):
    norm = ViT5(embed_dim=case["shape"][-1], depth=1, num_heads=2, img_size=16).norm
    norm.load_state_dict({"weight": draw("weight", case["shape"][-1:], "w", "A")})
    drawn = np.random.RandomState(case["seed"]).standard_normal(case["shape"]).astype(np.float32)
    x = torch.from_numpy(drawn) * case["input_scale"]
    assert_tensor(norm(x), case["output"])
    half = norm(x.bfloat16())  # computed in float32; the official one also leaves the result in float32
    assert half.dtype == torch.bfloat16
    assert half.double().norm().item() == pytest.approx(case["bf16_output_l2"], rel=1e-3)


def test_stochastic_depth__one_rate_in_all_blocks():
    model = timm.create_model("vit5_small", drop_path_rate=0.05)
    for branch in ("drop_path1", "drop_path2"):
        rates = [getattr(block, branch).drop_prob for block in model.blocks]
        assert rates == pytest.approx(RECORDS["drop_path_per_block"]["vit5_small_at_0.05"])


def test_initial_weights__distributed_as_official():
    check_initial_weights("vit5_small", RECORDS["init_stats"])


@pytest.mark.parametrize("name", ["vit5_toy", "vit5_toy_no_reg", "vit5_toy_reg9_hd24"])
def test_official_checkpoint__loads(name, tmp_path):
    """It has the weights' names of timm, and constants of the rotation in every block."""
    record, source, model = MODELS[name], build(name), build(name)
    constants = {
        f"blocks.{index}.attn.{end}": torch.tensor(values)
        for index in range(len(source.blocks))
        for end, values in record["constants"]["values"].items()
    }
    assert len(constants) == record["constants"]["keys"]
    content = {"model": nn.Module().state_dict(), "model_ema": {**weights(source, "B"), **constants}, "epoch": 799}
    torch.save(content, tmp_path / "vit5.pth")
    load_checkpoint(model, tmp_path / "vit5.pth")
    with torch.no_grad():
        assert_tensor(model.eval()(images(record["img_size"])), record["B"]["eval"])


@pytest.mark.parametrize("case", RECORDS["pos_embed_resize_bicubic"], ids=lambda c: f"{c['old_grid']}_{c['new_grid']}")
def test_official_checkpoint__positions_resized_as_official(case, tmp_path):
    side, sizes = case["new_grid"], {"patch_size": 2, "embed_dim": case["dim"], "depth": 1, "num_heads": 1}
    model = ViT5(img_size=2 * side, num_classes=4, **sizes)
    table = np.random.RandomState(case["seed"]).standard_normal((1, case["old_grid"] ** 2, case["dim"]))
    torch.save({**model.state_dict(), "pos_embed": torch.from_numpy(table.astype(np.float32))}, tmp_path / "x.pth")
    load_checkpoint(model, tmp_path / "x.pth")
    values = model.pos_embed.detach()
    torch.testing.assert_close(values[0, 0], torch.tensor(case["token0"]), rtol=1e-4, atol=1e-5)
    assert values.double().norm().item() == pytest.approx(case["l2"], rel=1e-5)


@pytest.mark.parametrize("case", RECORDS["lamb_steps"], ids=lambda case: f"seed {case['seed']}")
def test_lamb__arithmetic_of_the_official_optimiser(case):
    """Gradients are divided by their global norm above 1; the trust ratio applies to parameters with decay only."""
    random = np.random.RandomState(case["seed"])
    model = nn.Module()
    first, second = (torch.from_numpy(0.02 * random.standard_normal(shape)) for shape in case["shapes"][:2])
    for name, value in {"first": first, "second": second, "third": torch.zeros(2, 2).double()}.items():
        model.register_parameter(name, nn.Parameter(value))
    decay = case["weight_decay"][0]
    factory = OptimizerFactory("lamb", case["lr"], decay, lr_scaling="none", betas=case["betas"], eps=case["eps"])
    optimizer = factory.build(model, 2048)
    for expected in case["param_norms_per_step"]:
        for parameter in model.parameters():
            parameter.grad = torch.from_numpy(case["grad_scale"] * random.standard_normal(parameter.shape))
        optimizer.step()
        assert [p.norm().item() for p in model.parameters()] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", RECORDS["bce_binarised"], ids=lambda case: f"share {case['lam']}")
def test_loss__binarised_targets_as_official(case):
    """A share of 0.1 % counts as a full label."""
    random = np.random.RandomState(case["seed"])
    logits = torch.from_numpy(2 * random.standard_normal((case["B"], case["C"]))).requires_grad_()
    truth = nn.functional.one_hot(torch.from_numpy(random.randint(0, case["C"], case["B"])), case["C"]).double()
    target = case["lam"] * truth + (1 - case["lam"]) * truth.flip(0)
    loss = BinaryCrossEntropy(smoothing=0.0, threshold=0.0)(Outputs(logits), Targets(target))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)
    assert logits.grad.norm().item() == pytest.approx(case["grad_l2"], rel=1e-5)


@pytest.mark.parametrize("case", RECORDS["repeated_augmentation"], ids=lambda case: f"{case['dataset']} images")
def test_repeated_augmentation__draws_as_official(case):
    """The official epoch is a multiple of 256 images over all ranks; its seed is the epoch."""
    ranks = case["replicas"]
    samplers = [EpochSampler(case["dataset"], 0, True, rank, ranks, 256 // ranks, repeats=3) for rank in range(ranks)]
    assert {len(sampler) for sampler in samplers} == {case["selected_per_replica"]}
    if "rank1_epoch3_first12" in case:
        for sampler in samplers:
            sampler.set_epoch(3)
        drawn = [[draw.sample for draw in sampler] for sampler in samplers]
        assert drawn[1][:12] == case["rank1_epoch3_first12"]
        assert len(set().union(*drawn)) == case["distinct_over_all_ranks"]
