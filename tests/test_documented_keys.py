"""Every key that a config file or the README names can be set: once each, in a short training."""

import re

import pytest
from omegaconf import OmegaConf

from programs import PROJECT, QUICK, run
from vitrail_runtime.project import CONF
from vitrail_runtime.sentences import _keys

# Another value than the default for each key that Lightning's trainer and vitrail's callbacks read, in groups that one
# training can have together.
VALUES = [
    {
        "trainer.accelerator": "auto",
        "trainer.devices": "1",
        "trainer.num_nodes": "1",
        "trainer.precision": "bf16-mixed",
        "trainer.max_epochs": "2",
        "trainer.accumulate_grad_batches": "2",
        "trainer.gradient_clip_val": "1.0",
        "trainer.check_val_every_n_epoch": "2",
        "trainer.num_sanity_val_steps": "1",
        "trainer.log_every_n_steps": "1",
        "trainer.limit_train_batches": "3",
        "trainer.detect_anomaly": "true",
        "trainer.deterministic": "true",
        "trainer.benchmark": "false",
        "trainer.enable_progress_bar": "false",
        "callbacks.ema.warmup": "false",
        "callbacks.ema.device": "cpu",
        "callbacks.checkpoint.monitor": "val/top1_ema",
        "callbacks.checkpoint.save_top_k": "2",
        "callbacks.preemption.minutes": "null",
        "callbacks.nonfinite_guard.on_bad": "skip",
        "grad_checkpointing": "true",
        "data.eval_batch_size": "50",
        "data.repeats": "3",
        "data.num_workers": "1",
        "targets.smoothing": "0.2",
    },
    {"trainer.limit_val_batches": "0", "trainer.sync_batchnorm": "true", "trainer.use_distributed_sampler": "true"},
    {"trainer.enable_model_summary": "true", "+trainer.enable_checkpointing": "false", "+trainer.max_steps": "3"},
    {"+trainer.fast_dev_run": "true", "callbacks.preemption": "null", "callbacks.nonfinite_guard": "null"},
    {"+trainer.overfit_batches": "2", "+trainer.val_check_interval": "0.5", "+trainer.profiler": "simple"},
    {f"callbacks.{name}": "null" for name in ("checkpoint", "ema", "progress", "model_summary")},
]


def test_values__cover_the_trainer():
    keys = OmegaConf.load(CONF / "trainer" / "auto.yaml").keys() - {"_target_"}
    assert {f"trainer.{key}" for key in keys} <= {key for values in VALUES for key in values}


@pytest.mark.parametrize("values", VALUES, ids=lambda values: next(iter(values)))
def test_keys__can_be_set(values, tmp_path):
    quick = [option for option in QUICK if option.partition("=")[0] not in values]
    result = run("train.py", *quick, *(f"{key}={value}" for key, value in values.items()), logs=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def documented():
    """Return the keys with a dot that the README, the docs and the comments of configs give a value."""
    texts = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"), *CONF.rglob("*.yaml")]
    found = set()
    for path in texts:
        for line in path.read_text(encoding="utf-8").splitlines():
            comment = line.partition("#")[2] if path.suffix == ".yaml" else line
            found |= set(re.findall(r"(?<![\w./+<-])\+?((?:[a-z_]+\.)+[a-z_]+)=", comment))
    return sorted(found)


def test_documented_keys__exist():
    """Keys that only a constructor or a launcher knows are not in the config files."""
    known = {*_keys(), *(key.replace("annotator.", "teacher.") for key in _keys())}
    elsewhere = ("hydra.", "callbacks.", "trainer.", "logger.", "group.", "model.", "annotator.output_stride")
    assert not [key for key in documented() if key not in known and not key.startswith(elsewhere)]
