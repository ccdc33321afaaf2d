"""Pictures of predictions and of a ViT's attention, and the callbacks that draw them during a training."""

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.loggers import Logger
from PIL import Image

from small_training import build, trainer
from vitrail.data import Augmentation, ImageDataModule
from vitrail.data.sources import Digits
from vitrail.models import create_model
from vitrail.models.explanations import Explanation
from vitrail.reporting import AttentionPicture, PredictionPicture
from vitrail.reporting.class_grids import class_grid
from vitrail.reporting.explanations import Annotation, explanation_sheet, heat_overlay
from vitrail.reporting.panels import cut_panels
from vitrail.reporting.tables import shortened
from vitrail.training import CosineSchedule, OptimizerFactory
from vitrail_runtime.errors import ArgumentError


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
    heats = {"attention": torch.rand(2, 4, 4), "rollout": torch.rand(2, 4, 4)}
    sheet = explanation_sheet(pixels, Explanation(heats, None, None), ())
    assert sheet.size == (6 + 3 * 174, 22 + 2 * 174)
    assert sheet.getpixel((90, 100)) == (0, 0, 0)
    assert sheet.getpixel((90, 274)) == (255, 255, 255)


class Kept(Logger):
    """Keeps the epochs of the pictures that it gets, as TensorBoard's logger does."""

    name, version = "kept", 0

    def __init__(self):
        super().__init__()
        self.epochs, self.experiment = [], self

    def log_hyperparams(self, params):
        pass

    def log_metrics(self, metrics, step=None):
        pass

    def add_image(self, name, pixels, epoch, dataformats):
        self.epochs.append((name, epoch))


Kept.__name__ = "TensorBoardLogger"


def run(tmp_path, callback, epochs=3, model=None, image_size=8):
    """Train, and return the names and epochs (from 0) of the logged pictures."""
    module, _ = build(optimizer=OptimizerFactory(lr_scaling="none"), schedule=CosineSchedule())
    module.model = model or module.model
    data = ImageDataModule(Digits(), augment=Augmentation(), image_size=image_size, batch_size=16, num_workers=0)
    fit = trainer(tmp_path, [callback], max_epochs=epochs, limit_train_batches=1, limit_val_batches=2)
    fit.loggers = [Kept()]
    fit.fit(module, datamodule=data)
    assert callback.path.is_file() == bool(fit.logger.epochs)
    return fit.logger.epochs


def pixels_of(sheet, heading=False):
    """Return the pixels of each panel, column by column."""
    return [[panel.tobytes() for panel in column] for column in cut_panels(sheet, heading)]


def test_callback__every_second_epoch_and_the_last(tmp_path):
    callback = AttentionPicture(tmp_path / "attention.png", every=2, count=3)
    series = [("attention", 1), ("attention", 2)]
    assert run(tmp_path, callback) == [*series, ("attention_over_epochs", 2), ("rollout_over_epochs", 2)]
    last = Image.open(tmp_path / "attention.png")
    assert last.height == 22 + 3 * 174
    shown, *newest = pixels_of(last)
    for kind, maps in zip(("attention", "rollout"), newest, strict=True):
        sheet = Image.open(tmp_path / f"{kind}_over_epochs.png")
        assert sheet.info["epochs"] == "[2, 3]"
        images, first, second = pixels_of(sheet, heading=True)
        assert (images, second) == (shown, maps)
        assert first != maps


def test_callback__another_training_with_the_same_path_starts_new_sheets(tmp_path):
    run(tmp_path, AttentionPicture(tmp_path / "attention.png", every=1, count=2), epochs=1)
    run(tmp_path, AttentionPicture(tmp_path / "attention.png", every=2, count=2), epochs=2)
    assert Image.open(tmp_path / "attention_over_epochs.png").info["epochs"] == "[2]"


def test_callback__all_kinds_of_a_network_that_drops_tokens(tmp_path):
    """Gradients are computed within Lightning's inference mode; classes of tokens have a legend."""
    model = create_model("dynamicvit_lvvit_nano", 10, 64)
    module, data = build()
    module.model = model
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    dark = torch.nn.functional.interpolate(batch.image, (64, 64)).clamp(max=0)
    batch = batch._replace(image=dark)
    kinds = ["attention", "rollout", "gradient", "tokens", "kept"]
    with torch.inference_mode():
        picture = AttentionPicture(tmp_path / "a.png", every=1, count=2, kinds=kinds).draw(module, batch, data)
    assert picture.size == (6 + 8 * 174 + 236, 22 + 2 * 174)
    pixels = np.asarray(picture).astype(int)
    last = pixels[22 : 22 + 168, 6 + 7 * 174 : 6 + 7 * 174 + 168]
    assert (last > 200).all(-1).mean() == pytest.approx(1 - 0.34, abs=0.02), "dropped tokens are almost white"


def test_callback__classes_and_kept_tokens_over_the_epochs(tmp_path):
    """The last columns are the panels of the newest picture; all selections of tokens are one panel."""
    model = create_model("dynamicvit_lvvit_nano", 10, 64)
    callback = AttentionPicture(tmp_path / "a.png", every=1, count=2, kinds=["tokens", "kept"])
    logged = run(tmp_path, callback, epochs=2, model=model, image_size=64)
    assert logged[2:] == [("tokens_over_epochs", 1), ("kept_over_epochs", 1)]
    newest = Image.open(callback.path)
    images, tokens, *kept, _ = pixels_of(newest)
    sheets = {kind: Image.open(tmp_path / f"{kind}_over_epochs.png") for kind in ("tokens", "kept")}
    assert {sheet.info["epochs"] for sheet in sheets.values()} == {"[1, 2]"}
    columns = {kind: pixels_of(sheet, heading=True) for kind, sheet in sheets.items()}
    assert columns["tokens"][0] == columns["kept"][0] == images
    assert columns["tokens"][2] == tokens
    brightness = [np.frombuffer(b"".join(column), np.uint8).mean() for column in (*kept, columns["kept"][2])]
    assert min(brightness[:-1]) < brightness[-1] < max(brightness[:-1])


def test_callback__an_unknown_kind(tmp_path):
    with pytest.raises(ArgumentError, match="kinds"):
        AttentionPicture(tmp_path / "a.png", kinds=["colours"])


def test_sheet__label_map_beside_the_classes_of_the_tokens():
    """Token classes a and b; the annotator says b everywhere. The second image has no label map."""
    tokens = torch.zeros(2, 2, 2, 2)
    tokens[:, 0, :, 0], tokens[:, 1, :, 1] = 1.0, 1.0
    found = Explanation({}, tokens, None)
    grid = class_grid(torch.tensor([0.0, 1.0])[:, None, None].expand(-1, 2, 2))
    annotated = Annotation(Image.new("RGB", (30, 20), "grey"), grid)
    grey = np.full((2, 8, 8, 3), 128, np.uint8)
    sheet = np.asarray(explanation_sheet(grey, found, ["[red]", "<b>"], [annotated, None])).astype(int)
    assert sheet.shape == (22 + 2 * 174, 6 + 3 * 174 + 236, 3)
    left, right, known = sheet[100, 6 + 174 + 40], sheet[100, 6 + 174 + 130], sheet[100, 6 + 2 * 174 + 40]
    assert not np.array_equal(left, right)
    np.testing.assert_array_equal(right, known)
    assert (sheet[22 + 174 + 10 : 22 + 174 + 160, 6 + 2 * 174 : 6 + 3 * 174 - 6] == 255).all()


def test_callback__none_if_every_is_null(tmp_path):
    assert run(tmp_path, AttentionPicture(tmp_path / "attention.png"), epochs=1) == []


def test_callback__a_cnn_is_one_warning(tmp_path, caplog):
    model = timm.create_model("test_resnet", num_classes=10)
    assert run(tmp_path, AttentionPicture(tmp_path / "attention.png", every=1), epochs=2, model=model) == []
    assert [record.getMessage() for record in caplog.records if "attention" in record.getMessage()] == [
        "callbacks.attention: ResNet has no attention over all its patch tokens."
    ]


def test_callback__draws_the_same_as_without_it(tmp_path):
    """The callback changes neither weights nor random numbers."""
    results = []
    for name, callback in (("with", AttentionPicture(tmp_path / "attention.png", every=1)), ("without", None)):
        module, data = build(optimizer=OptimizerFactory(lr_scaling="none"), schedule=CosineSchedule())
        (tmp_path / name).mkdir()
        limits = {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 2}
        trainer(tmp_path / name, [callback] if callback else [], **limits).fit(module, datamodule=data)
        results.append(torch.cat([value.detach().flatten() for value in module.model.parameters()]))
    assert torch.equal(*results)


def test_predictions__red_where_they_are_wrong(tmp_path):
    """A network that always predicts class 3: only the captions of images of another class are red."""
    module, data = build()
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    module.forward = lambda images: torch.nn.functional.one_hot(torch.full((len(images),), 3), 10) * 5.0
    picture = PredictionPicture(tmp_path / "predictions.png", every=1, count=8).draw(module, batch, data)
    captions = np.asarray(picture).astype(int)[150:]
    for number, label in enumerate(batch.label[:8].tolist()):
        part = captions[:, 4 + 148 * number : 148 * (number + 1)]
        is_red = ((part[..., 0] - part[..., 1]) > 80).any()
        assert is_red == (label != 3), number


def test_predictions__of_a_training(tmp_path):
    callback = PredictionPicture(tmp_path / "predictions.png", every=10, count=3)
    assert run(tmp_path, callback, epochs=2) == [("predictions", 1)]


def test_names__long_ones_keep_their_beginning():
    assert shortened("Staffordshire", 13) == "Staffordshire"
    assert shortened("Donaudampfschifffahrt", 13) == "Donaudampfsc…"
    assert shortened("West Highland white", 6) == "West…"
