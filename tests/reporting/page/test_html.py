"""The report page as a file: what it contains, what it leaves out, and how large it is."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from report_runs import make_run, make_sweep
from vitrail.reporting.page import html, read_run, render_page
from vitrail.reporting.page.compare import differing, groups

EVIL = "</script><img src=x onerror=alert(1)>"


def read(path):
    return read_run(path, path.parents[1], lambda _: False)


def data_of(page):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def test_differing__a_run_with_a_damaged_config_does_not_make_every_key_differ(tmp_path):
    paths = [make_run(tmp_path / "a" / "b" / name) for name in ("first", "second", "damaged")]
    (paths[2] / "config.yaml").write_text("a: [")
    assert differing([read(path) for path in paths]) == []


def test_differing__values_of_a_command_line_equal_those_of_a_config(tmp_path):
    values = {"size": 64, "flip": True, "rate": 1e-3, "scale": [0.3, 1.0], "name": "a", "share": 0.5}
    overrides = ["size=64", "flip=true", "rate=1e-3", "scale=[0.3,1.0]", "name='a'", "share=0.5"]
    paths = [make_run(tmp_path / "a" / "b" / name, overrides=overrides, **values) for name in ("whole", "damaged")]
    (paths[1] / "config.yaml").write_text("a: [")
    assert differing([read(path) for path in paths]) == []


def test_differing__keys_of_the_command_line_first(tmp_path):
    options = ({"seed": 1, "mixing": None}, {"seed": 2, "mixing": {"mixup": 0.2}}, {"seed": 2, "mixing": None})
    overrides = (["mixing=none"], ["optimizer.lr=0.001", "mixing=mixup_02"], ["optimizer.lr=0.001"])
    runs = [
        read(make_run(tmp_path / "a" / "b" / str(number), overrides=some, **config))
        for number, (some, config) in enumerate(zip(overrides, options, strict=True))
    ]
    failed = tmp_path / "a" / "b" / "failed"
    failed.mkdir()
    columns = differing([*runs, read(failed)])
    assert [(column.key, column.values, column.shown) for column in columns] == [
        ("mixing", ["none", "mixup_02", None, None], True),
        ("mixing.mixup", [None, 0.2, None, None], False),
        ("seed", [1, 2, 2, None], False),
    ]


def test_groups__importance_of_the_keys(tmp_path):
    pytest.importorskip("optuna")
    values = [(lr, decay, 60 + 10 * (lr == 1e-3)) for lr in (1e-4, 1e-3, 1e-2) for decay in (0.01, 0.1)]
    sweep = make_sweep(tmp_path / "a" / "s", values)
    runs = [read(sweep / str(number)) for number in range(6)] + [read(make_run(tmp_path / "a" / "b" / "single"))]
    (group,) = groups(runs, "val/top1")
    assert (group["name"], group["runs"]) == ("s", [0, 1, 2, 3, 4, 5])
    assert group["keys"] == ["optimizer.lr", "optimizer.weight_decay"]
    assert sum(group["importance"].values()) == pytest.approx(1)
    assert group["importance"]["optimizer.lr"] > 0.75


def test_page__is_one_file_and_quotes_names(tmp_path):
    run = read(make_run(tmp_path / "a" / "b" / "<b>bold", overrides=[f"seed={EVIL}"], note=EVIL))
    page = render_page([run], "val/top1", EVIL)
    assert EVIL not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)|@import|url\(""", page)
    assert re.findall(r"https?://[\w./]+", page) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in page
    data = data_of(page)
    assert data["title"] == EVIL
    assert data["runs"][0]["config"]["note"] == EVIL
    assert data["runs"][0]["command"].endswith(f"'seed={EVIL}'")


def test_page__pictures_of_the_best_runs_as_long_as_they_fit(tmp_path, monkeypatch):
    runs = []
    for number in range(3):
        path = make_run(tmp_path / "a" / "b" / str(number), columns={"val/top1": lambda _, number=number: number})
        noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
        Image.fromarray(noise).save(path / "first_batch.png")
        runs.append(read(path))
    (tmp_path / "a" / "b" / "1" / "first_batch.png").write_bytes(b"damaged")
    monkeypatch.setattr(html, "_PICTURE_BYTES", 1000)
    pictures = [run["pictures"]["first_batch"] for run in data_of(render_page(runs, "val/top1", ""))["runs"]]
    assert [picture["data"] is not None for picture in pictures] == [False, False, True]
    monkeypatch.setattr(html, "_PICTURE_BYTES", 10**6)
    pictures = [run["pictures"]["first_batch"] for run in data_of(render_page(runs, "val/top1", ""))["runs"]]
    assert [picture["data"] is not None for picture in pictures] == [True, False, True]


def test_page__pictures_of_explanations_and_the_sheets_over_epochs(tmp_path):
    path = make_run(tmp_path / "a" / "b" / "run")
    for name in ("rollout_over_epochs.png", "attention.png", ".attention_over_epochs.png", "other.png"):
        Image.new("RGB", (8, 8)).save(path / name)
    (entry,) = data_of(render_page([read(path)], "val/top1", ""))["runs"]
    assert list(entry["pictures"]) == ["attention", "rollout_over_epochs"]
    assert all(picture["data"] for picture in entry["pictures"].values())


def test_page__long_curves_are_thinned_from_the_end(tmp_path, monkeypatch):
    run = read(make_run(tmp_path / "a" / "b" / "run", epochs=100, columns={"val/top1": lambda epoch: epoch + 1e-7}))
    monkeypatch.setattr(html, "_MOST_NUMBERS", 200)
    (entry,) = data_of(render_page([run], "val/top1", ""))["runs"]
    lengths = {len(column) for column in entry["metrics"].values()}
    assert lengths == {25}
    assert entry["metrics"]["epoch"][-1] == entry["metrics"]["val/top1"][-1] == 99
    assert entry["best"] == 99
    assert entry["epochs"] == 100


def test_page__classification_and_segmentation_in_one_folder(tmp_path):
    scores = {"without": ("val/top1", "val/loss"), "columns": {"val/mIoU": lambda epoch: 30 + epoch}}
    runs = [read(make_run(tmp_path / "a" / "b" / name, **options)) for name, options in (("c", {}), ("s", scores))]
    data = data_of(render_page(runs, "val/top1", ""))
    assert data["others"] == ["val/mIoU"]
    assert [(run["best"], run["others"]["val/mIoU"]) for run in data["runs"]] == [(70, None), (None, 32)]
    data = data_of(render_page(runs[1:], "val/mIoU", ""))
    assert (data["others"], data["runs"][0]["best"]) == ([], 32)


def test_page__a_smaller_metric_can_be_better(tmp_path):
    run = read(make_run(tmp_path / "a" / "b" / "run"))
    data = data_of(render_page([run], "val/loss", ""))
    assert (data["larger"], data["runs"][0]["best"]) == (False, pytest.approx(0.66667))


def test_page__command_of_a_resumed_run(tmp_path):
    """The first overrides, with what resumes changed and added; earlier versions kept only the last ones."""
    single = make_run(tmp_path / "a" / "b" / "run", overrides=["resume=x", "epochs=9"])
    sweep = make_sweep(tmp_path / "a" / "s", [(1, 1, 50)])
    (sweep / "0" / "overrides.txt").write_text("resume=x\n")
    overrides = ["model=vit", "epochs=3", "# resumed 2026-01-02 03:04:05", "resume=y", "epochs=9", "seed=1"]
    resumed = make_run(tmp_path / "a" / "b" / "resumed", overrides=overrides)
    runs = [read(path) for path in (single, sweep / "0", resumed)]
    unknown = make_run(tmp_path / "a" / "b" / "unknown")
    (unknown / "overrides.txt").unlink()
    runs.append(read(unknown))
    first, second, third, fourth = data_of(render_page(runs, "val/top1", ""))["runs"]
    assert fourth["command"] is None
    assert first["command"] is None
    assert first["reproduce"].endswith(f"reproduce={single}")
    assert second["command"].endswith("optimizer.lr=1 optimizer.weight_decay=1")
    assert third["command"].endswith(" model=vit epochs=9 seed=1")


@pytest.mark.slow
def test_page__two_hundred_runs_of_three_hundred_epochs_stay_below_20_mb(tmp_path):
    noise = np.random.default_rng(0)
    columns = {f"train/part{number}": lambda _: f"{noise.normal():.6g}" for number in range(20)}
    runs = [read(make_run(tmp_path / "a" / "b" / str(number), epochs=300, columns=columns)) for number in range(200)]
    assert len(render_page(runs, "val/top1", "").encode()) < 20e6
