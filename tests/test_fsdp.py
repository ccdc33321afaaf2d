"""FSDP in two and three real processes with gloo: the same loss curve and weights as one process."""

import json
import random
import shutil
import time
from types import SimpleNamespace

import pytest
import timm
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.modules.batchnorm import _BatchNorm

from programs import error_of, metrics, run, run_directories, run_ranks, start_ranks, train
from vitrail.checkpoints.reading import read_checkpoint
from vitrail.errors import ConfigError
from vitrail.training import FSDP
from vitrail.training.fsdp import _shard_whole

COMMON = ("epochs=2", "trainer.limit_train_batches=4", "callbacks.model_summary=null", "callbacks.progress=null")


def shared(*args, logs, ranks=2, **kwargs):
    """Train on `ranks` processes, expect success, and return the run directory."""
    before = set(run_directories(logs))
    for result in run_ranks("train.py", *args, logs=logs, ranks=ranks, **kwargs):
        assert result.returncode == 0, result.stdout + result.stderr
    new = set(run_directories(logs)) - before
    return new.pop() if new else None


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (
            "cpu",
            ("model=vit", "model.name=deit_nano_distilled", "trainer.gradient_clip_val=0.5", "callbacks.ema.decay=0.9"),
        ),
        (
            "ddp_cpu_2",
            ("model=lvvit_nano", "grad_checkpointing=true", "trainer.accumulate_grad_batches=2", "optimizer=lamb"),
        ),
        pytest.param(
            "cpu",
            (
                *("model=vit5", "+model.embed_dim=32", "+model.depth=2", "+model.num_heads=2", "model.patch_size=4"),
                *("optimizer=lamb", "optimizer.eps=1e-8", "model.drop_path_rate=0"),
            ),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            *(
                "ddp_cpu_2",
                (
                    "model=t2t_vit",
                    "model.name=t2t_vit_7",
                    "+model.depth=2",
                    "data.image_size=16",
                    "strategy.offload=true",
                ),
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            # Adam would amplify rounding errors in the bias of the first convolution, whose gradient is 0.
            *(
                "ddp_cpu_2",
                ("model=so_vit", "model.name=so_vit_7", "+model.depth=1", "data.image_size=16", "optimizer=sgd"),
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "ddp_cpu_2",
            (
                *("model=dynamicvit", "model.name=dynamicvit_deit_tiny", "model.patch_size=4", "+model.embed_dim=32"),
                *("+model.depth=2", "+model.num_heads=2", "+model.selection_blocks=[1]"),
                *("objective=dynamicvit", "objective.distill_weight=0"),
            ),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "cpu",
            (
                *("model=evo_vit", "model.name=evo_deit_tiny_patch16_224", "model.patch_size=4", "+model.embed_dim=32"),
                *("+model.depth=3", "+model.num_heads=2", "model.stages=[1]", "model.stage_wise_from=0.5"),
                *("model.drop_path_rate=0", "objective=evo_vit"),
            ),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "ddp_cpu_2",
            (
                *("model=evo_levit", "model.name=evo_levit_128s", "+model.embed_dim=[16,24,32]", "+model.key_dim=8"),
                *("+model.num_heads=2", "+model.depth=[3,2,1]", "model.stage_wise_from=0.5", "data.image_size=64"),
                *("objective=evo_vit", "optimizer=sgd", "callbacks.adaptive_clip.factor=0.01"),
            ),
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "ddp_cpu_2",
            ("model=volo", "optimizer=sgd", "trainer.limit_val_batches=1", "data.eval_batch_size=32"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=(
        "distilled, clipped, EMA",
        "checkpointed, accumulated, LAMB",
        "ViT-5, LAMB",
        "offloaded",
        "second-order pooling",
        "DynamicViT",
        "Evo-ViT",
        "Evo-LeViT, adaptively clipped",
        "VOLO",
    ),
)
@pytest.mark.sample(2)
def test_curve__equals_that_of_unsharded_models(trainer, options, tmp_path):
    """BatchNorm (LV-ViT, So-ViT, Evo-LeViT, VOLO), dropout (T2T-ViT) and DynamicViT's decisions differ between
    processes: these models are compared with DDP.
    """
    assert_same_curve(trainer, options, tmp_path)


@pytest.mark.thorough
@pytest.mark.slow
def test_curve__of_dynamic_vit_with_its_teacher(tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "dense.pth"
    torch.save(timm.create_model("deit_nano", img_size=32, num_classes=10, depth=2).state_dict(), weights)
    options = (
        *("model=dynamicvit", "model.name=dynamicvit_deit_tiny", "model.patch_size=4", "+model.embed_dim=64"),
        *("+model.depth=2", "+model.num_heads=2", "+model.selection_blocks=[1]", f"init_from={weights}"),
        *("objective=dynamicvit", "teacher=timm", "teacher.name=deit_nano", "+teacher.depth=2", "teacher.classes=data"),
        *("teacher.image_size=32", f"teacher.weights={weights}"),
    )
    assert_same_curve("ddp_cpu_2", options, tmp_path)


def assert_same_curve(trainer, options, tmp_path):
    """Train with `trainer` and sharded on two processes, and compare all metrics of both."""
    own = tuple(option for option in options if not option.startswith("strategy"))
    ranks = 1 if trainer == "cpu" else 2
    batch = f"data.batch_size={32 // ranks}"
    one = shared(*f"trainer={trainer}".split(), batch, *COMMON, *own, logs=tmp_path, ranks=ranks)
    two = shared("trainer=fsdp_cpu_2", "data.batch_size=16", *COMMON, *options, logs=tmp_path)
    for whole, sharded in zip(metrics(one), metrics(two), strict=True):
        assert {name for name in whole if "ema" in name} == {"val/loss_ema", "val/top1_ema", "val/top5_ema"}
        for name, value in whole.items():
            if not name.startswith("speed/"):
                assert sharded[name] == pytest.approx(value, abs=1e-4, rel=1e-4), name


def test_checkpoints__load_on_any_number_of_processes(tmp_path):
    """The first epoch runs sharded on two processes or on a single one, the second on one to three, sharded or not."""
    options = ("model=deit_nano", *COMMON, "epochs=1", "callbacks.ema.decay=0.9", "trainer.gradient_clip_val=1")
    start = {
        "shared": shared("trainer=fsdp_cpu_2", "data.batch_size=12", *options, logs=tmp_path),
        "single": train("trainer=cpu", "data.batch_size=24", *options, logs=tmp_path),
    }
    after = {}
    for origin, trainer, ranks in (
        ("single", "cpu", 1),
        ("single", "fsdp_cpu_2", 2),
        ("shared", "cpu", 1),
        ("shared", "ddp_cpu_2", 2),
        ("shared", "fsdp_cpu_2", 3),
    ):
        directory = tmp_path / f"{origin}_{trainer}"
        shutil.copytree(start[origin], directory)
        shared(
            *(f"resume={directory}", f"trainer={trainer}", f"trainer.devices={ranks}", "epochs=2"),
            *("trainer.limit_train_batches=4", f"data.batch_size={24 // ranks}", "trainer.gradient_clip_val=1"),
            logs=tmp_path,
            ranks=ranks,
        )
        assert len(metrics(directory)) == 2
        assert bool(list(directory.glob("checkpoints/last.ckpt.shards-*"))) == trainer.startswith("fsdp")
        after[directory.name] = read_checkpoint(directory / "checkpoints" / "last.ckpt")
    expected = after["single_cpu"]
    assert expected["global_step"] == 8
    for name, found in after.items():
        assert found["global_step"] == 8, name
        for part in ("state_dict", "current_model_state"):
            for key, value in expected[part].items():
                torch.testing.assert_close(found[part][key], value, rtol=1e-4, atol=2e-5, msg=f"{name}: {part} {key}")
        for number, state in expected["optimizer_states"][0]["state"].items():
            moments = found["optimizer_states"][0]["state"][number]
            torch.testing.assert_close(moments["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-5, msg=name)


def test_checkpoint__exports_and_evaluates_like_any_other(tmp_path):
    directory = shared("trainer=fsdp_cpu_2", "data.batch_size=16", "model=vit_nano", *COMMON, "epochs=1", logs=tmp_path)
    file = directory / "checkpoints" / "best.ckpt"
    assert len(list(file.parent.glob("best.ckpt.shards-*/*.safetensors"))) == 2
    assert file.stat().st_size < 100_000
    result = run("export.py", f"ckpt={directory}", "to=safetensors", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    weights = load_file(directory / "export" / "safetensors" / "model.safetensors")
    model = timm.create_model("vit_nano", img_size=32, num_classes=10).eval()
    model.load_state_dict(weights)
    for name, tensor in read_checkpoint(file)["state_dict"].items():
        assert torch.equal(weights[name.removeprefix("model.")], tensor)
    result = run("eval.py", f"ckpt={directory}", "trainer=cpu", logs=tmp_path)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(next(file.parent.glob("best.ckpt.shards-*")))
    assert "00000.safetensors is missing" in error_of(run("eval.py", f"ckpt={directory}", logs=tmp_path))


@pytest.mark.parametrize(
    ("optimizer", "offload"),
    [
        ("nadamuon", "false"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("muon", "false"), ("muon", "true"), ("nadamuon", "true"))
        ),
    ],
)
@pytest.mark.sample(1)
def test_muon_and_trained_parts__equal_those_of_one_process(optimizer, offload, tmp_path):
    """Muon orthogonalises in bfloat16, and other processes round differently. The projection is sharded, too."""
    torch.save(timm.create_model("lvvit_nano", num_classes=3, img_size=64).state_dict(), tmp_path / "teacher.pth")
    taught = ("objective=feature_distillation", "teacher=timm", "teacher.name=lvvit_nano", "teacher.image_size=64")
    taught += ("teacher.num_classes=3", f"teacher.weights={tmp_path}/teacher.pth", "trainer.gradient_clip_val=1")
    options = ("model=deit_nano", f"optimizer={optimizer}", *taught, *COMMON, "callbacks.ema.decay=0.9")
    one = shared("trainer=cpu", "data.batch_size=32", *options, logs=tmp_path, ranks=1)
    sharded = ("trainer=fsdp_cpu_2", "data.batch_size=16", f"strategy.offload={offload}")
    try:
        two = shared(*sharded, *options, logs=tmp_path)
    except AssertionError as failure:
        if "with sharded weights" in str(failure):
            pytest.skip(f"{optimizer} uses operations that torch {torch.__version__} cannot shard")
        raise
    for whole, part in zip(metrics(one), metrics(two), strict=True):
        for name, value in whole.items():
            if "loss" in name:
                assert part[name] == pytest.approx(value, abs=1e-2, rel=1e-2), name
    shards = list(two.glob("checkpoints/last.ckpt.shards-*/*.safetensors"))
    assert [load_file(file)["/state_dict/objective.projection.weight"].shape for file in shards] == [(32, 64)] * 2
    resumed = shared(f"resume={two}", "trainer=cpu", "data.batch_size=32", "epochs=3", logs=tmp_path, ranks=1)
    assert resumed is None
    assert len(metrics(two)) == 3


def test_operation_that_pytorch_cannot_shard__is_one_sentence(monkeypatch):
    def step(*_, **__):
        raise NotImplementedError("Operator aten.clamp_min_.default does not have a sharding strategy registered.")

    monkeypatch.setattr("vitrail.training.fsdp.ModelParallelStrategy.optimizer_step", step)
    with pytest.raises(ConfigError, match=r"strategy=fsdp: PyTorch \S+ cannot compute aten\.clamp_min_ with sharded"):
        FSDP().optimizer_step(None, None)


def test_nonfinite_guard__ends_all_processes_with_one_sentence(tmp_path):
    """The weights diverge at once, so every rollback fails again."""
    results = run_ranks(
        *("train.py", "trainer=fsdp_cpu_2", "data.batch_size=16", *COMMON, "optimizer.lr=1e30", "epochs=5"),
        *("trainer.limit_train_batches=1", "schedule.warmup_epochs=0", "callbacks.nonfinite_guard.on_bad=rollback"),
        logs=tmp_path,
    )
    assert [result.returncode for result in results] == [1, 1], results
    sentences = ("The training had already been rolled back 3 times", "no checkpoint yet")
    assert any(sentence in results[0].stderr for sentence in sentences)
    kept = torch.load(run_directories(tmp_path)[0] / "bad_step.pt", weights_only=True)
    assert kept["weights"]["head.weight"].shape == (10, 64)


@pytest.mark.parametrize(("rank", "value"), [(0, "3e19"), (0, "nan"), (1, "nan")])
@pytest.mark.sample(1)
def test_skip__of_a_gradient_that_one_process_has(rank, value, tmp_path):
    """The number is in a row of the first process; the other one learns of it by the reduction of the gradients.

    The square of 3e19, and with it the norm of that row, is infinite in float32.
    """
    options = ("model=deit_nano", *COMMON, "epochs=1", "trainer.limit_train_batches=5", "data.batch_size=16")
    spoilt = f"_target_: watched_steps.SpoiltGradient, part: blocks.1.attn.proj, rank: {rank}, value: {value}"
    skip = "callbacks.nonfinite_guard.on_bad=skip"
    own = ("trainer=fsdp_cpu_2", f"+callbacks.spoilt={{{spoilt}}}", skip)
    results = run_ranks("train.py", *own, *options, logs=tmp_path, timeout=100, VITRAIL_TARGETS="watched_steps")
    assert [result.returncode for result in results] == [0, 0], results
    assert "Step skipped; 1 skipped so far" in results[0].stdout
    checkpoint = read_checkpoint(run_directories(tmp_path)[0] / "checkpoints" / "last.ckpt")
    assert checkpoint["callbacks"]["NonfiniteGuard"]["skipped"] == 1
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("trainer=ddp_cpu_2", "model=deit_nano"), {"allreduce_": 5}),
        (("trainer=cpu", "trainer.devices=2", "model=timm", "model.name=resnet10t"), {"allreduce_": 10}),
        (("trainer=fsdp_cpu_2", "model=deit_nano"), {"_allgather_base_": 50, "_reduce_scatter_base_": 25}),
    ],
    ids=["ddp", "auto", "fsdp"],
)
def test_step__communicates_to_reduce_gradients_only(options, expected, tmp_path):
    """Five steps; DDP has one or two buckets of gradients, FSDP five modules, whose weights it gathers twice."""
    options = (*options, *COMMON, "epochs=1", "trainer.limit_train_batches=9", "data.num_workers=1")
    count = f"+callbacks.count={{_target_: watched_steps.Collectives, folder: {tmp_path}}}"
    interval = ("trainer.log_every_n_steps=100", "optimizer.fused=true")
    shared(*interval, count, *options, logs=tmp_path, VITRAIL_TARGETS="watched_steps")
    for rank in range(2):
        found = json.loads((tmp_path / f"waits{rank}.json").read_text())
        assert found == {f"c10d.{name}.default": number for name, number in expected.items()}


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_last__survives_kills_while_it_is_written(kills, tmp_path):
    """Both processes are killed at random times in a training that saves after every step."""
    arguments = (
        "train.py",
        "trainer=fsdp_cpu_2",
        "data.batch_size=16",
        *COMMON,
        "callbacks.preemption.minutes=0",
        "epochs=50",
    )
    draw = random.Random(kills)
    steps, resumed = [], ()
    for _ in range(kills):
        before = steps[-1] if steps else -1
        processes = start_ranks(*arguments, *resumed, logs=tmp_path, ranks=2)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            (directory,) = run_directories(tmp_path) or [None]
            last = directory and directory / "checkpoints" / "last.ckpt"
            if last and last.is_file() and read_checkpoint(last, values=False)["global_step"] > before:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.1))
        for process in processes:
            process.kill()
            process.join()
        steps.append(read_checkpoint(last)["global_step"])
        assert steps[-1] > before
        resumed = (f"resume={directory}",)


@pytest.mark.slow  # compilation
def test_compile__block_by_block(tmp_path):
    options = ("model=vit_nano", *COMMON, "epochs=1", "+model.depth=2")
    one = train("trainer=cpu", "data.batch_size=32", *options, logs=tmp_path)
    two = shared("trainer=fsdp_cpu_2", "data.batch_size=16", "compile=default", *options, logs=tmp_path, timeout=400)
    assert metrics(two)[0]["train/loss"] == pytest.approx(metrics(one)[0]["train/loss"], abs=1e-4)


def test_sync_batchnorm__is_applied_before_the_weights_are_sharded():
    """SyncBatchNorm runs on GPUs only; Lightning's own strategy for sharded models leaves BatchNorm as it is."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for sync in (None, TorchSyncBatchNorm()):
            model = timm.create_model("lvvit_nano", num_classes=3, img_size=64)
            strategy = FSDP()
            strategy._layer_sync, strategy._lightning_module = sync, model
            strategy._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
            strategy.accelerator = CPUAccelerator()
            strategy.parallel_devices = [torch.device("cpu")]
            strategy.shard(model)
            found.append({type(module) for module in model.modules() if isinstance(module, _BatchNorm)})
        assert found == [{nn.BatchNorm2d}, {nn.SyncBatchNorm}]
    finally:
        torch.distributed.destroy_process_group()


def test_module_with_fewer_rows_than_processes__is_refused():
    """A process without a row would not learn of a bad gradient."""
    options = {"mesh": SimpleNamespace(size=lambda: 8)}
    with pytest.raises(ConfigError, match="Linear has at most 5 rows of weights, too few for 8 processes"):
        _shard_whole(nn.Linear(9, 5), options)
