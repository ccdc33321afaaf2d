"""Configs and checkpoints cannot run code, and secrets stay in the environment."""

import os
import re
import subprocess
import sys

import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from programs import PROJECT, QUICK, environment, error_of, run, run_directories
from vitrail_runtime.allowed_targets import guarded
from vitrail_runtime.secrets import redacted

SECRETS = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef", "CLUSTER_TOKEN": "s3cr3t-of-the-cluster"}

EVIL = "{_target_: pathlib.Path.touch, _args_: [%s]}"


@pytest.mark.parametrize(
    "target",
    [
        *("os.system", "subprocess.Popen", "builtins.eval", "torch.load", "torch.hub.load", "timm.create_model"),
        *("vitrail.runs.directory.subprocess.run", "torch.optim.lr_scheduler.warnings.warn", "hydra.utils.get_method"),
        *(
            "lightning.fabric.utilities.cloud_io._load",
            "torch.nn.functional.relu",
            "vitrail.commands.benchmark.benchmark",
        ),
    ],
)
def test_target__foreign_code_is_refused(target):
    with guarded(), pytest.raises(HydraException, match="_target_: "):
        instantiate(OmegaConf.create({"_target_": target, "_partial_": True}))


def test_target__in_a_shared_experiment_does_not_run(tmp_path):
    """In vitrail's own config, and in Hydra's callbacks, which run before vitrail's programs."""
    proof = tmp_path / "proof"
    evil = EVIL % proof
    result = run("train.py", *QUICK, f"+callbacks.evil={evil}", logs=tmp_path)
    assert "_target_: pathlib.Path.touch is not in a package that a config may build from" in error_of(result)
    result = run("train.py", *QUICK, f"+hydra.callbacks.evil={evil}", logs=tmp_path)
    assert "_target_: pathlib.Path.touch is not in a package" in error_of(result)
    assert not proof.exists()


def test_hydra_config__does_not_run_code(tmp_path):
    """Python's logging calls anything that its config names, and environment variables could allow more targets."""
    proof, evil = tmp_path / "proof", tmp_path / "evil"
    evil.mkdir()
    touch = f"{{'()': pathlib.Path.touch, self: {proof}}}"
    for name, content in (
        ("handlers", f"hydra: {{job_logging: {{handlers: {{evil: {touch}}}, root: {{handlers: [evil]}}}}}}"),
        ("factory", f"hydra: {{hydra_logging: {{formatters: {{evil: {touch}}}}}}}"),
        ("stream", "hydra: {job_logging: {handlers: {terminal: {console: 'ext://os.environ'}}}}"),
        (
            "variables",
            f"hydra: {{job: {{env_set: {{VITRAIL_TARGETS: pathlib}}}}}}\ncallbacks: {{evil: {EVIL % proof}}}",
        ),
    ):
        (evil / f"{name}.yaml").write_text(f"# @package _global_\n{content}\n")
        result = run("train.py", *QUICK, f"+evil={name}", f"hydra.searchpath=[file://{tmp_path}]", logs=tmp_path)
        refusal = r"error: hydra\.job(_logging, hydra\.hydra_logging: |\.env_set\.VITRAIL_TARGETS: )"
        assert re.match(refusal, error_of(result)), name
    assert not proof.exists()


def test_target__more_are_allowed_only_by_environment_and_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import lightning as L\nclass Hello(L.Callback):\n"
        "    def on_train_start(self, trainer, module):\n        print('hello from outside')\n"
    )
    arguments = (*QUICK, "+callbacks.mine={_target_: mine.Hello}", "callbacks.progress=null")
    refused = run("train.py", *arguments, logs=tmp_path, PYTHONPATH=str(tmp_path))
    assert "add --allow mine, or set VITRAIL_TARGETS" in error_of(refused)
    allowed = run("train.py", *arguments, logs=tmp_path, PYTHONPATH=str(tmp_path), VITRAIL_TARGETS="mine")
    assert allowed.returncode == 0, allowed.stderr
    assert "hello from outside" in allowed.stdout
    on_the_command_line = run("train.py", "--allow", "mine", *arguments, logs=tmp_path)  # found in the current folder
    assert "hello from outside" in on_the_command_line.stdout, on_the_command_line.stderr


def test_checkpoint__with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/proof",)

    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.ckpt")
    for program, key in (("train.py", "init_from"), ("eval.py", "ckpt")):
        result = run(program, f"{key}={tmp_path}/evil.ckpt", "trainer=cpu", logs=tmp_path)
        assert "not a checkpoint that can be loaded safely" in error_of(result)
    assert not (tmp_path / "proof").exists()


def test_secrets__not_in_any_file_of_a_run(tmp_path):
    """They are not in configs, overrides, logs, checkpoints, W&B's or TensorBoard's files, nor on the terminal."""
    token = SECRETS["CLUSTER_TOKEN"]
    result = run(
        *("train.py", *QUICK, "logger=[wandb,tensorboard]", "+logger.wandb.notes=${oc.env:CLUSTER_TOKEN}"),
        *(f"+logger.wandb.job_type={token}", "callbacks.progress=null"),
        logs=tmp_path,
        fresh=True,
        WANDB_MODE="offline",
        **SECRETS,
    )
    assert result.returncode == 0, result.stderr
    (directory,) = run_directories(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "overrides.txt", "train.log", "last.ckpt"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name.startswith("events.out") for path in files)
    wandb_own = [path for path in files if path.suffix == ".wandb"]
    for path in files:
        content = path.read_bytes()
        assert SECRETS["WANDB_API_KEY"].encode() not in content, path
        if path not in wandb_own:  # the user passed this secret to W&B as a note
            assert token.encode() not in content, path
    for value in SECRETS.values():
        assert value not in result.stdout + result.stderr
    assert "notes: ${oc.env:CLUSTER_TOKEN}" in (directory / "config.yaml").read_text()


def test_secrets__not_in_an_error(tmp_path):
    result = run(
        "train.py", *QUICK, f"data.root={SECRETS['CLUSTER_TOKEN']}", "data=imagefolder", logs=tmp_path, **SECRETS
    )
    assert "data.root=" in error_of(result)
    assert SECRETS["CLUSTER_TOKEN"] not in result.stdout + result.stderr
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRETS["CLUSTER_TOKEN"].encode() not in path.read_bytes()


def test_secrets__not_in_a_sweep(tmp_path):
    """Jobs get the variable's name instead of its value, so that nothing saved, printed or pickled contains it."""
    token = SECRETS["CLUSTER_TOKEN"]
    arguments = (f"+note=token-{token}", "seed=12,13", f"hydra.sweep.dir={tmp_path}/sweep")
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, str(PROJECT / "tests" / "toy_training.py"), "-m", *arguments],
            env=environment(tmp_path, **SECRETS),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert "1 of 2 jobs failed: job 1 (+note=token-${oc.env:CLUSTER_TOKEN} seed=13)" in result.stderr
        assert token not in result.stdout + result.stderr
    assert len((tmp_path / "sweep" / "0" / "starts.txt").read_text().splitlines()) == 1  # recognised as finished
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path


def test_redacted__whole_values_and_parts_of_values(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "correct horse")
    monkeypatch.setenv("SHORT_KEY", "train")  # an ordinary word
    tree = {"uri": "http://me:correct horse@host", "list": ["correct horse", 3, None], "train": "train"}
    assert redacted(tree) == {
        "uri": "http://me:${oc.env:DB_PASSWORD}@host",
        "list": ["${oc.env:DB_PASSWORD}", 3, None],
        "train": "train",
    }
