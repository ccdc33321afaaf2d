"""`python src/export.py`: exported networks give the run's logits when other programs load them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from programs import QUICK, environment, error_of, run, train
from vitrail.checkpoints.reading import backbone_weights, read_checkpoint

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A DeiT-nano trained for two steps, and the logits of its EMA (True) and raw (False) weights."""
    logs = tmp_path_factory.mktemp("logs")
    directory = train(*QUICK, "model=deit_nano", "data.image_size=32", "callbacks.ema.decay=0.5", logs=logs)
    checkpoint = read_checkpoint(directory / "checkpoints" / "best.ckpt")
    logits = {}
    for ema in (True, False):
        model = timm.create_model("deit_nano", num_classes=10, img_size=32).eval()
        model.load_state_dict(backbone_weights(checkpoint, ema=ema))
        with torch.no_grad():
            logits[ema] = model(IMAGES)
    assert not torch.allclose(logits[True], logits[False])
    return directory, logits, logs


def exported(trained, to, *arguments):
    directory, logits, logs = trained
    result = run("export.py", f"ckpt={directory}", f"to={to}", *arguments, logs=logs)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "logits differ by" in result.stdout
    return directory / "export" / to, logits


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(np.asarray(found)), expected, rtol=0, atol=1e-4)


def test_safetensors__ema_weights_and_metadata(trained):
    folder, logits = exported(trained, "safetensors")
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"]).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        close(model(IMAGES), logits[True])
    card = (folder / "README.md").read_text()
    assert "for 1 epochs, 10 classes; ema weights" in card
    assert "Top-1 on its validation images: " in card


def test_timm__raw_weights(trained):
    folder, logits = exported(trained, "timm", "weights=raw")
    weights = torch.load(folder / "deit_nano.pth", weights_only=True)
    model = timm.create_model("deit_nano", num_classes=10, img_size=32).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        close(model(IMAGES), logits[False])


def test_hub__loads_in_timm(trained):
    folder, logits = exported(trained, "hub")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    assert model.pretrained_cfg["crop_pct"] == 1.0
    with torch.no_grad():
        close(model(IMAGES), logits[True])


def test_hub__loads_in_transformers_and_timm_without_vitrail(tmp_path):
    """A network of timm's, in a process that cannot import vitrail."""
    transformers = Path(sys.prefix) / "transformers"  # installed by `make setup`
    if not transformers.is_dir():
        pytest.skip(f"transformers is not installed in {transformers}; run make setup")
    options = ("model=timm", "model.name=test_vit", "+model.drop_path_rate=0.1", "data.image_size=64")
    directory = train(*QUICK, *options, logs=tmp_path)
    assert run("export.py", f"ckpt={directory}", "to=hub", logs=tmp_path).returncode == 0
    folder = directory / "export" / "hub"
    code = (
        "import sys; sys.modules['vitrail'] = None\n"
        "import timm, torch\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageClassification, pipeline\n"
        f"folder = {str(folder)!r}\n"
        "images = torch.randn(2, 3, 64, 64)\n"
        "expected = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()(images)\n"
        "network = AutoModelForImageClassification.from_pretrained(folder).eval()\n"
        "torch.testing.assert_close(network(images).logits, expected)\n"
        "found = pipeline('image-classification', model=folder)(Image.new('RGB', (80, 70)), top_k=10)\n"
        "assert {item['label'] for item in found} == {str(digit) for digit in range(10)}\n"
    )
    there = environment(tmp_path) | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(transformers)}
    done = subprocess.run([sys.executable, "-c", code], env=there, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "drop_path_rate" not in (folder / "config.json").read_text()
    assert "vitrail" not in (folder / "README.md").read_text().partition("```python")[2]


def test_card__says_when_vitrail_is_needed(trained):
    folder, _ = exported(trained, "hub")
    assert "import vitrail  # registers this network with timm" in (folder / "README.md").read_text()


def test_onnx__runs_in_onnx_runtime_with_any_batch_size(trained):
    onnxruntime = pytest.importorskip("onnxruntime")
    folder, logits = exported(trained, "onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    close(session.run(None, {"images": IMAGES.numpy()})[0], logits[True])
    close(session.run(None, {"images": IMAGES[:1].numpy()})[0], logits[True][:1])
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["classes"]) == [str(digit) for digit in range(10)]
    assert properties["mean"] == "[0.5, 0.5, 0.5]"


def test_torch_export__loads_without_vitrail_or_timm(trained, tmp_path):
    folder, logits = exported(trained, "torch_export")
    torch.save(IMAGES, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        f"model = torch.export.load({str(folder / 'model.pt2')!r}).module()\n"
        f"torch.save(model(torch.load({str(tmp_path / 'images.pt')!r})).detach(), {str(tmp_path / 'logits.pt')!r})\n"
        "assert 'timm' not in sys.modules and 'vitrail' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment(tmp_path), cwd=tmp_path, timeout=120)
    close(torch.load(tmp_path / "logits.pt"), logits[True])


def test_export__invalid_settings_are_refused(trained, tmp_path):
    directory, _, logs = trained
    assert "to=word: choose safetensors, timm" in error_of(run("export.py", f"ckpt={directory}", "to=word", logs=logs))
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "contains no config" in error_of(run("export.py", f"ckpt={tmp_path}/other.ckpt", logs=logs))
    labelled = train(*QUICK, "model=deit_nano", "model.token_head=true", logs=tmp_path)
    assert "to=onnx and to=torch_export support any network" in error_of(
        run("export.py", f"ckpt={labelled}", logs=tmp_path)
    )
    result = run("export.py", f"ckpt={labelled}", "to=torch_export", logs=tmp_path)
    assert result.returncode == 0, result.stderr
