"""A compiled training has one graph for training and one for evaluation, without breaks and recompilation."""

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from small_training import trainer
from vitrail.data import Augmentation, ImageDataModule, MixupCutMix
from vitrail.data.mixing import MixToken
from vitrail.data.sources import Digits
from vitrail.models import create_model
from vitrail.objectives import CrossEntropy, DistillationLoss, EvoViTLoss, TokenLabelingLoss
from vitrail.training import EMA, CosineSchedule, ImageClassifier, OptimizerFactory, TargetBuilder

pytestmark = pytest.mark.thorough


@pytest.fixture
def counter(monkeypatch):
    """Count the graphs that are compiled, by a compiler that runs them as they are."""
    torch._dynamo.reset()
    counters.clear()
    found, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic, **_: compile_(function, backend=found, dynamic=dynamic)
    )
    return found


def small(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, img_size=32, num_classes=10, **{"depth": 2, **kwargs})


def train(tmp_path, model, objective=None, label_maps=None, epochs=2, **kwargs):
    """Train for two epochs whose validations end with a smaller batch."""
    data = ImageDataModule(
        Digits(), Augmentation(), 32, batch_size=8, num_workers=0, label_maps=label_maps, eval_batch_size=100
    )
    options = {"optimizer": OptimizerFactory(lr_scaling="none"), "schedule": CosineSchedule(1), **kwargs}
    module = ImageClassifier(model, objective or CrossEntropy(0.1), 10, compile_mode="default", **options)
    callbacks = [EMA(0.9)]
    trainer(tmp_path, callbacks, max_epochs=epochs, limit_train_batches=2).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_nano", {}),
        ("deit_nano", {}),
        ("vit5_small", {}),
        ("lvvit_nano", {}),
        ("t2t_vit_7", {}),
        pytest.param("t2t_vit_t_14", {}, marks=pytest.mark.slow),
        ("so_vit_7", {}),
        pytest.param("sot_tiny", {}, marks=pytest.mark.slow),
    ],
)
def test_family__two_graphs(tmp_path, counter, name, options):
    train(tmp_path, small(name, **options), mixing=MixupCutMix())
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_checkpointing__two_graphs(tmp_path, counter):
    train(tmp_path, small("deit_nano"), grad_checkpointing=True)
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_mixtoken__two_graphs(tmp_path, counter, maps):
    model = create_model("lvvit_nano", 10, 32, depth=2, token_head=True)
    train(tmp_path, model, TokenLabelingLoss(), label_maps=maps, mixing=MixToken())
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_distillation__two_graphs(tmp_path, counter):
    """The teacher runs as it is."""
    teacher = small("vit_nano").eval()
    train(tmp_path, small("deit_nano_distilled"), DistillationLoss(), targets=TargetBuilder(teacher=teacher))
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_evo_vit__a_third_graph_for_the_second_mode(tmp_path, counter):
    """Evo-ViT selects tokens before every block in the first epochs, and per stage after that."""
    train(tmp_path, small("evo_deit_tiny_patch16_224", depth=3, stages=(1, 2)), EvoViTLoss(), epochs=3)
    assert counter.frame_count == 4
    assert not counters["graph_break"]


def test_convolutions__two_graphs(tmp_path, counter):
    train(tmp_path, timm.create_model("resnet10t", num_classes=10))
    assert counter.frame_count == 2
    assert not counters["graph_break"]


@pytest.mark.slow
def test_volo__two_graphs(tmp_path, counter):
    train(tmp_path, timm.create_model("volo_d1_224", img_size=32, num_classes=10))
    assert counter.frame_count == 2
    assert not counters["graph_break"]
