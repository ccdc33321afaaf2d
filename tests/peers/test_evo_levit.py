"""Compare Evo-LeViT with the official code in both modes: logits, scores, gradients, decay, from its checkpoints."""

import re

import pytest
import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import vitrail
from peers.recorded import assert_tensor, draw, images, recorded
from vitrail.models import forward_heads
from vitrail.models.cost import measure_cost
from vitrail.models.evo_levit import convert_evo_levit
from vitrail.training import OptimizerFactory

pytestmark = pytest.mark.thorough

RECORD = recorded("evo_levit.json")["evo_levit_128s"]
HEADS = ("train_avg", "train_avg_dist", "train_cls", "train_cls_dist")
PARAMETERS = [key for key, _, _, decayed in RECORD["keys"] if decayed is not None]
TRADEOFFS = [key for key in PARAMETERS if key.endswith("learn_tradeoff")]


def own_names():
    """Return vitrail's name of each official parameter, without those of the learned weights."""
    numbered = {key: torch.tensor([number]) for number, key in enumerate(PARAMETERS)}
    converted = convert_evo_levit(numbered)
    del converted["stage_wise"], converted["tradeoff_logit"]
    return {PARAMETERS[int(number)]: key for key, number in converted.items()}


def official_weights(recipe):
    """Return the weights of the record, and those under second names."""
    weights = {key: draw(key, shape, letter, recipe) for key, shape, letter, _ in RECORD["keys"]}
    aliases = {re.sub(r"^blocks\.0\.m1\.", "stage_blocks.0.", key): value for key, value in weights.items()}
    return {**weights, **{key: value for key, value in aliases.items() if key.startswith("stage_blocks.")}}


def test_cost_and_decay__as_official():
    model = timm.create_model(RECORD["model"])
    for stage_wise in (False, True):
        model.stage_wise_prune = stage_wise
        cost = measure_cost(model, (224, 224))
        assert (cost.parameters, cost.macs) == (RECORD["params"], RECORD["macs"])
    groups = OptimizerFactory(weight_decay=0.025).build(model, 512).param_groups
    decayed = {id(value) for group in groups if group["weight_decay"] for value in group["params"]}
    names, parameters = own_names(), dict(model.named_parameters())
    assert len(names) == len(PARAMETERS) - len(TRADEOFFS)
    for key, _, _, official in RECORD["keys"]:
        if key in names:
            assert (id(parameters[names[key]]) in decayed) == bool(official), key
        elif key in TRADEOFFS:
            assert not official
    assert id(model.tradeoff_logit) not in decayed


@pytest.mark.parametrize("recipe", [pytest.param("A", marks=pytest.mark.thorough), "B"])
def test_outputs_and_gradients__as_official(recipe, tmp_path):
    """The record was made with the running statistics of every BatchNorm, in training mode too."""
    model, x, names = timm.create_model(RECORD["model"]), images(224), own_names()
    torch.save({"model": official_weights(recipe)}, tmp_path / "official.pth")
    vitrail.models.load_checkpoint(model, tmp_path / "official.pth")
    assert model.stage_wise_prune
    for mode in ("stagewise", "layerwise"):
        golden = RECORD[recipe][mode]
        model.stage_wise_prune = mode == "stagewise"
        with torch.no_grad():
            assert_tensor(model.eval()(x), golden["eval"])
            scores = model._stages(x)[-1][1]
        torch.testing.assert_close(scores, torch.tensor(golden["class_attention"]), rtol=2e-5, atol=1e-6)
        for module in model.train().modules():
            module.train(not isinstance(module, _BatchNorm) and module.training)
        model.zero_grad()
        outputs = forward_heads(model, x)
        extras = (outputs.extras["class_token"], outputs.extras["class_token_distill"])
        logits = (outputs.cls, outputs.distill, *extras)
        for name, head in zip(HEADS, logits, strict=True):
            assert_tensor(head, golden[name])
        sum(head.logsumexp(-1).mean() for head in logits).backward()
        parameters, largest = dict(model.named_parameters()), max(norm or 0 for norm in golden["norms"])
        found = {key: parameters[name].grad.double().norm().item() for key, name in names.items()}
        found |= dict(zip(TRADEOFFS, model.tradeoff_logit.grad.abs().flatten().tolist(), strict=True))
        for key, norm in zip(PARAMETERS, golden["norms"], strict=True):
            assert found[key] == pytest.approx(norm or 0, rel=1e-4, abs=1e-6 * largest), key
