"""Every key that a config file or the README names can be set: once each, in a short training."""

import re

import pytest
import timm
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import layouts
from assembly import assemble
from programs import PROJECT, QUICK, run
from vitrail.data.sources.packed import PackOptions, PackWriter
from vitrail.runs.config import compose as compose_program
from vitrail.runs.config import instantiate
from vitrail.training import AdaptiveClip
from vitrail_runtime import resolvers
from vitrail_runtime.project import CONF

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


TOKEN_LABELS = (
    *("data=imagefolder", "data.image_size=32", "data.batch_size=4", "data.num_workers=0", "data.source.index=null"),
    *("data.center_square_maps=stretched", "model=deit_nano", "model.token_head=true"),
    *("objective=token_labeling", "objective.token_weight=0.25", "mixing=mixtoken", "mixing.whole_sides=true"),
    *("targets.ground_truth=published", "targets.transpose_crops=true"),
    *("augment=lvvit", "augment.crop_last=false", "augment.warp_label_maps=false"),
)


def test_keys_of_token_labels__reach_their_objects(image_tree, label_maps, tmp_path):
    options = (*TOKEN_LABELS, f"data.root={image_tree}", f"data.label_maps={label_maps}")
    _, module, data = assemble(tmp_path, *options)
    assert (data.source.index, data.center_square_maps) == (None, "stretched")
    assert (data.augment.crop_last, data.augment.warp_label_maps) == (False, False)
    assert (module.objective.token_weight, module.mixing.whole_sides) == (0.25, True)
    assert (module.targets.ground_truth, module.targets.transpose_crops) == ("published", True)


def test_keys_of_networks_and_optimisers__reach_their_objects(tmp_path):
    options = ("model.token_drop=0", "model.performer_eps=1e-6", "+model.drop_path_by=stage", "data.image_size=32")
    assemble(tmp_path, "model=t2t_vit", "model.name=t2t_vit_dense", *options)
    _, module, _ = assemble(tmp_path, "model=vit5", "+model.depth=1", "+model.global_pool=avg", "optimizer.eps=1e-8")
    assert (module.model.global_pool, module.optimizer.options["eps"]) == ("avg", 1e-8)
    options = ("model.name=sot_tiny", "+model.depth=1", "model.pool_center=channel", "model.pool_drop_rate=0.25")
    _, module, _ = assemble(tmp_path, "model=sot", *options, "data.image_size=32")
    classifier = module.model.classifier
    assert (classifier.drop.p, classifier.representation.axes) == (0.25, (1,))
    _, module, _ = assemble(tmp_path, "model=deit_nano", "model.pool=second_order")
    assert module.model.second_order.drop.p == 0.5
    _, module, _ = assemble(tmp_path, "model=volo", "+model.pos_drop_rate=0.25", "data.image_size=32")
    assert (module.model.pos_drop.p, module.model.head_drop.p) == (0.25, 0.0)
    options = ("+model.proj_drop_rate=0.25", "mixing=mixup_cutmix", "mixing.mode=elem", "mixing.tokens=published")
    options += ("optimizer.decay_also=[cls_token]", "optimizer.lr_scaling=sqrt")
    _, module, _ = assemble(tmp_path, "model=deit_nano", *options)
    assert module.model.blocks[0].attn.proj_drop.p == 0.25
    assert (module.mixing.mode, module.mixing.uniform_tokens) == ("elem", True)
    assert (module.optimizer.decay_also, module.optimizer.lr_scaling) == (("cls_token",), "sqrt")


def test_keys_of_dynamic_vit__reach_their_objects(tmp_path):
    options = ("model.keep_ratio=0.8", "model.mask_eps=0", "objective=dynamicvit", "objective.ratio_divisor=3")
    options += (
        "objective.distill_weight=0",
        "optimizer.untrained=[cls_token,pos_embed]",
        "optimizer.backbone_freeze_epochs=0",
        "data.image_size=32",
    )
    _, module, _ = assemble(tmp_path, "model=dynamicvit", "model.name=dynamicvit_deit_tiny", *options)
    assert module.model.keep_ratios == pytest.approx((0.8, 0.64, 0.512))
    assert module.model.blocks[0].attn.mask_eps == 0
    assert (module.objective.keep_ratio, module.objective.ratio_divisor) == (0.8, 3)
    assert (module.optimizer.untrained, module.optimizer.backbone_freeze_epochs) == (("cls_token", "pos_embed"), 0)


def test_keys_of_evo_vit__reach_their_objects(tmp_path):
    options = (
        "model.keep_ratio=0.4",
        "model.stage_wise_from=0",
        "model.stages=[6]",
        f"model.tradeoff={[1] * 12}",
        "data.image_size=32",
    )
    options += ("objective=evo_vit", "objective.class_token_weight=0.25", "model.name=evo_deit_tiny_patch16_224")
    _, module, _ = assemble(tmp_path, "model=evo_vit", *options)
    assert (module.model.stages, module.model.stage_wise_from) == ((6,), 0)
    assert module.model.keep_ratios == (1.0,) * 6 + (0.4,) * 6
    assert (module.model.tradeoff, module.objective.class_token_weight) == ((1,) * 12, 0.25)


def test_keys_of_evo_levit__reach_their_objects(tmp_path):
    options = ("model.keep_ratio=0.4", "model.first_selection=3", "model.tradeoff=0.25", "model.stage_wise_from=0")
    options += ("objective=evo_vit", "callbacks.adaptive_clip.factor=0.01", "data.image_size=32")
    trainer, module, _ = assemble(tmp_path, "model=evo_levit", *options)
    ratios = [ratio for stage in module.model.stages for ratio in stage.keep_ratios]
    assert ratios == [1.0] * 3 + [0.4] * 9
    assert (module.model.tradeoff, module.model.stage_wise_from) == (0.25, 0)
    assert [callback.factor for callback in trainer.callbacks if isinstance(callback, AdaptiveClip)] == [0.01]


def test_keys_of_phases__reach_their_objects(tmp_path):
    calendar = "[{share:0.5,image_size:2,magnitude:3},{share:0.5,image_size:4}]"
    options = ("phases=efficienttrain", f"phases.calendar={calendar}", "phases.by=compute", "phases.multiple=8")
    _, module, data = assemble(tmp_path, *options, "phases.downscale=crop", "epochs=10", "model=vit_nano")
    assert (data.phases.by, data.phases.downscale, data.phases.sizes) == ("compute", "crop", [(16, 16), (32, 32)])
    assert [phase.epochs for phase in module.phases.phases] == [8, 2]
    assert module.phases.at(0).magnitude == 3


def test_keys_of_strategies_and_launchers__reach_their_objects(tmp_path):
    trainer, _, _ = assemble(tmp_path, "trainer=fsdp_cpu_2", "strategy.reshard_after_forward=false")
    assert trainer.strategy.reshard_after_forward is False
    options = ["launcher=slurm", "hydra.launcher.gpus_per_node=8", "hydra.launcher.cpus_per_task=12"]
    resolvers.register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("train", options, return_hydra_config=True).hydra.launcher
    assert (launcher.gpus_per_node, launcher.cpus_per_task) == (8, 12)


def test_keys_of_annotators__reach_the_network(tmp_path):
    torch.save(timm.create_model("convnext_atto", num_classes=3).state_dict(), tmp_path / "x.pth")
    options = ("annotator=timm", "annotator.name=convnext_atto", f"annotator.weights={tmp_path}/x.pth")
    options += ("annotator.num_classes=3", "+annotator.output_stride=16", "out=maps")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose_program("annotate", options).annotator
    with torch.no_grad():
        assert instantiate(node, "annotator")(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 4, 4)


def built(name, *overrides):
    """Return the source of `data=<name>` with overrides of its keys."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        node = compose_program("train", [f"data={name}", *overrides]).data.source
    return instantiate(node, "data.source")


def test_keys_of_archives__reach_their_source(tmp_path):
    root = layouts.write_archives(tmp_path / "data")
    for kind, name in (("train", "ILSVRC2012_img_train"), ("val", "ILSVRC2012_img_val")):
        (root / f"{name}.tar").rename(root / f"{kind}.tar")
    (root / "ILSVRC2012_devkit_t12.tar.gz").rename(root / "kit.tar.gz")
    names = ("data.source.train=train.tar", "data.source.val=val.tar", "data.source.devkit=kit.tar.gz")
    common = (f"data.root={root}", f"data.source.index={tmp_path / 'cache'}")
    source = built("imagenet_archives", *common, *names)
    assert [len(source.open(split)) for split in source.splits] == [1002, 1000]
    assert len(list((tmp_path / "cache").glob("table-*"))) == 2
    names = f"root: {root}, train: null, val: val.tar, devkit: kit.tar.gz"
    images = f"{{_target_: vitrail.data.sources.ImageNetArchives, {names}}}"
    real = built("imagenet_real", "data.root=null", f"data.source.images={images}")
    assert len(real.open("val").label_sets) == 1000
    kaggle = layouts.write_kaggle(tmp_path / "kaggle")
    source = built("imagenet_kaggle", f"data.root={kaggle}", "data.source.index=null")
    assert len(source.open("val")) == 1000


def test_keys_of_webdatasets_and_packs__reach_their_source(tmp_path):
    root = layouts.write_webdataset(tmp_path / "data")
    options = ("data.source.train=imagenet1k-train-0000.tar", "data.source.val=imagenet1k-validation-0000.tar")
    options += ("data.source.classes=imagenet-1k", "data.source.index=null", "data.value_range=[0,100]")
    source = built("webdataset", f"data.root={root}", *options)
    assert [len(source.open(split)) for split in source.splits] == [501, 500]
    assert source.open("val").value_range == (0.0, 100.0)
    writer = PackWriter(tmp_path / "pack", source, PackOptions())
    writer.begin(None)
    for shard in writer.shards():
        writer.write(shard)
    writer.finish()
    source = built("packed", f"data.root={tmp_path / 'pack'}", "data.value_range=[0,50]")
    assert (source.value_range, len(source.open("val"))) == ((0.0, 50.0), 500)


def test_keys_of_parquet_files__reach_their_source(tmp_path):
    pytest.importorskip("pyarrow")
    root = layouts.write_parquet(tmp_path / "data")
    options = ("data.source.train=data/validation-*", "data.source.val=data/train-*", "data.source.classes=imagenet-1k")
    options += (
        "data.source.image=image",
        "data.source.label=label",
        "data.source.index=null",
        "data.value_range=[0,9]",
    )
    source = built("parquet", f"data.root={root}", *options)
    assert [len(source.open(split)) for split in source.splits] == [1000, 1002]
    assert source.value_range == (0.0, 9.0)


# `group.key` stands for any key; tests/test_extending.py runs the command with `callbacks.hello`.
PLACEHOLDERS = {"group.key", "callbacks.hello"}


def test_documented_keys__are_set_in_a_test():
    texts = "\n".join(path.read_text(encoding="utf-8") for path in (PROJECT / "tests").rglob("*.py"))
    quoted = {key.lstrip("+") for values in VALUES for key in values}
    keys = set(documented())
    assert len(keys) > 40
    assert {
        key for key in keys - quoted - PLACEHOLDERS if not re.search(rf"(?<![\w.]){re.escape(key)}=", texts)
    } == set()
