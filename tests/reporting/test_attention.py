"""The pictures of a ViT's attention, and the callback that draws them during a training."""

import numpy as np
import timm
import torch
from PIL import Image

from small_training import build, trainer
from vitrail.reporting.attention import AttentionPicture, attention_sheet, heat_overlay
from vitrail.training import CosineSchedule, OptimizerFactory


def test_overlay__red_where_the_map_is_largest():
    heat = torch.zeros(2, 2)
    heat[0, 1] = 0.25
    overlay = np.asarray(heat_overlay(Image.new("RGB", (40, 40), (128, 128, 128)), heat)).astype(int)
    high, low = overlay[2, 37], overlay[37, 2]
    assert high[0] - high[2] > 30
    assert low[2] - low[0] > 0
    even = np.asarray(heat_overlay(Image.new("RGB", (40, 40)), torch.ones(2, 2)))
    assert (even == even[0, 0]).all()


def test_sheet__one_row_per_image_and_one_panel_per_map():
    pixels = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (0, 255)])
    maps = [torch.rand(2, 4, 4), torch.rand(2, 4, 4)]
    sheet = attention_sheet(pixels, maps)
    assert sheet.size == (6 + 3 * 174, 22 + 2 * 174)
    assert sheet.getpixel((90, 100)) == (0, 0, 0)
    assert sheet.getpixel((90, 274)) == (255, 255, 255)


def run(tmp_path, callback, epochs=3, model=None):
    module, data = build(optimizer=OptimizerFactory(lr_scaling="none"), schedule=CosineSchedule())
    module.model = model or module.model
    limits = {"limit_train_batches": 1, "limit_val_batches": 2}
    trainer(tmp_path, [callback], max_epochs=epochs, **limits).fit(module, datamodule=data)
    return sorted(path.name for path in tmp_path.glob("attention_*.png"))


def test_callback__every_second_epoch_and_the_last(tmp_path):
    assert run(tmp_path, AttentionPicture(tmp_path / "attention", every=2, count=3)) == [
        *("attention_002.png", "attention_003.png"),
    ]
    assert Image.open(tmp_path / "attention_003.png").height == 22 + 3 * 174


def test_callback__off_by_default(tmp_path):
    assert run(tmp_path, AttentionPicture(tmp_path / "attention"), epochs=1) == []


def test_callback__a_cnn_is_one_warning(tmp_path, caplog):
    model = timm.create_model("test_resnet", num_classes=10)
    assert run(tmp_path, AttentionPicture(tmp_path / "attention", every=1), epochs=2, model=model) == []
    assert [record.getMessage() for record in caplog.records if "attention" in record.getMessage()] == [
        "callbacks.attention: ResNet has no attention over all its patch tokens."
    ]


def test_callback__draws_the_same_as_without_it(tmp_path):
    """The callback changes neither weights nor random numbers."""
    results = []
    for name, callback in (("with", AttentionPicture(tmp_path / "attention", every=1)), ("without", None)):
        module, data = build(optimizer=OptimizerFactory(lr_scaling="none"), schedule=CosineSchedule())
        (tmp_path / name).mkdir()
        limits = {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 2}
        trainer(tmp_path / name, [callback] if callback else [], **limits).fit(module, datamodule=data)
        results.append(torch.cat([value.detach().flatten() for value in module.model.parameters()]))
    assert torch.equal(*results)
