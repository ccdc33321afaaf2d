"""Evo-ViT's recipe equals a plain loop of 30 steps; the mode of the epoch is in checkpoints and EMA weights.

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
from vitrail.runs.config import instantiate
from vitrail.training import ImageClassifier

pytestmark = pytest.mark.thorough


def rate(step):
    """Return DeiT's learning rate, one epoch late."""
    epoch, peak = max(0, step // STEPS - 1), 5e-4 * BATCH / 512
    if epoch < 2:
        return 1e-6 + epoch * (peak - 1e-6) / 2
    return 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * epoch / EPOCHS))


def test_recipe__equals_a_plain_loop_and_saves_the_mode(tmp_path):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        config = compose("train", ["experiment=evo_deit_small", "schedule.warmup_epochs=2", "data.root=x"])
        objective, optimizer, schedule = (
            instantiate(config[key], key) for key in ("objective", "optimizer", "schedule")
        )
        targets, ema = instantiate(config.targets, "targets"), instantiate(config.callbacks.ema, "ema")
    torch.manual_seed(0)
    model = create_model(config.model.name, CLASSES, SIDE, stages=(1, 2), **SMALL)
    reference, data = copy.deepcopy(model).train(), Batches()
    module = ImageClassifier(model, objective, CLASSES, optimizer, schedule, None, targets, seed=7)
    losses = Losses()
    fit = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[losses, ema], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    fit.fit(module, datamodule=data)

    exempt = ("cls_token", "pos_embed")
    groups = [
        {
            "params": [
                value
                for key, value in reference.named_parameters()
                if (value.ndim > 1 and key not in exempt) == decayed
            ],
            "weight_decay": 0.05 if decayed else 0.0,
        }
        for decayed in (True, False)
    ]
    plain, expected = torch.optim.AdamW(groups, lr=1.0), []
    for step in range(EPOCHS * STEPS):
        reference.stage_wise_prune = step // STEPS >= 7  # two thirds of 10 epochs, rounded up
        for group in plain.param_groups:
            group["lr"] = rate(step)
        batch = data.content[step % STEPS]
        heads = forward_heads(reference, batch.image)
        smooth = 0.9 * F.one_hot(batch.label, CLASSES) + 0.1 / CLASSES
        loss = sum(
            -0.5 * (smooth * logits.log_softmax(-1)).sum(-1).mean()
            for logits in (heads.cls, heads.extras["class_token"])
        )
        plain.zero_grad()
        loss.backward()
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
        fresh = create_model(config.model.name, CLASSES, SIDE, stages=(1, 2), **SMALL)
        fresh.load_state_dict(
            {name.removeprefix("model."): value for name, value in saved[key].items() if name.startswith("model.")}
        )
        assert fresh.stage_wise_prune
