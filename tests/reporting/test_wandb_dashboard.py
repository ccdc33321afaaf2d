"""The workspace and the artifacts of logger=wandb, on a stand-in of its server."""

import re
import sqlite3
from types import SimpleNamespace

import pytest
import torch
import wandb_workspaces.reports.v2 as reports

from programs import metrics, run, run_directories
from vitrail.reporting import wandb_panels
from vitrail.reporting.wandb_dashboard import WandbDashboard, show_evaluation
from vitrail.reporting.wandb_panels import panel_groups, system_panels
from wandb_server import ENTITY, read_back, shown_metrics, wandb_standin

LOGGED = ("val/top1", "val/loss", "train/loss", "train/lr", "speed/images_per_second")
PROJECT = SimpleNamespace(entity=ENTITY, project="vitrail")


def test_panels__only_of_what_has_been_logged():
    groups = panel_groups(LOGGED, ["first_batch"])
    names, patterns = shown_metrics(panel for title, panels in groups.items() if title != "System" for panel in panels)
    assert names == {"train/lr", "speed/images_per_second", "first_batch"}
    assert patterns == {"^val/top1(_ema)?$", "^val/loss(_ema)?$", "train/.*loss"}
    assert list(groups) == ["Accuracy", "Losses", "Optimiser", "Throughput", "Pictures", "System"]
    assert list(panel_groups(["val/top1_ema"], [])) == ["Accuracy", "System"]


def test_panels__of_evaluations_and_of_the_gpus_peak():
    logged = ("eval/imagenet_v2/top1", "eval/imagenet_v2/top1_ema", "eval/imagenet_v2/top5", "speed/share_of_peak")
    logged += ("eval/val/mIoU",)
    groups = panel_groups(logged, [])
    assert list(groups) == ["Accuracy", "Throughput", "System"]
    assert [shown_metrics([panel])[0] for panel in groups["Accuracy"]] == [{*logged[:2]}, {"eval/val/mIoU"}]
    assert shown_metrics(groups["Throughput"])[0] == {"speed/share_of_peak"}


def test_panels__of_a_segmentation_run():
    logged = ("val/mIoU", "val/mAcc", "val/aAcc", "train/loss", "train/decoder_loss", "train/auxiliary_loss")
    groups = panel_groups(logged, ["predictions"])
    names, patterns = shown_metrics(panel for title, panels in groups.items() if title != "System" for panel in panels)
    assert names == {"predictions"}
    assert {name for name in logged if any(re.fullmatch(pattern, name) for pattern in patterns)} == {*logged}
    assert list(groups) == ["Accuracy", "Losses", "Pictures", "System"]


def test_panels__one_line_for_each_gpu():
    names, _ = shown_metrics(system_panels(reports, 2))
    assert {"system/gpu.0.gpu", "system/gpu.1.gpu", "system/gpu.1.powerWatts"} < names
    assert not any("gpu" in name for name in shown_metrics(system_panels(reports, 0))[0])


def trainer_with(logger, **options):
    return SimpleNamespace(
        loggers=[logger],
        is_global_zero=True,
        global_step=1,
        callback_metrics={"val/top1": torch.tensor(1.0)},
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        checkpoint_callback=None,
        datamodule=SimpleNamespace(train=None),
        **options,
    )


def logger_with(offline=False, **options):
    experiment = SimpleNamespace(offline=offline, disabled=False, **vars(PROJECT))
    return SimpleNamespace(**{"failed": False, "workspace": True, "artifacts": (), "experiment": experiment, **options})


@pytest.fixture
def updates(monkeypatch):
    """The metrics and pictures of each update of the workspace, which is not made."""
    made = []
    monkeypatch.setattr(
        "vitrail.reporting.wandb_workspace.update_workspace", lambda _, *shown: made.append({*shown[0], *shown[1]})
    )
    return made


def end(logger, patience=60.0):
    dashboard, trainer = WandbDashboard(patience), trainer_with(logger)
    dashboard.on_train_start(trainer, None)
    dashboard.on_train_epoch_end(trainer, None)
    dashboard.on_fit_end(trainer, None)


@pytest.mark.parametrize("options", [{"workspace": False}, {"offline": True}, {"failed": True}])
def test_dashboard__nothing_to_update(options, updates):
    end(logger_with(**options))
    show_evaluation([logger_with(**options), SimpleNamespace()], ["eval/val/top1"])
    assert updates == []


def test_dashboard__updates_once_for_each_new_name(updates):
    """A picture that is drawn every ten epochs is new after the tenth."""
    logger, dashboard = logger_with(pictures=["first_batch"]), WandbDashboard()
    trainer = trainer_with(logger)
    for pictures in (["first_batch"], ["first_batch"], ["first_batch", "attention"]):
        logger.pictures = pictures
        dashboard.on_train_epoch_end(trainer, None)
    dashboard.on_fit_end(trainer, None)
    assert updates == [{"val/top1", "first_batch"}, {"val/top1", "first_batch", "attention"}]


def test_dashboard__a_refusal_is_one_warning(monkeypatch, caplog):
    def refuse(*_):
        raise ValueError("permission denied\nand a long story")

    monkeypatch.setattr("vitrail.reporting.wandb_workspace.update_workspace", refuse)
    end(logger_with())
    assert [record.getMessage() for record in caplog.records] == [
        "logger.wandb.workspace: permission denied; metrics are logged all the same"
    ]


def test_dashboard__does_not_wait_for_a_silent_server(monkeypatch, caplog):
    import threading

    answered = threading.Event()
    monkeypatch.setattr("vitrail.reporting.wandb_workspace.update_workspace", lambda *_: answered.wait(30))
    end(logger_with(), patience=0.05)
    answered.set()
    assert "the server has not answered within 0.05 s" in caplog.text


def test_dashboard__label_maps_that_the_run_has_not_or_cannot_upload(caplog):
    end(logger_with(artifacts=("label_maps",), workspace=False))
    assert "label_maps: data.label_maps is not set" in caplog.text


def test_panels__without_wandb_workspaces(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(ValueError, match=r"run pip install 'vitrail\[wandb\]'"):
        wandb_panels.installed_workspaces()


@pytest.mark.slow
def test_train__workspace_artifacts_and_the_same_names_everywhere(image_tree, label_maps, tmp_path, monkeypatch):
    """A training with token labels: no panel is empty, and TensorBoard and MLflow have W&B's metrics and pictures."""
    data = ("data=imagefolder", "data.image_size=32", "data.batch_size=8", "data.num_workers=0", "epochs=1")
    maps = (f"data.root={image_tree}", f"data.label_maps={label_maps}", "objective=token_labeling", "augment=lvvit")
    size = ("+model.embed_dim=32", "+model.depth=2", "+model.num_heads=2", "model.patch_size=8")
    model = ("model=lvvit", "model.name=lvvit_t", *size, "trainer=cpu", "callbacks.model_summary=null")
    pictures = {"attention", "attention_over_epochs", "rollout_over_epochs", "first_batch", "label_maps", "predictions"}
    loggers = ("logger=[wandb,tensorboard,mlflow]", "logger.wandb.artifacts=[best,label_maps]")
    with wandb_standin() as (standin, variables):
        sampling = {"WANDB_X_STATS_SAMPLING_INTERVAL": "1"}
        arguments = ("train.py", *data, *maps, *model, *loggers, "callbacks.attention.every=1")
        result = run(*arguments, logs=tmp_path, fresh=True, COLUMNS="300", **sampling, **variables)
        assert result.returncode == 0, result.stdout + result.stderr
        (logged,) = standin.runs.values()
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        workspace = read_back(standin)
    (directory,) = run_directories(tmp_path)
    (row,) = metrics(directory)

    names, patterns = shown_metrics(panel for section in workspace.sections for panel in section.panels)
    assert names <= logged.logged_metrics()
    assert {*pictures, "optimizer_groups", "speed/data_wait", "system/cpu"} <= names
    matched = {name for name in logged.logged_metrics() if any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert {"train/loss", "train/cls_loss", "train/token_loss", "val/top1_ema"} <= matched
    assert all(any(re.fullmatch(pattern, name) for name in matched) for pattern in patterns)
    assert logged.summary["val/top1"] == {"max": pytest.approx(row["val/top1"], rel=1e-4)}
    assert logged.summary["val/loss_ema"] == {"min": pytest.approx(row["val/loss_ema"], rel=1e-4)}

    by_type = {artifact["type"]: (number, artifact) for number, artifact in standin.artifacts.items()}
    number, uploaded = by_type["label_maps"]
    assert logged.used == [number]
    assert uploaded["files"]["maps.bin"] == (label_maps / "maps.bin").read_bytes()
    assert uploaded["state"] == "COMMITTED"
    _, best = by_type["model"]
    assert best["files"]["best.ckpt"] == (directory / "checkpoints" / "best.ckpt").read_bytes()
    assert (best["run"], set(best["aliases"])) == (logged.name, {"latest", "best"})

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = EventAccumulator(str(directory / "tensorboard")).Reload().Tags()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        mlflow_names = {name for (name,) in database.execute("select distinct key from metrics")}
    ours = {name for name in row if "/" in name}
    assert ours == {name for name in logged.logged_metrics() if name.startswith(("train/", "val/", "speed/"))}
    assert ours <= set(tags["scalars"])
    assert ours <= mlflow_names
    assert set(tags["images"]) == pictures
    assert {path.stem.removesuffix("_001") for path in (tmp_path / "mlruns").rglob("*.png")} == pictures
