"""The saved W&B workspace "vitrail" of a project: created once, extended by panels of what is logged later.

wandb-workspaces can load a saved workspace and save it again, but drops those of the app's settings that it does not
know. Panels are therefore inserted into the workspace as the server stores it; the rest stays as the user left it.
"""

import json
import re
import threading
from collections.abc import Collection, Iterator
from typing import Any

from vitrail.errors import ConfigError
from vitrail.reporting.wandb_panels import EPOCH, PATTERNS, installed_workspaces, panel_groups

WORKSPACE = "vitrail"
_TYPE = "project-view"
_VIEW_NAME = "nw-vitrail{}-v"  # W&B's own names are nw-<11 letters and digits>-v; this one marks vitrail's workspace
_NOTE = "Panels made by vitrail, which are not made again after you remove them:"
_SAVED_VIEWS = """
query SavedViews($entityName: String, $name: String, $viewType: String) {
    project(name: $name, entityName: $entityName) {
        allViews(viewType: $viewType) { edges { node { id name displayName description spec } } }
    }
}
"""
_SAVE_VIEW = """
mutation SaveView($id: ID, $entityName: String, $projectName: String, $type: String, $name: String,
                  $displayName: String, $description: String, $spec: String) {
    upsertView(input: {id: $id, entityName: $entityName, projectName: $projectName, name: $name, type: $type,
                       displayName: $displayName, description: $description, spec: $spec, createdUsing: WANDB_SDK}) {
        view { id name }
        inserted
    }
}
"""
_one_at_a_time = threading.Lock()


def update_workspace(
    run: Any, logged: Collection[str], pictures: Collection[str], num_gpus: int = 0, create: bool = True
) -> None:
    """Create the saved workspace "vitrail" in the project of a W&B run, or add the panels that it does not have.

    Whatever the user has changed in it stays, and a panel that the user has removed is not added again. A workspace of
    this name that vitrail did not create is left alone.

    Args:
        run: W&B run.
        logged: names of the logged metrics.
        pictures: names of the logged pictures and tables.
        num_gpus: GPUs of the machine.
        create: whether to create the workspace in a project without one.

    Raises:
        ConfigError: wandb-workspaces is not installed, or there is no access to the project.
    """
    workspaces, _ = installed_workspaces()
    sections = [
        workspaces.Section(name=title, panels=panels, is_open=title != "System")
        for title, panels in panel_groups(logged, pictures, num_gpus).items()
    ]
    shown = {*logged, *pictures, *PATTERNS}
    with _one_at_a_time:
        views = _saved_views(run)
        prefix, suffix = _VIEW_NAME.split("{}")
        own = [view for view in views if view["name"].startswith(prefix) and view["name"].endswith(suffix)]
        if own:
            _add_panels(run, own[0], sections, shown)
        elif create and WORKSPACE not in {view["displayName"] for view in views}:
            _create(run, workspaces, sections, shown)


def _create(run: Any, workspaces: Any, sections: list[Any], shown: set[str]) -> None:
    from wandb.sdk.lib.runid import generate_id

    workspace = workspaces.Workspace(
        entity=run.entity,
        project=run.project,
        name=WORKSPACE,
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=EPOCH),
    )
    spec = _as_stored(workspace._to_model().spec)
    _save(run, {"name": _VIEW_NAME.format(generate_id(4)), "displayName": WORKSPACE}, spec, _names(spec, shown))


def _add_panels(run: Any, view: dict[str, Any], sections: list[Any], shown: set[str]) -> None:
    """Add panels to a view if they show something that none of its panels shows or has shown."""
    spec = json.loads(view["spec"])
    stored = spec["section"]["panelBankConfig"]["sections"]
    made = set((view.get("description") or "").removeprefix(_NOTE).split())
    known = made | set(_texts(stored))
    known |= {pattern for pattern in PATTERNS if {name for name in shown if re.fullmatch(pattern, name)} <= known}
    by_name = {section["name"]: section for section in reversed(stored)}
    added = set()
    for section in map(_as_stored, (section._to_model() for section in sections)):
        panels = [panel for panel in section["panels"] if not _names(panel, shown) <= known]
        if not panels:
            continue
        added |= _names(panels, shown)
        # In sections that the app fills itself, it deletes panels without this mark.
        panels = [{**panel, "isAuto": False} for panel in panels]
        if section["name"] in by_name:
            by_name[section["name"]]["panels"] += panels
        else:
            stored.append({**section, "panels": panels})
    if added:
        _save(run, {key: view[key] for key in ("id", "name", "displayName")}, spec, made | added)


def _as_stored(model: Any) -> dict[str, Any]:
    """Return a model of wandb-workspaces as the server stores it."""
    stored: dict[str, Any] = model.model_dump(mode="json", by_alias=True, exclude_none=True)
    return stored


def _names(stored: Any, shown: set[str]) -> set[str]:
    """Return the metrics, patterns and pictures of stored panels, and the system figures."""
    return {text for text in _texts(stored) if text in shown or text.startswith("system/")}


def _texts(stored: Any) -> Iterator[str]:
    """Yield all texts in nested dicts and lists."""
    if isinstance(stored, dict | list):
        for part in stored.values() if isinstance(stored, dict) else stored:
            yield from _texts(part)
    elif isinstance(stored, str):
        yield stored


def _saved_views(run: Any) -> list[dict[str, Any]]:
    """Return a project's saved workspaces."""
    project = _ask(_SAVED_VIEWS, {"entityName": run.entity, "name": run.project, "viewType": _TYPE}).get("project")
    if project is None:
        raise ConfigError(f"{run.entity}/{run.project}: no such project on the server, or no access to it")
    return [edge["node"] for edge in project["allViews"]["edges"]]


def _save(run: Any, names: dict[str, str], spec: dict[str, Any], made: set[str]) -> None:
    """Save a view; its description lists the panels that vitrail has made."""
    project = {"entityName": run.entity, "projectName": run.project, "type": _TYPE}
    description = " ".join([_NOTE, *sorted(made)])
    _ask(_SAVE_VIEW, {**project, **names, "description": description, "spec": json.dumps(spec)})


def _ask(query: str, variables: dict[str, Any]) -> dict[str, Any]:
    import wandb
    from wandb_workspaces._graphql import execute_graphql  # works with every version of wandb's client

    answer: dict[str, Any] = execute_graphql(wandb.Api(), query, variables)
    return answer
