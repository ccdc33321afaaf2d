"""Licences of published weights: where they come from, and where they are shown."""

import pytest
import torch
from hydra import compose, initialize_config_dir

import vitrail
from assembly import assemble
from programs import PROJECT
from vitrail.commands.export import describe_export
from vitrail.commands.list_models import measure
from vitrail.models import create_model
from vitrail.models.licences import inherited_licence, licence_of
from vitrail.reporting.backbones import weights_line

DINOV3, EUPE = "vit_small_patch16_dinov3.lvd1689m", "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"


def test_licence_of__as_timm_records_it():
    assert licence_of(DINOV3) == "dinov3-license"
    assert licence_of(EUPE) == "fair-noncommercial-research-license"
    assert licence_of("deit_small_patch16_224") == "apache-2.0"
    assert licence_of("t2t_vit_14") == "bsd-3-clause-clear"
    assert licence_of("my_project.Net") is None


@pytest.mark.parametrize(
    ("name", "start", "licence"),
    [
        (DINOV3, {"model.pretrained": True}, "dinov3-license"),
        (DINOV3, {"init_from": "file.pth"}, "dinov3-license"),
        (DINOV3, {}, None),  # trained from scratch
        ("deit_small_patch16_224", {"model.pretrained": True}, "apache-2.0"),
        ("deit_small_patch16_224", {"init_from": "my_run"}, None),
        (None, {"init_from": "my_run"}, None),
    ],
)
def test_inherited_licence__of_what_the_training_started_from(name, start, licence):
    config = {"model": {"name": name, "pretrained": start.get("model.pretrained", False)}, **start}
    assert inherited_licence(config) == licence


@pytest.mark.parametrize(("name", "stated"), [(DINOV3, True), ("deit_tiny_patch16_224", False)])
def test_training_log__states_the_licence_of_weights_from_a_file(name, stated, tmp_path, caplog):
    """The model config of a run that starts from a file; a permissive licence need not be stated."""
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    torch.save(create_model(name, 10, 32, **options).state_dict(), tmp_path / "weights.pth")
    overrides = (*(f"+model.{key}={value}" for key, value in options.items()), "data.image_size=32")
    with caplog.at_level("INFO", "vitrail.runs.assembly"):
        assemble(tmp_path, "model=timm", f"model.name={name}", f"init_from={tmp_path / 'weights.pth'}", *overrides)
    message = f"model.name={name}: licence of the weights: dinov3-license"
    assert [message] * stated == [text for text in caplog.messages if "licence" in text]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("dinov3_small", DINOV3),
        ("dinov3_base", "vit_base_patch16_dinov3.lvd1689m"),
        ("dinov3_large", "vit_large_patch16_dinov3.lvd1689m"),
        ("eupe", EUPE),
    ],
)
def test_presets__are_backbones_with_registers_whose_licence_is_listed(preset, name):
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        overrides = [f"model={preset}", *([f"model.name={name}"] if preset == "eupe" else [])]
        node = compose("list_models", overrides).model
    assert (node.name, node.pretrained) == (name, True)
    row, model = measure(node, 64, 10)
    assert model.num_prefix_tokens == 5
    assert model.patch_embed.grid_size == (4, 4)
    assert row.licences == [licence_of(name)]
    assert f"{name} (licence: {licence_of(name)})" in weights_line(row)


def test_export__names_the_licence_of_the_published_weights(tmp_path):
    """A run that started from weights with restrictions, as its checkpoint records it."""
    spec = {"size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    options = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    node = {"_target_": "vitrail.models.create_model", "name": DINOV3, "pretrained": True, **options}
    weights = create_model(DINOV3, 2, 32, **options).state_dict()
    checkpoint = {
        "config": {"model": node, "data": {}, "epochs": 1, "init_from": None},
        "state_dict": {f"model.{key}": value for key, value in weights.items()},
        "classes": ["a", "b"],
        "input": spec,
    }
    torch.save(checkpoint, tmp_path / "run.ckpt")
    trained = vitrail.load_run(tmp_path / "run.ckpt")
    assert trained.licence == "dinov3-license"
    exported = describe_export(trained)
    assert exported.input["license"] == "dinov3-license"
    head, _, text = exported.card.partition("\n---\n")
    assert head.splitlines()[-2:] == ["license: other", "license_name: dinov3-license"]
    assert "Licence: trained from published weights under `dinov3-license`, whose terms apply here too." in text
