"""A sweep of W&B's own agent: its file is accepted by `wandb sweep`, and the command that an agent builds trains."""

import subprocess
import sys

import pytest
import yaml
from hydra.errors import HydraException
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args, load_sweep_config

from programs import PROJECT, QUICK, environment, run_directories
from vitrail_runtime.renames import check_overrides
from wandb_server import ENTITY, wandb_standin

FILE = PROJECT / "conf" / "sweep" / "wandb.yaml"
AGENTS = {"optimizer.lr": 0.0005, "optimizer.weight_decay": 5e-05}


def agents_command(parameters):
    """Return the command that W&B's agent runs for these parameters, as `wandb.wandb_agent.Agent` builds it."""
    config = load_sweep_config(str(FILE))
    command = {"args": {name: {"value": value} for name, value in parameters.items()}, "program": config["program"]}
    filled = {**create_sweep_command_args(command), "interpreter": [sys.executable], "program": [command["program"]]}
    filled["env"] = ["/usr/bin/env"]
    words = []
    for word in create_sweep_command(config["command"]):
        words += filled[word[2:-1]] if word.startswith("${") else [word]
    return words


def test_command__has_hydras_syntax():
    assert agents_command(AGENTS)[2:] == [
        *("src/train.py", "logger=wandb", "optimizer.lr=0.0005", "optimizer.weight_decay=5e-05"),
    ]


def test_agent__its_command_trains_as_the_agents_run(tmp_path):
    """The run has the id that the agent chose, also in wandb_id.txt, so that a resumed training continues it."""
    chosen = tmp_path / "chosen.yaml"
    chosen.write_text(yaml.safe_dump({name: {"value": value} for name, value in AGENTS.items()}))
    agent = {"WANDB_SWEEP_ID": "sweep0", "WANDB_RUN_ID": "agents-run", "WANDB_SWEEP_PARAM_PATH": str(chosen)}
    with wandb_standin() as (standin, variables):
        variables |= {**agent, "WANDB_ENTITY": ENTITY, "WANDB_PROJECT": "vitrail"}
        result = subprocess.run(
            [*agents_command(AGENTS), *QUICK, "logger.wandb.workspace=false"],
            env=environment(tmp_path, **variables),
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
    (directory,) = run_directories(tmp_path)
    assert (directory / "wandb_id.txt").read_text() == "agents-run"
    assert list(standin.runs) == ["agents-run"]
    logged = standin.runs["agents-run"]
    assert logged.sweep == "sweep0"
    assert logged.config["optimizer"]["lr"] == AGENTS["optimizer.lr"]
    assert logged.config["optimizer"]["weight_decay"] == AGENTS["optimizer.weight_decay"]
    metric = load_sweep_config(str(FILE))["metric"]["name"]
    assert metric in logged.logged_metrics()
    assert standin.views == []


def test_wandb_sweep__accepts_the_file(tmp_path):
    with wandb_standin() as (standin, variables):
        result = subprocess.run(
            [sys.executable, "-m", "wandb", "sweep", str(FILE)],
            env=environment(tmp_path, **variables),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert result.returncode == 0, result.stdout + result.stderr
    (sent,) = standin.sweeps
    assert f"wandb agent {ENTITY}/vitrail/sweep0" in result.stdout + result.stderr
    assert yaml.safe_load(FILE.read_text())["parameters"].keys() == sent["parameters"].keys()


def test_sweep_wandb__is_not_for_hydra():
    with pytest.raises(HydraException, match="sweep=wandb: this file is for W&B's agent: wandb sweep conf/sweep/wandb"):
        check_overrides(["-m", "sweep=wandb"], "train")
