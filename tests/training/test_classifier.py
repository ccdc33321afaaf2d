"""The LightningModule gives the same losses, weights and EMA weights as a plain training loop."""

import copy

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2

from small_training import build, trainer
from vitrail.data import Augmentation, ImageDataModule, MixupCutMix
from vitrail.data.sources import Digits
from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.objectives import CrossEntropy
from vitrail.training import EMA, CosineSchedule, ImageClassifier, OptimizerFactory
from vitrail.types import IGNORE, Batch


class Losses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def test_training__equals_a_plain_loop(tmp_path):
    """AdamW, per-step cosine, mixing, clipping, accumulation and EMA over 30 optimiser steps, to 1e-5."""
    mixing = MixupCutMix(0.8, 1.0)
    optimizer = OptimizerFactory(lr=2e-3, lr_scaling="none", betas=(0.9, 0.999), eps=1e-8)
    schedule = CosineSchedule(1, 1e-6, 1e-5, per_step=True)
    module, data = build(mixing, optimizer=optimizer, schedule=schedule, seed=5)
    model, average = copy.deepcopy(module.model), None
    recorded, ema = Losses(), EMA(decay=0.9)
    fit = trainer(
        tmp_path, [recorded, ema], max_epochs=3, limit_train_batches=20, limit_val_batches=0,
        accumulate_grad_batches=2, gradient_clip_val=0.5,
    )  # fmt: skip
    fit.fit(module, datamodule=data)

    plain = create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)
    scheduler = schedule.build(plain, 3, 10)
    losses, step, seen = [], 0, 0
    sampler_data = ImageDataModule(Digits(), augment=Augmentation(), image_size=8, batch_size=16, num_workers=0)
    sampler_data.setup()
    loader = sampler_data.train_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        for number, batch in zip(range(20), loader, strict=False):
            mix = mixing.for_batch(batch.image.shape, None, (5, seen, 0))
            images, target = mix.images(batch.image), mix.probabilities(torch.eye(10)[batch.label])
            seen += 1
            loss = torch.sum(-(0.9 * target + 0.01) * F.log_softmax(model(images), -1), -1).mean() / 2
            loss.backward()
            losses.append(loss.item())  # as Lightning reports it: divided by the number of accumulated batches
            if number % 2:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                plain.step()
                plain.zero_grad()
                step += 1
                scheduler.step_update(step)
                weights = [parameter.detach().clone() for parameter in model.parameters()]
                decay = min(0.9, step / (9 + step))  # the first update copies the weights, so step 1 is update 0
                average = weights if step == 1 else [
                    decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)
                ]  # fmt: skip
    assert len(losses) == 60
    assert recorded.losses == pytest.approx(losses, rel=1e-5)
    for ours, theirs in ((module.model.state_dict(), list(model.parameters())), (ema.average, average)):
        for (name, one), other in zip(ours.items(), theirs, strict=True):
            one, other = one.detach(), other.detach()
            if name.endswith(
                "qkv.bias"
            ):  # the loss does not depend on the keys' biases: Adam amplifies rounding errors
                one, other = (torch.cat((bias[:64], bias[128:])) for bias in (one, other))
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_validation__metrics_without_ignored_images():
    module, _ = build()
    module.eval()
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 10
    labels[[2, 7]] = IGNORE
    for part in (slice(0, 5), slice(5, 12)):
        module.validation_step(Batch(images[part], labels[part], []), 0)
    metrics = module.val_metrics.compute_and_reset("val/")
    with torch.no_grad():
        logits = module.model(images)
    kept = labels != IGNORE
    order = logits[kept].argsort(1, descending=True)
    assert metrics["val/top1"] == pytest.approx(100 * (order[:, 0] == labels[kept]).float().mean().item())
    hits = (order[:, :5] == labels[kept][:, None]).any(1)
    assert metrics["val/top5"] == pytest.approx(100 * hits.float().mean().item())
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits[kept], labels[kept]).item(), rel=1e-5)


def test_validation__fewer_than_five_classes():
    model = create_model("vit_nano", 2, 8, depth=1)
    module = ImageClassifier(model, CrossEntropy(), 2)
    module.validation_step(Batch(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), []), 0)
    assert module.val_metrics.compute_and_reset("")["top5"] == 100


def test_forward__distilled_model_averages_its_two_heads():
    model = create_model("deit_nano_distilled", 10, 8, depth=1).eval()
    module = ImageClassifier(model, CrossEntropy(), 10).eval()
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(module(images), model(images))


def test_grad_checkpointing__same_gradients_or_refused():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    gradients = []
    for checkpointing in (False, True):
        module, _ = build(grad_checkpointing=checkpointing)
        loss = F.cross_entropy(module(images), labels)
        loss.backward()
        gradients.append(module.model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(ConfigError, match=r"grad_checkpointing=true: Linear does not support it"):
        ImageClassifier(torch.nn.Linear(2, 2), CrossEntropy(), 2, grad_checkpointing=True)
