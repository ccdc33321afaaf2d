"""DynamicViT's recipe equals a plain loop written from its paper and code: 30 steps.

Shapes: B images, N patch tokens, S stages, C classes.
"""

import copy
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from plain_loop import CLASSES, EPOCHS, SIDE, SMALL, STEPS, Batches, Losses
from programs import PROJECT
from vitrail.data.randomness import reseed
from vitrail.models import create_model, forward_heads
from vitrail.models.pretrained import PretrainedClassifier
from vitrail.models.teacher import Teacher
from vitrail.runs.config import instantiate
from vitrail.training import ImageClassifier

pytestmark = pytest.mark.thorough

NAMES = [chr(ord("a") + number) for number in range(CLASSES)]


def rate(step):
    """Return the learning rate of the predictors: up to the peak at the last warm-up step, then half a cosine."""
    warmup, total = 2 * STEPS, EPOCHS * STEPS
    if step < warmup:
        return 1e-3 * step / (warmup - 1)
    return 1e-6 + 0.5 * (1e-3 - 1e-6) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def divergence(student, teacher):
    p = teacher.softmax(-1)
    return (p * (p.log() - student.log_softmax(-1))).sum(-1)


def loss_of(model, dense, batch, step, ratio_weight):
    """Return the published loss: label, kept shares of 0.7 and 0.49, class and token terms of the dense backbone."""
    reseed(7, step + 1, 0)
    heads = forward_heads(model, batch.image)
    smooth = 0.9 * F.one_hot(batch.label, CLASSES) + 0.1 / CLASSES
    loss = -(smooth * heads.cls.log_softmax(-1)).sum(-1).mean()
    for stage, wanted in enumerate((0.7, 0.7**2)):
        loss = loss + ratio_weight / 2 * (heads.extras["decisions"][:, stage].mean(1) - wanted).square().mean()
    kept = heads.extras["decisions"][:, -1] > 0.5
    with torch.no_grad():
        taught, features = forward_heads(dense, batch.image), dense.forward_features(batch.image)[:, 1:]
    if heads.tokens is None:
        token_loss = (heads.extras["features"][kept] - features[kept]).square().mean()
    else:
        token_loss = divergence(heads.tokens[kept], taught.tokens[kept]).mean()
    return loss + 0.5 * divergence(heads.cls, taught.cls).mean() + 0.5 * token_loss


@pytest.mark.parametrize(
    ("recipe", "dense_name", "ratio_weight"),
    [
        ("dynamicvit_deit_small", "deit_small_patch16_224", 2.0),
        ("dynamicvit_deit_base", "deit_base_patch16_224", 5.0),
        ("dynamicvit_lvvit_s", "lvvit_s", 2.0),
    ],
)
@pytest.mark.sample(1)
def test_recipe__equals_a_plain_loop(recipe, dense_name, ratio_weight, tmp_path):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        config = compose("train", [f"experiment={recipe}", "schedule.warmup_epochs=2", "init_from=x", "data.root=x"])
        parts = [instantiate(config[key], key) for key in ("objective", "optimizer", "schedule")]
        torch.manual_seed(0)
        dense = create_model(dense_name, CLASSES, SIDE, **SMALL).eval()
        classifier = PretrainedClassifier(dense, dense_name, (SIDE, SIDE), (0.5,) * 3, (0.5,) * 3, classes=NAMES)
        teacher = Teacher(classifier, (0.5,) * 3, (0.5,) * 3, NAMES)
        targets = instantiate(config.targets, "targets", teacher=teacher)
    model = create_model(config.model.name, CLASSES, SIDE, selection_blocks=(1, 2), **SMALL)
    reference, data = copy.deepcopy(model).train(), Batches()
    module = ImageClassifier(model, parts[0], CLASSES, parts[1], parts[2], None, targets, seed=7)
    losses = Losses()
    fit = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[losses], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    fit.fit(module, datamodule=data)

    groups = []
    for new in (True, False):
        for decayed in (True, False):
            members = [
                value
                for key, value in reference.named_parameters()
                if ("predictor" in key) == new and (value.ndim > 1 and key not in ("cls_token", "pos_embed")) == decayed
            ]
            groups.append({"params": members, "weight_decay": 0.05 if decayed else 0.0, "new": new})
    plain, expected = torch.optim.AdamW(groups, lr=1.0), []
    before = {key: value.detach().clone() for key, value in reference.named_parameters()}
    for step in range(EPOCHS * STEPS):
        for group in plain.param_groups:
            group["lr"] = rate(step) * (1 if group["new"] else 0.0 if step < 5 * STEPS else 0.01)
        loss = loss_of(reference, dense, data.content[step % STEPS], step, ratio_weight)
        plain.zero_grad()
        loss.backward()
        plain.step()
        expected.append(loss.item())
        if step == 5 * STEPS - 1:
            assert all(
                torch.equal(value, before[key]) == ("predictor" not in key)
                for key, value in reference.named_parameters()
            )
    assert losses.values == pytest.approx(expected, rel=1e-5)
    for key, value in reference.named_parameters():
        if not key.endswith("qkv.bias"):  # the loss does not depend on the keys' biases
            torch.testing.assert_close(module.model.get_parameter(key), value, rtol=1e-3, atol=1e-5, msg=key)
