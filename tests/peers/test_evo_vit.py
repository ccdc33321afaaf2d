"""Compare Evo-ViT with the official code in both modes: logits, kept tokens, loss, gradients, from its checkpoints."""

import re

import pytest
import timm
import torch

import vitrail
from peers.recorded import SoftCrossEntropy, as_strings, assert_tensor, cases_of, draw, images, recorded, soft_targets
from vitrail.models import forward_heads
from vitrail.models.cost import measure_cost
from vitrail.models.evo_vit import EvoViT
from vitrail.objectives import EvoViTLoss
from vitrail.types import Targets

pytestmark = pytest.mark.thorough

RECORDS = {name: record for name, record in recorded("token_pruning.json").items() if record["kind"] == "evo_deit"}
CASES = cases_of(RECORDS)


def build(record):
    return timm.create_model(record["model"]) if record["model"] else EvoViT(**record["arguments"])


def official_norms(model):
    """Return the gradient norm of each official tensor."""
    found = {}
    for key, parameter in model.named_parameters():
        gradient = parameter.grad.double()
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", key):
            rows = len(gradient) // 3
            found[f"qks.{match[1]}.qk.{match[2]}"] = gradient[: 2 * rows].norm().item()
            found[f"vs.{match[1]}.v.{match[2]}"] = gradient[2 * rows :].norm().item()
        else:
            name = re.sub(r"^blocks\.(\d+)\.(?:norm1|(attn\.proj))\.", r"\2norms.\1.", key)
            found[re.sub(r"^attn\.projnorms", "projs", name).replace("fc_norm", "norm")] = gradient.norm().item()
    return found


@pytest.mark.parametrize("name", RECORDS)
def test_cost__as_official(name):
    """The official code reads the class attention from the attention matrix; here it is computed again."""
    record, model = RECORDS[name], build(RECORDS[name])
    model.stage_wise_prune = True
    cost = measure_cost(model, (record["img_size"],) * 2)
    assert cost.parameters == record["params"]
    assert cost.macs == pytest.approx(record["macs"], rel=1e-3)


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_outputs_losses_and_gradients__as_official(name, recipe, tmp_path):
    record, model = RECORDS[name], build(RECORDS[name])
    weights = {key: draw(key, shape, letter, recipe) for key, shape, letter in record["keys"]}
    torch.save({"model": weights}, tmp_path / "official.pth")
    vitrail.models.load_checkpoint(model, tmp_path / "official.pth")
    assert model.stage_wise_prune
    x = images(record["img_size"], seed=record["input_seed"])
    for mode in ("stagewise", "layerwise"):
        golden = record[recipe][mode]
        model.stage_wise_prune = mode == "stagewise"
        with torch.no_grad():
            assert_tensor(model.eval()(x), golden["eval"])
        model.zero_grad()
        outputs = forward_heads(model.train(), x)
        kept = [as_strings(chosen) for chosen in outputs.extras["decisions"].unbind(1)]
        assert kept == list(golden["kept"].values())
        assert_tensor(outputs.cls, golden["train_avg"])
        assert_tensor(outputs.extras["class_token"], golden["train_cls"])
        target = soft_targets(2, outputs.cls.shape[1], golden["loss"]["target_seed"])
        loss = EvoViTLoss(base=SoftCrossEntropy())(outputs, Targets(target))["loss"]
        assert loss.item() == pytest.approx(golden["loss"]["value"], rel=1e-4)
        sum(logits.logsumexp(-1).mean() for logits in (outputs.cls, outputs.extras["class_token"])).backward()
        found, largest = official_norms(model), max(golden["norms"])
        for (key, _, _), norm in zip(record["keys"], golden["norms"], strict=True):
            assert found[key] == pytest.approx(norm, rel=1e-4, abs=1e-6 * largest), key
