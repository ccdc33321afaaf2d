"""The saved workspace of a project, on a stand-in of W&B's server."""

import json
from types import SimpleNamespace

import pytest
import wandb_workspaces.workspaces as workspaces

from programs import QUICK, run, train
from vitrail.errors import ConfigError
from vitrail.reporting.wandb_dashboard import show_evaluation
from vitrail.reporting.wandb_panels import panel_groups
from vitrail.reporting.wandb_workspace import update_workspace
from wandb_server import ENTITY, read_back, shown_metrics, wandb_standin

PROJECT = SimpleNamespace(entity=ENTITY, project="vitrail")
LOGGED = ("val/top1", "val/loss", "train/loss", "train/lr")
EVALUATED = ("eval/imagenet_v2/top1", "eval/imagenet_v2/top1_ema", "eval/imagenet_v2/top5")


def sections_of(standin):
    """Return the sections of the only saved workspace as the app stores them."""
    (view,) = standin.views
    return json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]


def change(standin, act):
    """Change the spec of the only saved workspace as a user does in the app."""
    spec = json.loads(standin.views[0]["spec"])
    act(spec["section"])
    standin.views[0]["spec"] = json.dumps(spec)


def titles(section):
    return [panel["config"]["chartTitle"] for panel in section["panels"]]


def evaluate(**options):
    """Log an evaluation as eval.py does."""
    experiment = SimpleNamespace(offline=False, disabled=False, **vars(PROJECT))
    show_evaluation([SimpleNamespace(failed=False, workspace=True, experiment=experiment, **options)], EVALUATED)


def test_workspace__is_created_once(standin):
    update_workspace(PROJECT, LOGGED, [])
    before = standin.views_named("vitrail")
    update_workspace(PROJECT, ["val/top1"], [])
    assert standin.views == before
    workspace = read_back(standin)
    assert workspace.settings.x_axis == "epoch"
    assert workspace.auto_generate_panels is False


def test_workspace__a_view_that_vitrail_did_not_create_is_left_alone(standin):
    sections = [workspaces.Section(name="Accuracy", panels=panel_groups(["val/top1"], [])["Accuracy"])]
    workspaces.Workspace(entity=ENTITY, project="vitrail", name="vitrail", sections=sections).save()
    before = list(standin.views)
    update_workspace(PROJECT, LOGGED, ["first_batch"])
    evaluate()
    assert standin.views == before


def test_workspace__one_of_another_name_does_not_count(standin):
    workspaces.Workspace(entity=ENTITY, project="vitrail", name="mine").save()
    update_workspace(PROJECT, LOGGED, [])
    assert [view["displayName"] for view in standin.views] == ["mine", "vitrail"]


def test_workspace__an_evaluation_gets_its_panel_once(standin):
    update_workspace(PROJECT, LOGGED, [])
    evaluate()
    evaluate()
    accuracy = next(section for section in read_back(standin).sections if section.name == "Accuracy")
    assert [panel.title for panel in accuracy.panels] == [
        "Top-1 in %, raw and EMA weights",
        "Evaluation on imagenet_v2, %",
    ]
    assert shown_metrics(accuracy.panels[1:])[0] == {*EVALUATED[:2]}


def test_workspace__an_evaluation_creates_none(standin):
    evaluate()
    assert standin.views == []


def test_workspace__a_later_run_adds_what_it_is_the_first_to_log(standin):
    """A GPU run, with EMA weights, a segmentation network, and a new part of the loss: two have a panel already."""
    update_workspace(PROJECT, LOGGED, ["first_batch"])
    before = sections_of(standin)
    later = (*LOGGED, "val/top1_ema", "val/mIoU", "train/token_loss", "speed/share_of_peak")
    update_workspace(PROJECT, later, ["first_batch", "attention"], num_gpus=1)
    added = {
        section["name"]: titles(section)[len(titles(old)) if old else 0 :]
        for section in sections_of(standin)
        for old in [next((old for old in before if old["name"] == section["name"]), None)]
    }
    assert {name: new for name, new in added.items() if new} == {
        "Accuracy": ["mIoU in %, raw and EMA weights"],
        "Throughput": ["Share of the GPU's peak, %"],
        "Pictures": ["Attention"],
        "System": ["GPU in %", "GPU memory in %", "GPU power in W"],
    }


def test_workspace__what_the_user_has_changed_stays(standin):
    """Names, order, settings that wandb-workspaces does not know, own panels; removed ones do not come back."""
    update_workspace(PROJECT, LOGGED, ["first_batch"])

    def edit(section):
        bank = section["panelBankConfig"]["sections"]
        bank.reverse()
        by_name = {part["name"]: part for part in bank}
        by_name["Losses"]["name"] = "My losses"
        by_name["Accuracy"]["panels"][0]["config"] |= {"chartTitle": "Mine", "legendPosition": "north"}
        del by_name["Optimiser"]["panels"][0]
        by_name["Pictures"]["isPanelsAuto"] = True
        bank.append({"name": "Own", "panels": [{"viewType": "Bar Chart", "config": {"metrics": ["val/mIoU"]}}]})
        section["workspaceSettings"] = {"ref": {"id": "x"}, "xAxis": "_step"}

    change(standin, edit)
    standin.views[0]["displayName"] = "renamed"
    before = dict(standin.views[0])
    update_workspace(PROJECT, (*LOGGED, "val/mIoU"), ["first_batch"])
    assert standin.views == [before]

    evaluate()
    (after,) = standin.views
    spec, kept = json.loads(after.pop("spec")), json.loads(before.pop("spec"))
    new = [section for section in spec["section"]["panelBankConfig"]["sections"] if section["name"] == "Accuracy"]
    added = new[0]["panels"].pop()
    assert added["config"]["metrics"] == [*EVALUATED[:2]]
    assert added["isAuto"] is False
    assert spec == kept
    assert {**after, "description": None} == {**before, "description": None}


@pytest.mark.slow
def test_eval__adds_panels_of_what_it_logs(tmp_path):
    with wandb_standin() as (standin, variables):
        options = {"logs": tmp_path, "fresh": True, **variables}
        directory = train(*QUICK, "logger=wandb", **options)
        evaluation = ("eval.py", f"ckpt={directory}", "logger=wandb", "trainer=cpu")
        assert run(*evaluation, "logger.wandb.workspace=false", **options).returncode == 0
        assert "Evaluation on val, %" not in titles(sections_of(standin)[0])
        assert run(*evaluation, **options).returncode == 0
        (logged,) = standin.runs.values()
        assert titles(sections_of(standin)[0]).count("Evaluation on val, %") == 1
    assert {"eval/val/top1", "eval/val/top1_ema"} <= logged.logged_metrics()


def test_workspace__no_access_to_the_project_is_one_sentence(standin, monkeypatch):
    monkeypatch.setattr(standin, "_allViews", lambda _: None)
    with pytest.raises(ConfigError, match="us/vitrail: no such project on the server, or no access to it"):
        update_workspace(PROJECT, LOGGED, [])
