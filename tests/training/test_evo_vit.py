"""The recipes of Evo-ViT equal a plain loop of 30 steps; the mode of the epoch is in checkpoints and EMA weights.

Shapes: B images, C classes.
"""

import copy
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from plain_loop import BATCH, CLASSES, EPOCHS, SIDE, SMALL, STEPS, Batches, Losses
from programs import PROJECT
from vitrail.models import create_model, forward_heads
from vitrail.models.pretrained import PretrainedClassifier
from vitrail.models.teacher import Teacher
from vitrail.runs.config import instantiate
from vitrail.training import ImageClassifier

pytestmark = pytest.mark.thorough

NAMES = [chr(ord("a") + number) for number in range(CLASSES)]
SMALL_LEVIT = {"embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": 2, "depth": (3, 2, 1)}
RECIPES = {  # model arguments, weight decay, parameters without it, largest gradient norm of a row over its norm
    "evo_deit_small": ({**SMALL, "stages": (1, 2)}, 0.05, ("cls_token", "pos_embed"), None),
    "evo_levit_128": (SMALL_LEVIT, 0.025, ("pos_embed", "tradeoff_logit"), 0.01),
}


def rate(step):
    """Return DeiT's learning rate, one epoch late."""
    epoch, peak = max(0, step // STEPS - 1), 5e-4 * BATCH / 512
    if epoch < 2:
        return 1e-6 + epoch * (peak - 1e-6) / 2
    return 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * epoch / EPOCHS))


def loss_of(heads, batch, teacher):
    """Return the label's loss, and with a teacher the mean of it and the loss with the teacher's class."""
    smooth = 0.9 * F.one_hot(batch.label, CLASSES) + 0.1 / CLASSES
    loss = sum(
        -0.5 * (smooth * logits.log_softmax(-1)).sum(-1).mean() for logits in (heads.cls, heads.extras["class_token"])
    )
    if teacher is None:
        return loss
    taught = teacher(batch.image).argmax(-1)
    students = (heads.distill, heads.extras["class_token_distill"])
    return 0.5 * loss + 0.25 * sum(F.cross_entropy(logits, taught) for logits in students)


@torch.no_grad()
def clip(model, factor):
    """Scale each row's gradient to at most `factor` times the norm of its weights, at least 0.001."""
    for value in model.parameters():
        rows = value.flatten(1) if value.ndim > 1 else value[None]
        gradient = value.grad.view_as(rows)
        largest = factor * rows.norm(dim=1, keepdim=True).clamp(min=1e-3)
        gradient *= (largest / gradient.norm(dim=1, keepdim=True).clamp(min=1e-6)).clamp(max=1)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe__equals_a_plain_loop_and_saves_the_mode(recipe, tmp_path):
    arguments, weight_decay, exempt, clip_factor = RECIPES[recipe]
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        config = compose("train", [f"experiment={recipe}", "schedule.warmup_epochs=2", "data.root=x"])
        objective, optimizer, schedule = (
            instantiate(config[key], key) for key in ("objective", "optimizer", "schedule")
        )
        torch.manual_seed(0)
        teacher = None
        if config.teacher is not None:
            dense = create_model("vit_tiny_patch16_224", CLASSES, SIDE, **SMALL)
            classifier = PretrainedClassifier(dense, "dense", (SIDE, SIDE), (0.5,) * 3, (0.5,) * 3, classes=NAMES)
            teacher = Teacher(classifier, (0.5,) * 3, (0.5,) * 3, NAMES)
        targets = instantiate(config.targets, "targets", teacher=teacher)
        callbacks = [instantiate(config.callbacks[key], key) for key in ("adaptive_clip", "ema")]
    model = create_model(config.model.name, CLASSES, SIDE, **arguments)
    reference, data = copy.deepcopy(model).train(), Batches()
    module = ImageClassifier(model, objective, CLASSES, optimizer, schedule, None, targets, seed=7)
    losses = Losses()
    fit = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[losses, *callbacks], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=tmp_path,
    )  # fmt: skip
    fit.fit(module, datamodule=data)

    groups = [
        {
            "params": [
                value
                for key, value in reference.named_parameters()
                if (value.ndim > 1 and key.rpartition(".")[2] not in exempt) == decayed
            ],
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    plain, expected = torch.optim.AdamW(groups, lr=1.0), []
    for step in range(EPOCHS * STEPS):
        reference.stage_wise_prune = step // STEPS >= 7  # two thirds of 10 epochs, rounded up
        for group in plain.param_groups:
            group["lr"] = rate(step)
        batch = data.content[step % STEPS]
        loss = loss_of(forward_heads(reference, batch.image), batch, teacher)
        plain.zero_grad()
        loss.backward()
        if clip_factor:
            clip(reference, clip_factor)
        plain.step()
        expected.append(loss.item())
    assert losses.values == pytest.approx(expected, rel=1e-5)
    for key, value in reference.named_parameters():
        if not key.endswith("qkv.bias"):  # the loss does not depend on the keys' biases
            torch.testing.assert_close(module.model.get_parameter(key), value, rtol=1e-3, atol=1e-5, msg=key)

    fit.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    for key in ("state_dict", "current_model_state"):  # EMA weights and raw weights
        assert saved[key]["model.stage_wise"]
        fresh = create_model(config.model.name, CLASSES, SIDE, **arguments)
        fresh.load_state_dict(
            {name.removeprefix("model."): value for name, value in saved[key].items() if name.startswith("model.")}
        )
        assert fresh.stage_wise_prune
