"""Compare VOLO and its training with the official implementation: names, logits of both heads, gradients, MixToken."""

import hashlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.volo import VOLO, ClassBlock, Downsample, OutlookAttention, Outlooker, Transformer

import vitrail  # noqa: F401
from peers.recorded import assert_tensor, check_initial_weights, draw, images, recorded
from peers.test_token_labels import check_loss
from vitrail.data import Augmentation, MixToken
from vitrail.models import forward_heads, load_checkpoint
from vitrail.models.cost import measure_cost
from vitrail.models.volo import TokenVOLO, declare_token_logits
from vitrail.types import InputSpec

pytestmark = pytest.mark.thorough

RECORDS = recorded("volo.json")
MODELS = RECORDS["models"]


def marks_of(name):
    """Which suites skip a record: the toys are run by default, the largest models by the slow suite only."""
    if name.startswith("volo_toy"):
        return []
    large = name != "volo_d1"
    return [pytest.mark.thorough, *([pytest.mark.slow] if large else [])]


def build(name):
    record = MODELS[name]
    arguments = {"img_size": record["img_size"], **record["arguments"]}
    model = timm.create_model(record["builder"], **arguments) if record["builder"] else VOLO(**arguments)
    return declare_token_logits(model)


def letter(key):
    if key.endswith("running_var"):
        return "v"
    if key.endswith("num_batches_tracked"):
        return "z"
    batch_norm = key.startswith("patch_embed.conv.") and key.split(".")[2] in "147"
    return "w" if key.endswith(".weight") and ("norm" in key or batch_norm) else "n"


def fill(model, recipe):
    weights = {key: draw(key, value.shape, letter(key), recipe) for key, value in model.state_dict().items()}
    model.load_state_dict(weights)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks_of(name)) for name in MODELS])
def test_names_decay_and_cost__as_official(name):
    record = MODELS[name]
    with torch.device("meta"):
        model = build(name)
    exempt, trained = model.no_weight_decay(), dict(model.named_parameters())
    rows = [
        f"{key} {list(value.shape)} {int(value.ndim > 1 and key not in exempt) if key in trained else '-'}"
        for key, value in model.state_dict().items()
    ]
    assert hashlib.sha1("\n".join(rows).encode()).hexdigest() == record["rows_sha1"]
    cost = measure_cost(model, (record["img_size"],) * 2)
    assert cost.parameters == record["params"]
    assert cost.macs == pytest.approx(record["macs"], rel=2e-4)  # without unfold and fold
    if isinstance(model, TokenVOLO):
        assert list(model.token_grid((record["img_size"],) * 2)) == record["token_grid"]


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(name, recipe, marks=marks_of(name))
        for name in MODELS
        for recipe in ("A", "B")
        if recipe in MODELS[name]
    ],
)
def test_outputs_and_gradients__as_official(name, recipe):
    record, model = MODELS[name], build(name)
    golden, x = record[recipe], images(record["img_size"])
    fill(model, recipe)
    with torch.no_grad():
        assert_tensor(model.eval()(x), golden["eval"])
        if "train" in golden:
            assert_tensor(model.train()(x), golden["train"])
        for mode, training in (("evalbn", False), ("train", True)):
            if f"{mode}_cls" in golden:
                heads = forward_heads(model.train(training), x)
                assert_tensor(heads.cls, golden[f"{mode}_cls"])
                assert_tensor(heads.tokens, golden[f"{mode}_aux"])
    if "grad" in golden:
        loss = loss_of(model, x)
        loss.backward()
        assert loss.item() == pytest.approx(golden["grad"]["loss"], rel=1e-5)
        norms = golden["grad"]["norms"]
        for (key, parameter), norm in zip(model.named_parameters(), norms, strict=True):
            assert parameter.grad.double().norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-6 * max(norms)), key


def loss_of(model, x, box=None):
    model.train()
    return sum(head.logsumexp(-1).mean() for head in forward_heads(model, x, box)[:2] if head is not None)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        pytest.param(name, recipe, marks=marks_of(name))
        for name in MODELS
        for recipe in ("A", "B")
        if "mixtoken" in MODELS[name].get(recipe, {})
    ],
)
def test_mixtoken__as_official(name, recipe):
    """The box is in cells of the token grid; the map of patches has twice as many rows and columns."""
    record, model = MODELS[name], build(name)
    golden, x = record[recipe]["mixtoken"], images(record["img_size"])
    box = torch.tensor(golden["bbox"])
    fill(model, recipe)
    heads = forward_heads(model.train(), x, box)
    assert_tensor(heads.cls, golden["train_cls"])
    assert_tensor(heads.tokens, golden["train_aux"])
    if "loss" in golden:
        loss = loss_of(model, x, box)
        loss.backward()
        assert loss.item() == pytest.approx(golden["loss"], rel=1e-5)
        parameters = dict(model.named_parameters())
        total = sum(parameter.grad.double().square().sum() for parameter in parameters.values()).sqrt()
        assert total.item() == pytest.approx(golden["grad_total_l2"], rel=1e-4)
        for key, norm in golden["grad_some"].items():
            assert parameters[key].grad.double().norm().item() == pytest.approx(norm, rel=1e-4), key


@pytest.mark.parametrize("case", RECORDS["boxes"], ids=lambda case: f"seed {case['np_seed']}")
def test_boxes__as_official(case):
    random, grid = np.random.RandomState(case["np_seed"]), (case["token_grid"],) * 2
    for _, *box in case["draws_lam_x1_y1_x2_y2"]:
        assert list(MixToken().draw(grid, random)) == box


@pytest.mark.parametrize("case", RECORDS["loss"], ids=lambda case: f"seed {case['seed']}")
def test_loss__as_official(case):
    check_loss(case)


@pytest.mark.parametrize("case", RECORDS["pos_embed_resize_bicubic_4d"], ids=lambda case: str(case["out_shape"][1]))
def test_official_checkpoint__positions_resized_as_official(case, tmp_path):
    side, dim = 16 * case["out_shape"][1], case["out_shape"][3]
    sizes = {"embed_dims": [dim] * 4, "num_heads": [1] * 4, "stem_hidden_dim": 4, "num_classes": 3}
    model = declare_token_logits(VOLO(layers=[1, 1, 1, 1], img_size=side, **sizes))
    table = np.random.RandomState(case["seed"]).standard_normal(case["table"]).astype(np.float32)
    torch.save({"state_dict": {**model.state_dict(), "pos_embed": torch.from_numpy(table)}}, tmp_path / "x.pth.tar")
    (note,) = load_checkpoint(model, tmp_path / "x.pth.tar")
    assert note.startswith(f"position embeddings resized from {table.shape[1]}x{table.shape[2]} to")
    values = model.pos_embed.detach()
    torch.testing.assert_close(values[0, 0, 0], torch.tensor(case["row0_col0"]), rtol=1e-4, atol=1e-5)
    assert values.double().norm().item() == pytest.approx(case["l2"], rel=1e-5)


@pytest.mark.parametrize("name", ["volo_d1", pytest.param("volo_d2", marks=pytest.mark.thorough)])
def test_stochastic_depth__none_in_outlookers_and_class_blocks(name):
    (key,) = [key for key in RECORDS["drop_path_per_block"] if key.startswith(name)]
    expected = RECORDS["drop_path_per_block"][key]
    with torch.device("meta"):
        model = timm.create_model(f"{name}_224", drop_path_rate=float(key.rpartition("_")[2]))
    blocks = [block for stage in model.network[2:] for block in stage]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx(expected["transformers"])
    others = [*model.network[0], *model.post_network]
    assert {getattr(getattr(block, "drop_path1", None), "drop_prob", 0.0) for block in others} == {0.0}


def test_initial_weights__distributed_as_official():
    check_initial_weights("volo_d1_224", RECORDS["init_stats"])


LAYERS = {"outlooker": Outlooker, "transformer": Transformer, "class_block": ClassBlock, "downsample": Downsample}


@pytest.mark.parametrize("case", RECORDS["isolated_modules"], ids=lambda case: case["name"])
def test_layers__as_official(case):
    """timm's layers, among them outlook attention of other strides and kernels than the published models'."""
    layer = LAYERS.get(case["name"], OutlookAttention)(**case["config"]).eval()
    layer.load_state_dict({key: draw(key, shape, fill, "B") for key, shape, _, _, fill in case["state_dict"]})
    drawn = np.random.RandomState(case["input"]["seed"]).standard_normal(case["input"]["shape"]).astype(np.float32)
    x = torch.from_numpy(drawn).requires_grad_()
    out = layer(x)
    assert list(out.shape) == case["output_shape"]
    assert_tensor(out.reshape(len(x), -1, out.shape[-1]), case["output_flattened"])
    out.square().mean().backward()
    assert x.grad.double().norm().item() == pytest.approx(case["grad_input_l2"], rel=1e-4)
    norms = {key: parameter.grad.double().norm().item() for key, parameter in layer.named_parameters()}
    assert norms == pytest.approx(case["grad_norms"], rel=1e-4)


@pytest.mark.parametrize("case", RECORDS["eval_crop"]["resize_shorter_side_to"].items(), ids=lambda case: case[0])
def test_evaluation_crop__as_official(case):
    """Above 1, the image is resized to less than the crop, which is padded with black."""
    (side, share), resized = case[0].split(" at "), case[1]
    transform = Augmentation(crop_pct=float(share)).evaluation(InputSpec((int(side),) * 2, (0.5,) * 3, (0.5,) * 3))
    found = transform(Image.new("RGB", (600, 500), "white"))
    assert found.shape == (3, int(side), int(side))
    covered = int((found[0].amax(1) > 0).sum())
    assert covered == min(resized, int(side))
    assert transform.transforms[0].size == resized
