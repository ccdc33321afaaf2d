"""W&B reports, saved on a stand-in of its server and read back with wandb-workspaces' classes."""

import re
from types import SimpleNamespace

import pytest
import wandb_workspaces.reports.v2 as reports
from omegaconf import OmegaConf

from vitrail.commands import wandb_report as command
from vitrail.commands.wandb_report import wandb_report
from vitrail.errors import ConfigError
from vitrail.reporting.wandb_report import ProjectPath, varied_keys
from wandb_server import ENTITY, Run, shown_metrics

pytestmark = pytest.mark.thorough

PICTURE = {"_type": "images/separated", "count": 1}


def add(standin, name, lr, top1, sweep=None, project="vitrail", **config):
    """Let the stand-in know a finished run."""
    run = standin.runs[name] = Run(name, project)
    run.display_name, run.sweep = f"run {name}", sweep
    optimizer = {"lr": lr, "name": "adamw"}
    run.config = {"optimizer": optimizer, "seed": 1, "paths": {"run": f"/logs/{name}"}, **config}
    run.history = [{"epoch": 0, "val/top1": top1 - 1, "train/loss": 2.0, "train/cls_loss": 1.0, "train/lr": lr}]
    run.history += [{"epoch": 1, "val/top1": top1, "val/top1_ema": top1, "first_batch": PICTURE}]
    summary = {"val/top1": {"max": top1}, "val/top1_ema": {"max": top1}, "train/loss": 2.0, "train/cls_loss": 1.0}
    run.summary = {**summary, "train/lr": lr, "_runtime": 5400, "first_batch": PICTURE, "epoch": 1}
    return run


def report_of(standin, **config):
    """Write a report with these settings, and return it as wandb-workspaces loads it."""
    address = wandb_report(OmegaConf.create({"wandb": f"{ENTITY}/vitrail", "runs": "???", **config}))
    assert address.startswith(f"{standin.address}/{ENTITY}/vitrail/reports/")
    return reports.Report.from_url(address)


def parts_of(report):
    """Return a report's Markdown, panels and sets of runs."""
    grids = [block for block in report.blocks if hasattr(block, "panels")]
    text = "\n".join(block.text for block in report.blocks if type(block).__name__ == "MarkdownBlock")
    return (
        text,
        [panel for grid in grids for panel in grid.panels],
        [runset for grid in grids for runset in grid.runsets],
    )


def test_report__no_panel_is_empty_and_the_best_run_is_first(standin):
    add(standin, "a", 1e-4, 71.25, model={"name": "vit"})
    add(standin, "b", 4e-3, 80.5, model={"name": "deit"})
    text, panels, runsets = parts_of(report_of(standin))
    rows = [line for line in text.splitlines() if "run " in line]
    assert rows[0] == "| run | optimizer.lr | model.name | val/top1 | val/top1_ema | hours | state |"
    assert rows[1:] == [
        "| run b | 0.004 | deit | 80.50 | 80.50 | 1.50 | finished |",
        "| run a | 0.0001 | vit | 71.25 | 71.25 | 1.50 | finished |",
    ]
    names, patterns = shown_metrics(panels)
    logged = standin.runs["a"].logged_metrics()
    assert names - {"optimizer.lr", "model.name", "val/top1.max"} <= logged
    assert {"train/lr", "first_batch"} <= names
    assert {"^val/top1(_ema)?$", "train/.*loss"} <= patterns
    assert all(any(re.fullmatch(pattern, name) for name in logged) for pattern in patterns)
    kinds = [type(panel).__name__ for panel in panels]
    assert kinds[:3] == ["RunComparer", "ParallelCoordinatesPlot", "ParameterImportancePlot"]
    columns = [column.metric for column in panels[1].columns]
    assert columns == [
        reports.Config("optimizer.lr"),
        reports.Config("model.name"),
        reports.SummaryMetric("val/top1.max"),
    ]
    assert [column.log for column in panels[1].columns] == [True, None, None]
    assert panels[2].with_respect_to == "val/top1.max"
    assert {(runset.entity, runset.project, runset.filters) for runset in runsets} == {(ENTITY, "vitrail", "")}


def test_report__of_segmentation_runs_and_of_both_kinds(standin):
    for name, score in (("a", 40.0), ("b", 45.5)):
        run = add(standin, name, 1e-3, 0.0, backbone=name)
        run.history = [{"epoch": 0, "val/mIoU": score, "val/mAcc": 60.0, "val/aAcc": 80.0, "train/loss": 1.0}]
        run.summary = {"val/mIoU": {"max": score}, "val/mAcc": {"max": 60.0}, "val/aAcc": {"max": 80.0}}
        run.summary |= {"train/loss": 1.0, "_runtime": 3600, "epoch": 0}
    text, panels, _ = parts_of(report_of(standin))
    assert [line for line in text.splitlines() if "run " in line] == [
        "| run | backbone | val/mIoU | val/mAcc | val/aAcc | hours | state |",
        "| run b | b | 45.50 | 60.00 | 80.00 | 1.00 | finished |",
        "| run a | a | 40.00 | 60.00 | 80.00 | 1.00 | finished |",
    ]
    names, patterns = shown_metrics(panels)
    logged = standin.runs["a"].logged_metrics()
    assert names - {"backbone", "val/mIoU.max"} <= logged
    assert {f"^val/{name}(_ema)?$" for name in ("mIoU", "mAcc", "aAcc")} <= patterns
    assert all(any(re.fullmatch(pattern, name) for name in logged) for pattern in patterns)
    add(standin, "c", 1e-3, 71.0)
    report = report_of(standin)
    assert re.findall(r"run (\w) ", parts_of(report)[0]) == ["c"]
    assert "Without val/top1, and left out: run a (finished), run b (finished)." in [
        getattr(block, "text", "") for block in report.blocks
    ]


def test_report__of_chosen_runs_by_id_name_or_directory(standin, tmp_path):
    for name in "abc":
        add(standin, name, 1e-3, 50.0)
    (tmp_path / "wandb_id.txt").write_text("b\n")
    text, panels, runsets = parts_of(report_of(standin, runs=f"a,{tmp_path}"))
    assert re.findall(r"run (\w) ", text) == ["a", "b"]
    assert runsets[0].filters == "Metric(\"ID\") in ['a', 'b']"
    assert not any(type(panel).__name__ == "ParallelCoordinatesPlot" for panel in panels), "nothing differs"


@pytest.mark.parametrize("config", [{"sweep": "s1"}, {"wandb": f"https://wandb.ai/{ENTITY}/vitrail/sweeps/s1?x=1"}])
def test_report__of_a_sweep(standin, config):
    add(standin, "a", 1e-3, 50.0, sweep="s1")
    add(standin, "b", 1e-2, 60.0, sweep="s2")
    text, _, runsets = parts_of(report_of(standin, **config))
    assert re.findall(r"run (\w) ", text) == ["a"]
    assert runsets[0].filters == "Metric(\"Sweep\") == 's1'"


@pytest.mark.parametrize(("chosen", "expected"), [("s1", ["a"]), ("grid", ["a", "b"]), (None, ["a", "b"])])
def test_report__of_a_sweep_that_hydra_takes_for_a_config_file(standin, chosen, expected, monkeypatch):
    """conf/sweep/ is a config group: `sweep=s1` arrives as a choice, and the default choice is a file."""
    add(standin, "a", 1e-3, 50.0, sweep="s1")
    add(standin, "b", 1e-2, 40.0, sweep="s2")
    hydra = SimpleNamespace(runtime=SimpleNamespace(choices={"sweep": chosen}))
    monkeypatch.setattr(command, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: hydra))
    assert re.findall(r"run (\w) ", parts_of(report_of(standin))[0]) == expected


def test_report__a_broken_run_does_not_spoil_it(standin):
    add(standin, "a", 1e-3, 50.0)
    broken = add(standin, "b", 1e-3, 50.0)
    broken.summary, broken.display_name = {}, "<b>|odd"
    report = report_of(standin)
    text, *_ = parts_of(report)
    assert re.findall(r"run (\w) ", text) == ["a"]
    assert "Without val/top1, and left out: <b>|odd (finished)." in [
        getattr(block, "text", "") for block in report.blocks
    ]


def test_report__names_with_html_are_shown(standin):
    add(standin, "a", 1e-3, 50.0).display_name = "<b>|odd"
    assert "| &lt;b&gt;\\|odd |" in parts_of(report_of(standin))[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, f"wandb={ENTITY}/vitrail: has no runs."),
        ({"wandb": "vitrail"}, "wandb=vitrail: must be <entity>/<project> or <entity>/<project>/sweeps/<id>."),
        ({"runs": "nobody"}, f"runs: nobody is not a run of {ENTITY}/vitrail."),
    ],
)
def test_report__bad_input_is_one_sentence(standin, config, message):
    with pytest.raises(ConfigError) as error:
        report_of(standin, **config)
    assert str(error.value) == message


def test_report__no_such_metric_or_no_metrics_at_all(standin):
    run = add(standin, "a", 1e-3, 50.0)
    with pytest.raises(ConfigError, match="metric=val/top9: no run of us/vitrail has logged it; its metrics are t"):
        report_of(standin, metric="val/top9")
    run.summary = {}
    with pytest.raises(ConfigError, match="no run has logged any metric"):
        report_of(standin)


def test_report__a_folder_that_is_no_wandb_run(standin, tmp_path):
    with pytest.raises(ConfigError, match=r"not a run directory with logger=wandb \(no wandb_id\.txt\)"):
        report_of(standin, runs=str(tmp_path))


def test_report__needs_a_server(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with pytest.raises(ConfigError, match="needs W&B's server, but WANDB_MODE=offline is set"):
        wandb_report(OmegaConf.create({"wandb": "us/vitrail"}))


def test_project_path__of_a_projects_page():
    assert ProjectPath.parse("https://wandb.ai/us/p/workspace?nw=1") == ("us", "p", None)


def test_varied__paths_and_constants_are_left_out(standin):
    first, second = (add(standin, name, lr, 1.0) for name, lr in (("a", 1e-3), ("b", 1e-2)))
    from vitrail.reporting.wandb_report import _figures

    class Public:
        def __init__(self, run):
            self.id = self.name = run.name
            self.state, self.summary, self.config = "finished", run.summary, run.config

    assert varied_keys([_figures(Public(first)), _figures(Public(second))]) == ["optimizer.lr"]
