"""Every shipped config composes and can be instantiated."""

import re
import shlex
from pathlib import Path

import pytest
import timm
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from programs import PROJECT
from vitrail.errors import ConfigError
from vitrail.runs.config import compose as compose_program
from vitrail.runs.config import defaults_of, instantiate, restore, settle_model
from vitrail.runs.directory import find_checkpoint
from vitrail.runs.keys import check_keys

CONF = PROJECT / "conf"
GROUPS = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.stem != "_timm"
    and path.parent.name not in ("hydra", "paths", "launcher", "sweep", "debug", "experiment", "logger")
)


@pytest.fixture(scope="module", autouse=True)
def hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(*overrides, program="train"):
    return compose(program, [*overrides, "paths.run=/tmp/run"])


@pytest.mark.thorough
@pytest.mark.parametrize(("group", "name"), GROUPS)
def test_every_group_file__composes_and_is_documented(group, name):
    needed = {"timm": [f"{group}.name=resnet18"], "run": [f"{group}.ckpt=x"]}.get(name, [])
    config = composed(f"{group}={name}", *needed, program="annotate" if group == "annotator" else "train")
    assert (config[group] is None) == (group in ("mixing", "phases") and name == "none")
    OmegaConf.to_container(config, resolve=True)[group]
    text = (CONF / group / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    values = [line for line in text.splitlines() if line.strip().partition(": ")[2] and "_target_" not in line]
    values = [
        line
        for line in values
        if not line.strip().startswith(("- override", "root: ${data.root}", "mixing: null", "phases: null"))
    ]
    assert not [line for line in values if "#" not in line]


NULLABLE = ("teacher", "mixing", "phases", "probe", "logger", "experiment", "debug")


@pytest.mark.parametrize("group", NULLABLE)
def test_null_group__is_left_out(group):
    composing = ["augment=deit", "mixing=none"] if group != "mixing" else ["augment=deit"]  # which selects a mixing
    assert compose_program("train", ["augment=deit"]).mixing is not None
    config = compose_program("train", [*composing, f"{group}=null"])
    assert not config.get(group)


def test_null_group__of_a_needed_group_is_refused():
    with pytest.raises(HydraException, match="data=null: train needs one of the files in conf/data: "):
        compose_program("train", ["data=null"])


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment__its_command_composes_with_known_keys(name):
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    header = text[: text.index("defaults:")].replace("\n#  ", "")
    assert "# Hardware: " in header
    command = re.search(r"# Command: python src/train.py ([^\n]*)", header)[1]
    assert command.startswith(f"experiment={name}")
    overrides = [word for word in shlex.split(command.replace("<", "").replace(">", "")) if "=" in word]
    config = composed(*overrides)
    check_keys(config, "train")
    assert config.trainer.devices in (1, 4, 8)


@pytest.mark.parametrize("name", ["default", "smoke"])
def test_every_debug__composes(name):
    assert composed(f"debug={name}").epochs == 1


FIRST_NAMES = {
    "vit": "vit_tiny_patch16_224",
    "lvvit": "lvvit_t",
    "dinov3": "vit_small_patch16_dinov3.lvd1689m",
    "eupe": "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
}


@pytest.mark.thorough
def test_every_model__builds_from_its_config(monkeypatch):
    import torch

    for path in (CONF / "model").glob("*.yaml"):
        if path.stem not in ("timm", "_timm"):
            node = composed(f"model={path.stem}").model
            if OmegaConf.is_missing(node, "name"):
                node.name = FIRST_NAMES[path.stem]
            if "pretrained" in node:
                node.pretrained = False
            with torch.device("meta"):
                assert instantiate(node, "model", num_classes=3, img_size=224).num_classes == 3


@pytest.mark.parametrize("family", ["deit", "deit3", "lvvit", "so_vit", "sot", "t2t_vit", "t2t_vit_t", "vit"])
def test_family__names_in_its_file_exist(family):
    names = re.findall(r"(\w+) \(\d", (CONF / "model" / f"{family}.yaml").read_text())
    assert len(names) > 2
    assert all(timm.is_model(name) for name in names)


@pytest.mark.thorough
def test_optimizers_schedules_objectives__build():
    import torch

    for group in ("optimizer", "schedule", "objective", "augment"):
        for path in (CONF / group).glob("*.yaml"):
            built = instantiate(composed(f"{group}={path.stem}")[group], group)
            if group == "optimizer":
                built.build(torch.nn.Linear(2, 2), 64)


@pytest.mark.thorough
def test_readme__every_training_command_composes():
    text = (PROJECT / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python src/train\.py ([^`#\n)]+)", text)
    assert len(commands) >= 5
    for command in (command for command in commands if not command.startswith("-sc")):
        overrides = [
            word for word in shlex.split(command) if "=" in word and not word.startswith(("resume=", "hydra."))
        ]
        composed(*[f"{word.partition(',')[0]}" if "-m" in command else word for word in overrides])


def test_strategy__follows_the_trainer_and_the_user():
    assert composed("trainer=ddp_8gpu").strategy._target_.endswith("DDPStrategy")
    assert composed("trainer=ddp_2x8gpu").trainer.num_nodes == 2
    assert composed("trainer=ddp_2x8gpu").trainer.devices == 8
    assert composed("trainer=ddp_8gpu", "strategy=auto").strategy._args_ == ["auto"]
    assert composed("trainer=cpu").strategy._args_ == ["auto"]
    assert composed("trainer=gpu").trainer.precision == "bf16-mixed"


def test_check_keys__names_the_unknown_key():
    with pytest.raises(ConfigError, match=r"^optimizr: no such config key"):
        check_keys(OmegaConf.create({"optimizer": 1, "optimizr": 2}), "train")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"_target_": "vitrail.objectives.CrossEntropy", "smooth": 1}, r"^objective: no such key 'smooth'\.$"),
        (
            {"_target_": "vitrail.objectives.CrossEntropy", "smoothing": 2},
            r"^objective.smoothing=2: must be a number of at least 0 and below 1",
        ),
        ({"_target_": "vitrail.objectives.Nothing"}, r"^objective: .*Nothing"),
    ],
)
def test_instantiate__names_the_key(node, message):
    with pytest.raises(ConfigError, match=message):
        instantiate(OmegaConf.create(node), "objective")


def test_find_checkpoint__best_before_last(tmp_path):
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run directory"):
        find_checkpoint(str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for name in ("last", "best"):
        (tmp_path / "checkpoints" / f"{name}.ckpt").touch()
        assert find_checkpoint(str(tmp_path)) == tmp_path / "checkpoints" / f"{name}.ckpt"
    assert find_checkpoint("x.ckpt") == Path.cwd() / "x.ckpt"


def test_imagenet__root_and_default_data_come_from_the_environment(monkeypatch):
    assert composed("data=imagenet").data.root is None
    monkeypatch.setenv("VITRAIL_IMAGENET", "/disk/imagenet")
    monkeypatch.setenv("VITRAIL_DATASET", "imagenet")
    config = composed("model=t2t_vit_24", "trainer=ddp_8gpu")
    assert (config.data.root, config.data.source.root) == ("/disk/imagenet", "/disk/imagenet")
    assert config.data.source._target_ == "vitrail.data.sources.ImageNet"
    assert composed("data=imagenet_real").data.source.root == "/disk/imagenet"
    assert composed("data=imagenet_r").data.source.root == "/disk/imagenet/imagenet-r"
    assert composed("data=imagenet", "data.root=/other").data.source.root == "/other"
    assert composed("data=digits").data.source._target_ == "vitrail.data.sources.Digits"


def test_local__settings_of_one_machine_are_on_top(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "default.yaml").write_text("# @package _global_\nepochs: 77\n")
    assert composed(f"hydra.searchpath=[file://{tmp_path}]").epochs == 77
    assert composed().epochs == 30


def test_model__on_the_command_line_wins_over_an_experiment():
    for overrides, name in (
        (["experiment=deit_tiny", "model=vit_nano"], "vit_nano"),
        (["experiment=deit_tiny", "model=deit"], "deit_small_patch16_224"),
        (["experiment=deit_tiny"], "deit_tiny_patch16_224"),
        (["experiment=deit_tiny", "model=t2t_vit", "model.name=t2t_vit_19"], "t2t_vit_19"),
        (
            ["experiment=segmentation", "model=linear_segmenter", "backbone=deit_tiny_patch16_224"],
            "deit_tiny_patch16_224",
        ),
    ):
        config = compose_program("train", [*overrides, "paths.run=/tmp/run"])
        settle_model(config)
        assert config.model.name == name


def test_model__without_a_name_ignores_the_name_of_an_experiment(tmp_path):
    config = compose_program("train", ["experiment=deit_tiny", "model=timm", "paths.run=/tmp/run"])
    settle_model(config)
    assert OmegaConf.is_missing(config.model, "name")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.yaml").write_text("_target_: theirs.Backbone\nwidth: 8\n")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    config = compose_program("train", ["experiment=t2t_vit_7", "model=own", search, "paths.run=/tmp/run"])
    settle_model(config)
    assert "name" not in config.model


def test_compose__each_job_has_its_own_directory():
    first, second = (compose_program("train").paths.run for _ in range(2))
    assert first != second


def test_restore__null_deletion_and_a_moved_data_folder(tmp_path):
    saved = {
        "data": {"root": "/old", "source": {"root": "/old", "train_dir": "/old/train", "val_dir": "/older"}},
        "mixing": {"_target_": "vitrail.data.MixToken"},
        "teacher": {"name": "x"},
        "paths": {"run": str(tmp_path)},
    }
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(saved))
    config = compose_program("train", ["mixing=none", "~callbacks.ema", "+data.root=/new", f"paths.run={tmp_path}"])
    restored = restore(config, defaults_of("train"), tmp_path)
    assert restored.mixing is None
    assert restored.teacher == {"name": "x"}
    assert restored.data.source == {"root": "/new", "train_dir": "/new/train", "val_dir": "/older"}
    assert restored.data.root == "/new"
