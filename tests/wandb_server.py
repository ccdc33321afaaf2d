"""A server on loopback that speaks the calls of W&B's API that vitrail uses, and keeps what it is sent."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

ENTITY = "us"
TIME = "2026-11-27T10:00:00"


class Run:
    """What the server knows of one run."""

    def __init__(self, name, project):
        self.name, self.project, self.display_name = name, project, name
        self.config, self.summary, self.sweep = {}, {}, None
        self.history, self.events, self.files, self.used, self.logged = [], [], {}, [], []

    def logged_metrics(self):
        """Return the names that panels may show: of the history, of media, and of the system as W&B's app writes it."""
        system = {f"system/{key.removeprefix('system.')}" for row in self.events for key in row if "system." in key}
        return {key for row in self.history for key in row} | system

    def node(self):
        """Return the run as W&B's API describes it."""
        config = {key: value for key, value in self.config.items() if key != "_wandb"}
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.display_name,
            "state": "finished",
            "config": json.dumps({key: {"value": value} for key, value in config.items()}),
            "summaryMetrics": json.dumps(self.summary),
            "sweepName": self.sweep,
            "historyLineCount": len(self.history),
            "user": {"name": ENTITY, "username": ENTITY},
            "projectId": "1",
            "readOnly": True,
            "tags": [],
            "systemMetrics": "{}",
            **dict.fromkeys(("jobType", "group", "commit", "notes", "description", "historyKeys")),
            **dict.fromkeys(("createdAt", "heartbeatAt"), TIME),
        }


class Standin:
    """State of the server, and its answers to GraphQL."""

    def __init__(self):
        self.runs, self.views, self.artifacts, self.sweeps, self.lock = {}, [], {}, [], threading.Lock()
        self.requests = []
        self.address = ""

    def views_named(self, name):
        """Return the saved views with this display name."""
        return [view for view in self.views if view["displayName"] == name]

    def run(self, name, project="vitrail"):
        """Return the run with this id, created at its first mention."""
        return self.runs.setdefault(name, Run(name, project))

    def answer(self, query, given):
        """Return the data of a GraphQL request; the tests see each query in `requests`."""
        self.requests.append(query)
        for word in (
            *("upsertBucket", "createRunFiles", "upsertView", "allViews", "upsertSweep", "createArtifactManifest"),
            *("updateArtifactManifest", "createArtifactFiles", "commitArtifact", "useArtifact", "createArtifact"),
        ):
            if f"{word}(" in query:
                return {word if word != "allViews" else "project": getattr(self, f"_{word}")(given)}
        project = {"id": "p", "internalId": "1", "name": given.get("project", "vitrail"), "entityName": ENTITY}
        project |= {"artifact": None, "user": None, "createdAt": TIME, "isBenchmark": False}
        if "view(id:" in query:
            wanted = given["reportId"].rstrip("=")
            return {"view": next(self._view(view) for view in self.views if view["id"].rstrip("=") == wanted)}
        if "artifact(id:" in query:
            return {"artifact": self._artifact(given["id"])}
        if "runs(" in query:
            return {"project": {**project, **self._runs(given)}}
        projects = {"edges": [{"node": project, "cursor": "c"}]}
        viewer = {"id": "u", "username": ENTITY, "entity": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        pages = {"hasNextPage": False, "endCursor": None}
        server = {"features": [], "latestLocalVersionInfo": None, "cliVersionInfo": {"max_cli_version": "99"}}
        return {
            "viewer": viewer,
            "model": None,
            "project": project,
            "serverInfo": server,
            "sweep": None,
            "models": {**projects, "pageInfo": pages},
            "entity": {"organization": None},
        }

    def stream(self, run, files):
        """Keep the lines of a file stream: history, system metrics and summary."""
        run = self.run(run)
        for name, part in files.items():
            rows = [json.loads(line) for line in part["content"]] if name.startswith("wandb-") else []
            if name == "wandb-history.jsonl":
                run.history += rows
            elif name == "wandb-events.jsonl":
                run.events += rows
            elif name == "wandb-summary.json":
                run.summary = rows[-1]

    def _runs(self, given):
        filters = json.dumps(json.loads(given.get("filters") or "{}"))
        sweeps = {run.sweep for run in self.runs.values() if run.sweep}
        wanted = [
            run
            for run in self.runs.values()
            if run.project == given["project"]
            and (f'"{run.name}"' in filters or '"name"' not in filters)
            and (f'"{run.sweep}"' in filters or '"sweep"' not in filters or not sweeps)
        ]
        edges = [{"node": run.node(), "cursor": run.name} for run in wanted]
        return {"runCount": len(edges), "runs": {"edges": edges, "pageInfo": {"hasNextPage": False, "endCursor": None}}}

    def _upsertBucket(self, given):  # noqa: N802
        run = self.run(given["name"], given.get("project") or "vitrail")
        run.display_name = given.get("displayName") or run.display_name
        run.sweep = given.get("sweep") or run.sweep
        run.config |= {key: item["value"] for key, item in json.loads(given.get("config") or "{}").items()}
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
        bucket = {"id": f"id-{run.name}", "name": run.name, "displayName": run.display_name, "sweepName": run.sweep}
        return {"bucket": {**bucket, "historyLineCount": 0, "project": project}, "inserted": True}

    def _createRunFiles(self, given):  # noqa: N802
        urls = [{"name": name, "uploadUrl": f"{self.address}/run/{given['run']}/{name}"} for name in given["files"]]
        return {"runID": given["run"], "uploadHeaders": [], "files": urls}

    def _upsertView(self, given):  # noqa: N802
        number = base64.b64encode(f"View:{len(self.views):05}".encode()).decode()
        view = {**given, "id": given.get("id") or number}
        self.views = [*(other for other in self.views if other["id"] != view["id"]), view]
        return {"view": self._view(view), "inserted": True}

    def _view(self, view):
        project = {"id": "1", "name": view["projectName"], "entityName": view["entityName"]}
        times = {"createdAt": TIME, "updatedAt": TIME}
        return {**view, "project": project, **times}

    def _allViews(self, given):  # noqa: N802
        name, kind = given.get("viewName"), given.get("viewType")
        views = [view for view in self.views if name in (None, view["name"]) and kind in (None, view["type"])]
        return {"allViews": {"edges": [{"node": view} for view in views]}}

    def _upsertSweep(self, given):  # noqa: N802
        self.sweeps.append(yaml.safe_load(given["config"]))
        project = {"id": "p", "name": given.get("projectName") or "vitrail", "entity": {"id": "e", "name": ENTITY}}
        return {"sweep": {"id": "s", "name": "sweep0", "project": project}, "configValidationWarnings": []}

    def _createArtifact(self, given):  # noqa: N802
        given = given.get("input", given)
        artifact = f"artifact{len(self.artifacts)}"
        self.artifacts[artifact] = {
            "name": (given.get("artifactCollectionNames") or [given["artifactCollectionName"]])[0],
            "type": given["artifactTypeName"],
            "aliases": [alias["alias"] for alias in given.get("aliases") or []],
            "run": given.get("runName"),
            "metadata": json.loads(given.get("metadata") or "{}"),
            "state": "PENDING",
            "files": {},
        }
        return {
            "artifact": {"id": artifact, "state": "PENDING", "artifactSequence": {"id": "q", "latestArtifact": None}}
        }

    def _artifact(self, artifact):
        kept = self.artifacts[artifact]
        project = {"id": "p", "internalId": "1", "name": "vitrail", "entity": {"name": ENTITY}}
        sequence = {"__typename": "ArtifactSequence", "name": kept["name"], "project": project}
        return {
            "__typename": "Artifact",
            "id": artifact,
            "artifactSequence": sequence,
            "versionIndex": 0,
            "artifactType": {"name": kept["type"]},
            "description": None,
            "metadata": "{}",
            "state": kept["state"],
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": 0,
            "size": 1,
            "digest": "d",
            "commitHash": "c",
            "fileCount": 1,
            "createdAt": TIME,
            "updatedAt": None,
            "aliases": [],
        }

    def _createArtifactManifest(self, given):  # noqa: N802
        given = given.get("input", given)
        return self._manifest(given["artifactID"])

    def _updateArtifactManifest(self, given):  # noqa: N802
        given = given.get("input", given)
        return self._manifest(given["artifactManifestID"])

    def _manifest(self, artifact):
        url = f"{self.address}/artifact/{artifact}/wandb_manifest.json"
        file = {"id": "f", "name": "wandb_manifest.json", "displayName": "m", "uploadUrl": url, "uploadHeaders": []}
        return {"artifactManifest": {"id": artifact, "file": file}}

    def _createArtifactFiles(self, given):  # noqa: N802
        nodes = []
        for spec in given.get("artifactFiles") or given["input"]["artifactFiles"]:
            url = f"{self.address}/artifact/{spec['artifactID']}/{spec['name']}"
            names = {"id": spec["name"], "name": spec["name"], "displayName": spec["name"]}
            manifest = {"artifactManifest": {"id": spec["artifactID"]}}
            upload = {"uploadUrl": url, "uploadHeaders": [], "storagePath": spec["name"], "uploadMultipartUrls": None}
            nodes.append({"node": {**names, **upload, "artifact": {"id": spec["artifactID"]}, **manifest}})
        return {"files": {"edges": nodes}}

    def _commitArtifact(self, given):  # noqa: N802
        artifact = given.get("artifactID") or given["input"]["artifactID"]
        self.artifacts[artifact]["state"] = "COMMITTED"
        return {"artifact": {"id": artifact, "digest": "d"}}

    def _useArtifact(self, given):  # noqa: N802
        given = given.get("input", given)
        self.run(given["runName"]).used.append(given["artifactID"])
        return {"artifact": {"id": given["artifactID"], "digest": "d", "description": None, "state": "COMMITTED",
                             "createdAt": TIME, "metadata": "{}"}}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        standin = self.server.standin
        if self.path.endswith("/file_stream"):
            with standin.lock:
                standin.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
            self.send(b"{}")
        elif self.path.endswith("/graphql"):
            request = json.loads(body)
            with standin.lock:
                data = standin.answer(request["query"], request.get("variables") or {})
            self.send(json.dumps({"data": data}).encode())
        else:
            self.send(b"{}")

    def do_PUT(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        _, kind, owner, name = self.path.split("/", 3)
        standin = self.server.standin
        with standin.lock:
            files = standin.run(owner).files if kind == "run" else standin.artifacts[owner]["files"]
            files[name] = body
        self.send(b"")

    def do_GET(self):
        self.send(b"{}")

    def send(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def serve(handler):
    """Start a server with `handler` on a free port of loopback; yield it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()


def variables_of(server):
    """Return the environment variables that make W&B use a server."""
    return {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}"}


@contextmanager
def wandb_standin():
    """Start the stand-in; yield its state and the environment variables that make W&B use it."""
    with serve(Handler) as server:
        server.standin = Standin()
        variables = variables_of(server)
        server.standin.address = variables["WANDB_BASE_URL"]
        yield server.standin, {**variables, "WANDB_MODE": "online"}


def read_back(standin):
    """Return the stand-in's only saved workspace "vitrail", as wandb-workspaces loads it."""
    import wandb_workspaces.workspaces as workspaces

    (view,) = standin.views_named("vitrail")
    address = f"{standin.address}/{ENTITY}/vitrail?nw={view['name'].removeprefix('nw-').removesuffix('-v')}"
    return workspaces.Workspace.from_url(address)


def shown_metrics(panels):
    """Return the metrics and pictures that panels of wandb-workspaces show, and their regular expressions."""
    names, patterns = set(), set()
    for panel in panels:
        plotted = [getattr(name, "name", name) for name in getattr(panel, "y", None) or getattr(panel, "metrics", ())]
        columns = [column.metric.name for column in getattr(panel, "columns", ())]
        names |= {*plotted, *columns, *getattr(panel, "media_keys", ())}
        names |= {name for key in ("table_name", "with_respect_to") if (name := getattr(panel, key, None))}
        patterns |= {pattern for pattern in (getattr(panel, "metric_regex", None),) if pattern}
    return names, patterns
