import pytest
import torch

from vitrail.errors import ConfigError
from vitrail.models import create_model, load_checkpoint


@pytest.fixture
def model():
    return create_model("vit_nano", num_classes=4, img_size=16)


def state(value):
    return {key: torch.full_like(tensor, value) for key, tensor in create_model("vit_nano", 4, 16).state_dict().items()}


def first(model):
    return model.head.bias[0].item()


@pytest.mark.parametrize(
    ("content", "ema", "expected"),
    [
        (lambda: state(1), None, 1),
        (lambda: {"model": state(1)}, None, 1),
        (lambda: {"state_dict": state(1), "state_dict_ema": state(2)}, None, 2),
        (lambda: {"state_dict": state(1), "state_dict_ema": state(2)}, False, 1),
        (lambda: {"state_dict": {f"module.{key}": value for key, value in state(3).items()}}, None, 3),
        (lambda: {"model": state(1), "model_ema": state(2)}, True, 2),
    ],
)
def test_load__formats_of_others(content, ema, expected, model, tmp_path):
    torch.save(content(), tmp_path / "x.pth")
    load_checkpoint(model, tmp_path / "x.pth", ema=ema)
    assert first(model) == expected


@pytest.mark.parametrize(("ema", "expected"), [(None, 2), (True, 2), (False, 1)])
def test_load__lightning_with_averages(ema, expected, model, tmp_path):
    with_prefix = lambda value: {f"model.{key}": tensor for key, tensor in state(value).items()}  # noqa: E731
    content = {"pytorch-lightning_version": "2", "state_dict": with_prefix(2), "current_model_state": with_prefix(1)}
    torch.save(content, tmp_path / "x.ckpt")
    load_checkpoint(model, tmp_path / "x.ckpt", ema=ema)
    assert first(model) == expected


def test_load__refuses_with_the_list(model, tmp_path):
    weights = state(1)
    weights["cls_token"] = weights.pop("norm.weight", weights.pop("fc_norm.weight", torch.zeros(1)))
    weights["head.bias"] = torch.zeros(9)
    torch.save(weights, tmp_path / "x.pth")
    before = first(model)
    with pytest.raises(
        ConfigError, match=r"1 missing keys .*1 unexpected keys \(cls_token\), 1 tensors of another shape"
    ):
        load_checkpoint(model, tmp_path / "x.pth")
    assert first(model) == before


def test_load__averages_asked_for_and_not_there(model, tmp_path):
    torch.save(state(1), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="no averaged weights"):
        load_checkpoint(model, tmp_path / "x.pth", ema=True)


def test_load__nothing_is_executed(model, tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"model": Trap()}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=r"can be loaded safely"):
        load_checkpoint(model, tmp_path / "x.pth")
    assert not (tmp_path / "sprung").exists()
