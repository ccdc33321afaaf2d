import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from rich.console import Console
from timm.data.real_labels import RealLabelsImagenet

from vitrail.reporting import Evaluation, evaluation_figure, evaluation_report
from vitrail.training.predictions import Predictions


def predictions_of(logits, labels, keys=None):
    scores = torch.as_tensor(logits, dtype=torch.float64).log_softmax(-1)
    best = scores.topk(min(5, scores.shape[1]))
    losses = -scores[torch.arange(len(labels)), torch.as_tensor(labels)]
    keys = keys or [f"image_{index}" for index in range(len(labels))]
    return Predictions(keys, np.asarray(labels), losses.numpy(), best.indices.numpy(), best.values.exp().numpy())


@pytest.fixture
def by_hand():
    """Six images of three classes; of the worst class, 2, one image is predicted as 0 and two as 1."""
    chances = torch.tensor(
        [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.2, 0.5, 0.3], [0.1, 0.6, 0.3]]
    )
    return predictions_of(chances.log(), [0, 0, 1, 2, 2, 2])


def test_evaluation__equals_manual_scores(by_hand):
    evaluation = Evaluation.of(by_hand)
    assert evaluation.top1 == pytest.approx(3 / 6)
    assert evaluation.top5 == 1  # of three classes
    assert evaluation.loss == pytest.approx(-np.log([0.8, 0.6, 0.7, 0.3, 0.3, 0.3]).mean())
    # Bins of 1/15: .8 | .7 | .6, .6 (half right) | .5, .5 (both wrong)
    gaps = [abs(1 - 0.8), abs(1 - 0.7), 2 * abs(0.5 - 0.6), 2 * abs(0 - 0.5)]
    assert evaluation.calibration_error == pytest.approx(sum(gaps) / 6, abs=1e-6)
    assert [score.label for score in evaluation.classes] == [0, 1, 2]
    (worst,) = evaluation.worst(1)
    assert (worst.label, worst.images, worst.top1, worst.wrong) == (2, 3, 0.0, [(1, 2), (0, 1)])
    assert worst.confidence == pytest.approx((0.5 + 0.5 + 0.6) / 3)


def test_evaluation__writes_csv_files(by_hand, tmp_path):
    Evaluation.of(by_hand).write(tmp_path, "raw", ["cat", "dog", "n07920052"], by_hand)
    rows = {
        name: list(csv.reader((tmp_path / f"{name}_raw.csv").open())) for name in ("classes", "confusions", "images")
    }
    assert rows["classes"][0] == ["class", "name", "images", "top1", "top5", "confidence"]
    assert rows["classes"][1] == ["cat", "cat", "2", "100.00", "100.00", "70.00"]
    assert rows["classes"][3][:4] == ["n07920052", "espresso", "3", "0.00"]
    assert rows["confusions"][1:] == [["n07920052", "dog", "2"], ["n07920052", "cat", "1"]]
    assert rows["images"][4] == ["image_3", "n07920052", "cat", "0.5000"]


def test_real_labels__same_accuracy_as_timm():
    """The first 400 validation images of ImageNet; for half of them, the right logits are raised."""
    random = np.random.default_rng(0)
    names = [f"ILSVRC2012_val_{index + 1:08d}.JPEG" for index in range(50_000)]
    peer = RealLabelsImagenet(names)
    reassessed = json.loads(Path(timm.data.__path__[0], "_info", "imagenet_real_labels.json").read_text())
    label_sets = dict(zip(names, reassessed, strict=True))
    logits = torch.from_numpy(random.normal(size=(400, 1000)).astype(np.float32))
    for index in range(0, 400, 2):
        for label in label_sets[names[index]]:
            logits[index, label] += random.uniform(2, 5)
    peer.add_result(logits)
    evaluation = Evaluation.of(predictions_of(logits, [0] * 400, names[:400]), label_sets)
    assert 20 < 100 * evaluation.top1 < 60
    assert 100 * evaluation.top1 == pytest.approx(peer.get_accuracy(1))
    assert 100 * evaluation.top5 == pytest.approx(peer.get_accuracy(5))
    assert len(evaluation.correct) == sum(bool(label_sets[name]) for name in names[:400]) < 400
    assert evaluation.loss is None
    assert sum(score.images for score in evaluation.classes) == sum(len(label_sets[name]) for name in names[:400])


def test_figure_and_report__show_the_worst_class(by_hand):
    evaluation = Evaluation.of(by_hand)
    names = ["cat", "dog", "n07920052"]
    text = io.StringIO()
    Console(file=text, width=150).print(evaluation_report({"raw": evaluation, "ema": evaluation}, names, "a network"))
    assert "50.00" in text.getvalue()
    espresso = next(line for line in text.getvalue().splitlines() if "espresso" in line)
    assert "dog 67%, cat 33%" in espresso
    figure = evaluation_figure(evaluation, names, "a network")
    calibration, classes, confusions = figure.axes
    assert sorted(bar.get_height() for bar in calibration.patches) == pytest.approx([0, 50, 100, 100])
    assert [bar.get_height() for bar in classes.patches] == pytest.approx([0, 100, 100])  # worst first
    (image,) = confusions.images
    assert image.get_array()[0].tolist() == pytest.approx([0, 100 / 3, 100 * 2 / 3])  # espresso: cat once, dog twice
    assert next(label.get_text() for label in confusions.get_xticklabels()) == "espresso"
    figure.savefig(io.BytesIO(), format="png")
