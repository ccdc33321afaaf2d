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
from vitrail.models.pretrained import PretrainedClassifier
from vitrail.models.teacher import Teacher
from vitrail.objectives import CrossEntropy, DistillationLoss, DynamicViTLoss, EvoViTLoss, TokenLabelingLoss
from vitrail.training import (
    EMA,
    FSDP,
    CosineSchedule,
    ImageClassifier,
    LinearProbe,
    OptimizerFactory,
    ProbeSettings,
    TargetBuilder,
)

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


def train(tmp_path, model, objective=None, label_maps=None, epochs=2, strategy="auto", **kwargs):
    """Train for two epochs whose validations end with a smaller batch."""
    data = ImageDataModule(
        Digits(), Augmentation(), 32, batch_size=8, num_workers=0, label_maps=label_maps, eval_batch_size=100
    )
    options = {"optimizer": OptimizerFactory(lr_scaling="none"), "schedule": CosineSchedule(1), **kwargs}
    module = ImageClassifier(model, objective or CrossEntropy(0.1), 10, compile_mode="default", **options)
    callbacks = [EMA(0.9)]
    limits = {"max_epochs": epochs, "limit_train_batches": 2}
    trainer(tmp_path, callbacks, strategy=strategy, devices=1, **limits).fit(module, datamodule=data)


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
@pytest.mark.sample(3)
def test_family__two_graphs(tmp_path, counter, name, options):
    train(tmp_path, small(name, **options), mixing=MixupCutMix())
    assert counter.frame_count == 2
    assert not counters["graph_break"]


def test_sharded_blocks__share_two_graphs(tmp_path, counter):
    """With FSDP each block is compiled; blocks without drop path are equal."""
    try:
        train(tmp_path, small("deit_nano", depth=4), strategy=FSDP())
    finally:
        torch.distributed.destroy_process_group()
    assert counter.frame_count == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["deit_nano", "lvvit_nano"])
def test_checkpointing__two_graphs(tmp_path, counter, name):
    train(tmp_path, small(name), grad_checkpointing=True)
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


def test_dynamic_vit__two_graphs(tmp_path, counter):
    """The dense teacher runs as it is; training masks tokens, evaluation gathers those that are kept."""
    narrow = {"embed_dim": 32, "num_heads": 2}
    dense = PretrainedClassifier(small("deit_nano", **narrow), "deit_nano", (32, 32), (0.5,) * 3, (0.5,) * 3)
    targets = TargetBuilder(teacher=Teacher(dense, (0.5,) * 3, (0.5,) * 3, Digits().classes))
    model = small("dynamicvit_deit_tiny", patch_size=4, selection_blocks=(1,), **narrow)
    train(tmp_path, model, DynamicViTLoss(), targets=targets)
    assert counter.frame_count == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.slow
def test_linear_probe__a_graph_for_each_batch_size(tmp_path, counter, cache):
    """Cached features are computed in batches of the evaluation."""
    data = ImageDataModule(Digits(), Augmentation(enabled=not cache), 32, batch_size=8, eval_batch_size=100)
    data.set_probe(0.1, cache)
    options = {"optimizer": OptimizerFactory("sgd"), "schedule": CosineSchedule(1), "compile_mode": "default"}
    module = LinearProbe(small("deit_nano"), CrossEntropy(), 10, ProbeSettings([1.0], 0.1, cache), **options)
    trainer(tmp_path, max_epochs=1, limit_train_batches=2).fit(module, datamodule=data)
    assert counter.frame_count == (1 if cache else 2)
    assert not counters["graph_break"]


def test_evo_vit__a_third_graph_for_the_second_mode(tmp_path, counter):
    """Evo-ViT selects tokens before every block in the first epochs, and per stage after that."""
    train(tmp_path, small("evo_deit_tiny_patch16_224", depth=3, stages=(1, 2)), EvoViTLoss(), epochs=3)
    assert counter.frame_count == 4
    assert not counters["graph_break"]


@pytest.mark.slow
def test_evo_levit__a_third_graph_for_the_second_mode(tmp_path, counter):
    sizes = {"embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 2, 2), "depth": (2, 1, 1)}
    train(tmp_path, small("evo_levit_128s", stage_wise_from=0.5, **sizes), EvoViTLoss(), epochs=2)
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


@pytest.mark.slow
def test_volo_with_mixtoken__two_graphs(tmp_path, counter, maps):
    model = create_model("volo_d1_224", 10, 32, token_head=True)
    train(tmp_path, model, TokenLabelingLoss(), label_maps=maps, mixing=MixToken())
    assert counter.frame_count == 2
    assert not counters["graph_break"]
