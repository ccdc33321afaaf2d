"""One recipe of each family equals a plain loop written from its paper: 30 steps from the same weights and batches.

Shapes: B images, C classes, N patch tokens.
"""

import copy
import math

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from timm.optim import Lamb
from torch import nn

from programs import PROJECT
from vitrail.data.label_maps import token_targets
from vitrail.models import create_model, forward_heads
from vitrail.runs.config import instantiate
from vitrail.training import ImageClassifier
from vitrail.types import Batch, LabelMap

pytestmark = pytest.mark.thorough

EPOCHS, STEPS, BATCH, CLASSES, SIDE = 10, 3, 8, 5, 64


def batches(label_maps):
    """Return the three batches of every epoch."""
    random = torch.Generator().manual_seed(0)
    found = []
    for number in range(STEPS):
        images = torch.randn(BATCH, 3, SIDE, SIDE, generator=random)
        labels = torch.randint(0, CLASSES, (BATCH,), generator=random)
        corner = torch.rand(BATCH, 2, generator=random) * 0.5
        maps = LabelMap(
            3 * torch.randn(BATCH, 2, 9, 9, generator=random),
            torch.rand(BATCH, CLASSES, 9, 9, generator=random).argsort(1)[:, :2],
            torch.cat((corner, corner + 0.4), 1),
            torch.arange(BATCH) % 2 == number % 2,
        )
        found.append(Batch(images, labels, [""] * BATCH, maps if label_maps else None))
    return found


class Batches(L.LightningDataModule):
    def __init__(self, content, images):
        super().__init__()
        self.content, self.batch_size = content, images

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.content, batch_size=None, shuffle=False)


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


def cosine(peak, epoch, warmup, end, low=1e-5):
    """Return the learning rate of DeiT, T2T-ViT and LV-ViT: linear warm-up, cosine counted from epoch 0, cooldown."""
    if epoch < warmup:
        return 1e-6 + epoch * (peak - 1e-6) / warmup
    if epoch >= end:
        return low
    return low + 0.5 * (peak - low) * (1 + math.cos(math.pi * epoch / end))


def smooth(labels):
    return 0.9 * F.one_hot(labels, CLASSES) + 0.1 / CLASSES


def soft(logits, target):
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


class ColourTeacher(nn.Module):
    """A teacher whose logits depend on the colours only."""

    def forward(self, images):
        return torch.cat((images.mean((2, 3)), images.std((2, 3))), 1)[:, :CLASSES] * 50


def deit(model, batch, step, mixing):
    heads = forward_heads(model, batch.image)
    base = soft(heads.cls, smooth(batch.label))
    return 0.5 * base + 0.5 * F.cross_entropy(heads.distill, ColourTeacher()(batch.image).argmax(1))


def deit3(model, batch, step, mixing):
    return F.binary_cross_entropy_with_logits(model(batch.image), F.one_hot(batch.label, CLASSES).float())


def t2t(model, batch, step, mixing):
    return soft(model(batch.image), smooth(batch.label))


def lvvit(model, batch, step, mixing):
    """Class token: its shares of the maps of the image and its mixing partner; patch tokens: their own maps."""
    targets = token_targets(*batch.label_map, (8, 8), CLASSES)
    box, left = mixing.box((8, 8), (7, step + 1, 0))  # the random key counts the batches that have started
    heads = forward_heads(model, batch.image, box)
    return soft(heads.cls, left * targets.cls + (1 - left) * targets.cls.flip(0)) + soft(heads.tokens, targets.tokens)


def volo(model, batch, step, mixing):
    """As LV-ViT, with half the weight for the patch tokens."""
    targets = token_targets(*batch.label_map, (8, 8), CLASSES)
    return _volo_loss(model, batch, step, mixing, targets.cls, targets.tokens)


def volo_finetuned(model, batch, step, mixing):
    """The label has half of the class target if the annotator agrees with it, a tenth if not."""
    targets = token_targets(*batch.label_map, (8, 8), CLASSES)
    share = torch.where(targets.cls.argmax(1) == batch.label, 0.5, 0.9)[:, None]
    return _volo_loss(
        model, batch, step, mixing, share * targets.cls + (1 - share) * smooth(batch.label), targets.tokens
    )


def _volo_loss(model, batch, step, mixing, cls, tokens):
    box, left = mixing.box((8, 8), (7, step + 1, 0))
    heads = forward_heads(model, batch.image, box)
    return soft(heads.cls, left * cls + (1 - left) * cls.flip(0)) + 0.5 * soft(heads.tokens, tokens)


def augreg(model, batch, step, mixing):
    targets = F.one_hot(batch.label, CLASSES).float()
    return F.binary_cross_entropy_with_logits(model(batch.image), targets, reduction="none").sum(1).mean()


def google(step):
    warmup, total = 2 * STEPS, EPOCHS * STEPS
    return 1e-3 * (
        step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
    )


SMALL = {
    "deit_nano": {"patch_size": 16},
    "deit_nano_distilled": {"patch_size": 16},
    "vit5_small": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "t2t_vit_7": {"depth": 1, "token_drop": 0.0},
    "so_vit_7": {"depth": 1},
}
# recipe, backbone, loss, learning rate of each step, weight decay, parameters without it, clipping, EMA decay
FACTS = [
    ("deit_small_distilled", "deit_nano_distilled", deit, lambda s: cosine(1e-3, max(0, s // STEPS - 1), 2, 10),
     0.05, {"cls_token", "pos_embed"}, None, 0.99996),
    ("deit3_small", "deit_nano", deit3, lambda s: cosine(4e-3, max(0, s // STEPS - 1), 2, 10),
     0.05, {"cls_token", "pos_embed"}, None, 0.99996),
    ("vit5_small", "vit5_small", deit3, lambda s: cosine(4e-3, max(0, s // STEPS - 1), 2, 10),
     0.05, {"cls_token", "pos_embed", "reg_token"}, None, 0.99996),
    ("t2t_vit_14", "t2t_vit_7", t2t, lambda s: cosine(5e-4, s // STEPS, 2, 8), 0.05, {"cls_token"}, None, 0.99996),
    ("so_vit_14", "so_vit_7", t2t, lambda s: cosine(1e-3, s // STEPS, 2, 8), 0.05, set(), None, 0.99996),
    ("lvvit_s", "lvvit_nano", lvvit, lambda s: cosine(1.6e-3, s // STEPS, 2, 8),
     0.05, {"cls_token", "pos_embed"}, None, 0.99992),
    ("volo_d1", "lvvit_nano", volo, lambda s: cosine(1.6e-3, s // STEPS, 2, 8),
     0.05, {"cls_token", "pos_embed"}, None, None),
    ("volo_d1_384", "lvvit_nano", volo_finetuned, lambda s: cosine(8e-6, s // STEPS, 2, 8, low=4e-6),
     1e-8, {"cls_token", "pos_embed"}, None, None),
    ("vit_small_augreg", "deit_nano", augreg, google, 0.1, {"cls_token", "pos_embed"}, 1.0, None),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "name", "loss_of", "rate", "weight_decay", "exempt", "clip", "decay"), FACTS)
@pytest.mark.sample(3)
def test_recipe__equals_a_plain_loop(recipe, name, loss_of, rate, weight_decay, exempt, clip, decay, tmp_path):
    images, cooldown = {
        "deit_small_distilled": (1024, 0), "deit3_small": (2048, 0), "t2t_vit_14": (512, 2), "lvvit_s": (1024, 2),
        "vit_small_augreg": (4096, 0), "vit5_small": (2048, 0), "volo_d1": (1024, 2),
        "volo_d1_384": (512, 2), "so_vit_14": (512, 2),
    }[recipe]  # fmt: skip
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        config = compose("train", [
            f"experiment={recipe}", "schedule.warmup_epochs=2", f"schedule.cooldown_epochs={cooldown}",
            "data.label_maps=maps", "data.root=images", "init_from=x",
        ])  # fmt: skip
        objective, schedule = instantiate(config.objective, "objective"), instantiate(config.schedule, "schedule")
        optimizer = instantiate(config.optimizer, "optimizer")
        token_labels = name == "lvvit_nano"
        mixing = instantiate(config.mixing, "mixing") if token_labels else None
        teacher = ColourTeacher() if recipe == "deit_small_distilled" else None
        targets = instantiate(config.targets, "targets", teacher=teacher)
    torch.manual_seed(0)
    model = create_model(name, CLASSES, SIDE, token_head=token_labels, **SMALL.get(name, {}))
    if name != "so_vit_7":  # which has another classifier
        nn.init.trunc_normal_(model.head.weight, std=0.02)
    reference, content = copy.deepcopy(model).train(), batches(token_labels)
    module = ImageClassifier(model, objective, CLASSES, optimizer, schedule, mixing, targets, seed=7)
    losses, ema = Losses(), None if config.callbacks.ema is None else instantiate(config.callbacks.ema, "ema")
    assert (ema is None) == (decay is None)
    fit = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", callbacks=[losses, *([ema] if ema else [])], logger=False,
        gradient_clip_val=config.trainer.gradient_clip_val, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=tmp_path,
    )  # fmt: skip
    fit.fit(module, datamodule=Batches(content, images))

    named = [(key, value) for key, value in reference.named_parameters() if value.requires_grad]
    groups = [
        {"params": [p for key, p in named if (p.ndim > 1 and key not in exempt) == decayed], "weight_decay": amount}
        for decayed, amount in ((True, weight_decay), (False, 0.0))
    ]
    lamb_eps = {"deit3_small": 1e-6, "vit5_small": 1e-8}.get(recipe)
    plain = Lamb(groups, lr=1.0, eps=lamb_eps) if lamb_eps else torch.optim.AdamW(groups, lr=1.0, eps=1e-8)
    expected, average = [], {}
    for step in range(EPOCHS * STEPS):
        for group in plain.param_groups:
            group["lr"] = rate(step)
        loss = loss_of(reference, content[step % STEPS], step, mixing)
        plain.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(reference.parameters(), clip)
        plain.step()
        expected.append(loss.item())
        weights = {key: value.detach().clone() for key, value in reference.named_parameters()}
        average = (
            {key: decay * average[key] + (1 - decay) * weights[key] for key in weights}
            if average and decay
            else weights
        )
    assert expected[-1] < expected[0]
    assert losses.values == pytest.approx(expected, rel=1e-5)
    for ours, theirs in ((module.model.state_dict(), weights), *([(ema.average, average)] if ema else [])):
        for key, value in ours.items():
            # The loss does not depend on the keys' biases: Adam amplifies rounding errors there.
            if key in theirs and not key.endswith(("qkv.bias", "kqv.bias")):
                torch.testing.assert_close(value.detach(), theirs[key], rtol=1e-3, atol=1e-5, msg=key)
