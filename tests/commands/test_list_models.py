"""src/list_models.py in real processes, and the costs that it measures."""

import re

import pytest
import timm
from omegaconf import OmegaConf

from programs import error_of, run
from vitrail.commands.list_models import known_backbones, measure
from vitrail.reporting.backbones import weights_line


@pytest.mark.slow
def test_list_models__table_of_all_backbones(tmp_path):
    out = run("list_models.py", logs=tmp_path, COLUMNS="80").stdout
    assert not (tmp_path / "models").exists()  # programs that only print create no run directory
    row = next(line for line in out.splitlines() if line.strip().startswith("t2t_vit_14 "))
    assert row.split() == ["t2t_vit_14", "224", "21.5", "4.78", "197", "81.5", "(224)", "2"]
    names = {line.split()[0] for line in out.splitlines() if re.match(r"\s*(vit|deit|deit3|t2t|lvvit)", line)}
    assert {"t2t_vit_t_24", "lvvit_l", "deit3_base_patch16_224", "vit_nano", "vit", "vit5_xlarge"} <= names
    assert max(map(len, out.splitlines())) <= 80


def test_list_models__layers_of_one_backbone(tmp_path):
    out = run(
        "list_models.py", "model=lvvit", "model.name=lvvit_t", "image_size=[224,320]", "depth=1", logs=tmp_path
    ).stdout
    assert "224x320" in out
    assert "lvvit_t.in1k" in out
    assert "aux_head Linear in_features=240, out_features=1000" in out


def test_list_models__invalid_image_size_is_refused(tmp_path):
    failed = run("list_models.py", "model=deit_small", "image_size=225", logs=tmp_path)
    assert "deit_small_patch16_224 needs a multiple of its patch size 16" in error_of(failed)


def test_measure__published_size_without_memory():
    """The default size is the published one, and the weights are meta tensors."""
    row, model = measure(OmegaConf.create({"_target_": "vitrail.models.create_model", "name": "deit_nano"}), None, 10)
    assert row.size == tuple(timm.get_pretrained_cfg("deit_nano").input_size[1:])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert row.cost.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "top1"),
    [({}, [79.3]), ({"keep_ratio": 0.7, "drop_path_rate": 0.1}, [79.3]), ({"keep_ratio": 0.5}, [])],
)
def test_measure__published_accuracy_of_the_published_network_only(arguments, top1):
    """DynamicViT's accuracy is that of its published keep ratio."""
    node = {"_target_": "vitrail.models.create_model", "name": "dynamicvit_deit_small", **arguments}
    row, _ = measure(OmegaConf.create(node), None, 1000)
    assert [entry.top1 for entry in row.published] == top1
    assert weights_line(row).startswith("Paper: arXiv:2106.02034")


def test_known_backbones__own_and_published_ones():
    names = known_backbones()
    assert names == sorted(set(names))
    assert {"vit_nano", "lvvit_s", "t2t_vit_14", "deit_small_patch16_224"} <= set(names)
    assert "resnet50" not in names
