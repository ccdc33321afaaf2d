"""`vitrail.load_run`: runs, exports and published weights through the one door."""

import json

import pytest
import torch
from safetensors.torch import save_file

import vitrail
from programs import run, run_directories, train_and_export
from vitrail.checkpoints.reading import backbone_weights, read_checkpoint
from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.runs.trained import run_classifier


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train_and_export(tmp_path_factory.mktemp("logs"))


def test_run__weights_input_and_classes(finished):
    directory, _ = finished
    checkpoint = read_checkpoint(directory / "checkpoints" / "best.ckpt")
    for weights, ema in (("best", True), ("ema", True), ("raw", False)):
        opened = vitrail.load_run(directory, weights=weights)
        assert opened.weights == ("ema" if ema else "raw")
        expected = backbone_weights(checkpoint, ema=ema)
        assert all(torch.equal(value, expected[key]) for key, value in opened.model.state_dict().items())
        assert not opened.model.training
    assert opened.name == "deit_nano"
    assert opened.is_run
    assert opened.classes == list("0123456789")
    assert (opened.input.size, opened.input.mean, opened.input.crop_pct) == ((32, 32), (0.5,) * 3, 0.9)
    assert vitrail.load_run(directory, image_size=48).model.patch_embed.grid_size == (12, 12)
    assert vitrail.load_run(directory / "checkpoints" / "last.ckpt").path.name == "last.ckpt"


def test_export__is_opened_with_its_own_description(finished):
    directory, hub = finished
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = vitrail.load_run(directory).model(images)
        for path in (hub, hub / "model.safetensors"):
            opened = vitrail.load_run(path)
            torch.testing.assert_close(opened.model(images), expected)
            assert opened.input == vitrail.load_run(directory).input
            assert opened.classes == list("0123456789")
            assert not opened.is_run
    assert run_classifier(str(hub)).classes == list("0123456789")
    with pytest.raises(ConfigError, match=r"model: .*config.json.*omit model="):
        vitrail.load_run(hub, model="vit_nano")
    assert vitrail.load_run(hub, model="deit_nano").classes == list("0123456789")
    with pytest.raises(ConfigError, match="no EMA weights"):
        vitrail.load_run(hub, weights="ema")


def test_eval__of_an_export_equals_that_of_its_run(finished, tmp_path):
    directory, hub = finished
    results = {}
    for name, arguments in (("run", [f"ckpt={directory}", "weights=ema"]), ("hub", [f"ckpt={hub}", "data=digits"])):
        result = run("eval.py", *arguments, "trainer=cpu", logs=tmp_path)
        assert result.returncode == 0, result.stderr
        evaluated = run_directories(tmp_path, "eval")[-1]
        (results[name],) = json.loads((evaluated / "results.json").read_text()).values()
    assert results["hub"] == pytest.approx(results["run"])


def test_published__weights_with_a_model(tmp_path):
    torch.manual_seed(0)
    model = create_model("vit_nano", 7, 32, depth=2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    node = {"_target_": "vitrail.models.create_model", "name": "vit_nano", "depth": 2}
    opened = vitrail.load_run(tmp_path / "weights.safetensors", model=node)
    assert (opened.num_classes, opened.classes, opened.input.size) == (7, None, (32, 32))
    torch.testing.assert_close(opened.model.state_dict(), model.state_dict())
    with pytest.raises(ConfigError, match=r"contains no config.*model=t2t_vit_14"):
        vitrail.load_run(tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"does not fit VisionTransformer"):
        vitrail.load_run(tmp_path / "weights.safetensors", model="vit_nano")


def test_published__convolutional_network_and_another_class(tmp_path):
    model = create_model("resnet10t", 7)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    opened = vitrail.load_run(tmp_path / "weights.pth", model={"name": "resnet10t"})
    assert (opened.name, opened.num_classes) == ("resnet10t", 7)
    (tmp_path / "own").mkdir()
    node = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Flatten"}]}
    torch.save({}, tmp_path / "own" / "weights.pth")
    with pytest.raises(ConfigError, match=r"model: returns \(2, 150528\) as cls for two images of 224 x 224 pixels"):
        vitrail.load_run(tmp_path / "own" / "weights.pth", model=node)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": None}, "ckpt: not set"),
        ({"path": "/nowhere.ckpt"}, "ckpt=/nowhere.ckpt: no such file"),
        ({"path": "/nowhere.ckpt", "key": "teacher.ckpt"}, "teacher.ckpt=/nowhere.ckpt: no such file"),
        ({"path": None, "model": "vit_nano"}, "ckpt: not set.*model.pretrained=true"),
        ({"path": None, "weights": "worst"}, "weights=worst: must be one of best, ema, raw"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ConfigError, match=message):
        vitrail.load_run(**arguments)


def test_export__damaged_description(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"its config.json is damaged or has no architecture"):
        vitrail.load_run(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text('{"architecture": "vit_nano"}')
    with pytest.raises(ConfigError, match="export contains no PyTorch weights"):
        vitrail.load_run(tmp_path)
