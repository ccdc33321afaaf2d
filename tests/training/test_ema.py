"""EMA weights: the decay by hand, checkpoints, and validation of both sets of weights."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from small_training import build, trainer
from vitrail.data import Augmentation, ImageDataModule
from vitrail.data.sources import Digits
from vitrail.errors import ConfigError
from vitrail.models import create_model
from vitrail.objectives import CrossEntropy
from vitrail.training import EMA, CosineSchedule, ImageClassifier, OptimizerFactory


def one_weight(value=0.0):
    """Return a module whose backbone has the single weight `value`."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return SimpleNamespace(model=model, new_metrics=nn.Identity, device=torch.device("cpu"))


def started(module, **options):
    ema = EMA(**options)
    ema.on_fit_start(None, module)
    ema.on_train_start(SimpleNamespace(global_step=0), module)
    return ema


def follow(ema, module, values):
    """Set the weight to each value in turn, one optimiser step each; return the EMA weight after each step."""
    averages = []
    for value in values:
        nn.init.constant_(module.model.weight, value)
        ema.on_train_batch_end(SimpleNamespace(global_step=ema._step + 1), module, None, None, 0)
        averages.append(ema.average["weight"].item())
    return averages


def test_decay__warm_up_by_hand():
    """The first update copies; update t has decay (1 + t) / (10 + t): 2 / 11, 3 / 12, 4 / 13."""
    module = one_weight()
    averages = follow(started(module, decay=0.9), module, [1, 2, 3, 4])
    first = 1
    second = 2 / 11 * first + 9 / 11 * 2
    third = 3 / 12 * second + 9 / 12 * 3
    assert averages == pytest.approx([first, second, third, 4 / 13 * third + 9 / 13 * 4])


def test_decay__is_reached_and_then_constant():
    """2 / 11 is below a decay of 0.2, 3 / 12 and 4 / 13 are above it."""
    module = one_weight()
    averages = follow(started(module, decay=0.2), module, [1, 2, 3, 4])
    second = 2 / 11 * 1 + 9 / 11 * 2
    third = 0.2 * second + 0.8 * 3
    assert averages == pytest.approx([1, second, third, 0.2 * third + 0.8 * 4])


def test_decay__without_warm_up():
    module = one_weight()
    averages = follow(started(module, decay=0.9, warmup=False), module, [1, 2, 3])
    assert averages == pytest.approx([1, 0.9 + 0.2, 0.9 * 1.1 + 0.3])


def test_update__only_after_an_optimiser_step():
    """A batch that is accumulated leaves the step, and with it the EMA, unchanged."""
    module = one_weight()
    ema = started(module, decay=0.9, warmup=False)
    follow(ema, module, [1, 2])
    nn.init.constant_(module.model.weight, 50)
    ema.on_train_batch_end(SimpleNamespace(global_step=2), module, None, None, 0)
    assert (ema.average["weight"].item(), ema.updates) == (pytest.approx(1.1), 2)
    ema.on_train_batch_end(SimpleNamespace(global_step=3), module, None, None, 0)
    assert (ema.average["weight"].item(), ema.updates) == (pytest.approx(0.9 * 1.1 + 5), 3)


def test_averaged__weights_are_exchanged_and_restored_also_after_an_error():
    module = one_weight()
    ema = started(module, decay=0.5, warmup=False)
    follow(ema, module, [1, 3])
    with pytest.raises(RuntimeError, match="stop"), ema.averaged(module.model):  # noqa: PT012
        assert module.model.weight.item() == 2
        raise RuntimeError("stop")
    assert module.model.weight.item() == 3
    assert ema.average["weight"].item() == 2


@pytest.mark.parametrize("tied", [True, False], ids=["one parameter", "shared memory"])
def test_averaged__tied_weights_are_exchanged_and_restored(tied):
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[1].weight = model[0].weight if tied else nn.Parameter(model[0].weight.data)
    module = SimpleNamespace(model=model, new_metrics=nn.Identity, device=torch.device("cpu"))
    ema, first = started(module), model[0].weight.item()
    nn.init.constant_(model[0].weight, 5)
    with ema.averaged(model):
        assert model[0].weight.item() == model[1].weight.item() == first
    nn.init.constant_(model[0].weight, model[0].weight.item() + 1)
    assert model[0].weight.item() == model[1].weight.item() == 6


def checkpoint_of(module):
    return {"state_dict": {f"model.{name}": value.clone() for name, value in module.model.state_dict().items()}}


def loadable(module):
    """Let a module of `one_weight` load a checkpoint as a LightningModule does."""
    module.load_state_dict = lambda state: module.model.load_state_dict(
        {name.removeprefix("model."): value for name, value in state.items()}
    )
    return module


def test_checkpoint__layout_and_round_trip():
    """state_dict has the EMA weights, current_model_state the raw ones; the warm-up continues where it was."""
    module = one_weight()
    ema = started(module, decay=0.9)
    *_, average = follow(ema, module, [1, 2, 3])
    checkpoint = checkpoint_of(module) | {"global_step": 3}
    ema.on_save_checkpoint(None, module, checkpoint)
    assert checkpoint["state_dict"] == {"model.weight": torch.tensor([[average]])}
    assert checkpoint["current_model_state"] == {"model.weight": torch.tensor([[3.0]])}
    assert checkpoint["averaging_state"] == {"n_averaged": torch.tensor(3)}

    resumed, other = EMA(decay=0.9), loadable(one_weight(7))
    resumed.on_load_checkpoint(None, other, checkpoint)
    resumed.on_fit_start(None, other)
    resumed.on_train_start(SimpleNamespace(global_step=3), other)
    assert (resumed.average["weight"].item(), other.model.weight.item()) == (average, 3)
    assert follow(resumed, other, [4]) == follow(ema, module, [4]) == [pytest.approx(4 / 13 * average + 9 / 13 * 4)]


def test_checkpoint__without_ema_weights_starts_from_its_weights():
    ema, module = EMA(decay=0.9), loadable(one_weight(7))
    ema.on_load_checkpoint(None, module, checkpoint_of(one_weight(2)))
    assert (ema.average["weight"].item(), ema.updates) == (2, 0)


def test_device__cpu_gives_the_same_ema_weights_in_their_own_memory(tmp_path):
    averages = []
    for device in (None, "cpu"):
        module, data = build(optimizer=OptimizerFactory(lr_scaling="none"), schedule=CosineSchedule())
        ema = EMA(decay=0.9, device=device)
        trainer(tmp_path, [ema], max_epochs=1, limit_train_batches=3, limit_val_batches=1).fit(module, datamodule=data)
        now = module.model.state_dict()
        assert all(value.device.type == "cpu" for value in ema.average.values())
        assert not {value.data_ptr() for value in ema.average.values()} & {value.data_ptr() for value in now.values()}
        averages.append(ema.average)
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.equal(value, averages[1][name]) for name, value in averages[0].items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("device", "expected"), [(None, "cuda"), ("cpu", "cpu")])
def test_device__of_the_ema_weights_of_a_model_on_a_gpu(device, expected):
    module = one_weight()
    module.model.cuda()
    module.device = torch.device("cuda")
    ema = started(module, decay=0.9, warmup=False, device=device)
    assert follow(ema, module, [1, 2]) == pytest.approx([1, 1.1])
    assert ema.average["weight"].device.type == expected
    with ema.averaged(module.model):
        assert module.model.weight.item() == pytest.approx(1.1)
    assert module.model.weight.item() == 2
    assert module.model.weight.is_cuda


def test_ema__validated_and_saved_separately_from_the_raw_weights(tmp_path):
    module, data = build(optimizer=OptimizerFactory(lr_scaling="none"), schedule=CosineSchedule())
    ema = EMA(decay=0.99, warmup=False)
    fit = trainer(tmp_path, [ema], max_epochs=1, limit_train_batches=8)
    fit.fit(module, datamodule=data)
    ema_module = copy.deepcopy(module)
    ema_module.model.load_state_dict(ema.average)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    assert not torch.equal(ema_module.model.head.weight, module.model.head.weight)
    for model, suffix in ((module, ""), (ema_module, "_ema")):
        model.eval()
        for batch in data.val_dataloader():
            model.validation_step(batch, 0)
        for name, value in model.val_metrics.compute_and_reset("val/").items():
            assert fit.callback_metrics[f"{name}{suffix}"] == pytest.approx(float(value), rel=1e-5)
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["model.head.weight"], ema_module.model.head.weight)
    assert torch.equal(checkpoint["current_model_state"]["model.head.weight"], module.model.head.weight)


def test_ema__averages_float_buffers_and_copies_counters(tmp_path):
    model = create_model("resnet10t", 10)
    module = ImageClassifier(
        model, CrossEntropy(), 10, OptimizerFactory(lr_scaling="none"), CosineSchedule(per_step=True)
    )
    data = ImageDataModule(Digits(), augment=Augmentation(), image_size=32, batch_size=4, num_workers=0)
    ema = EMA(decay=0.5, warmup=False)
    trainer(tmp_path, [ema], max_epochs=1, limit_train_batches=3, limit_val_batches=1).fit(module, datamodule=data)
    average = ema.average
    assert average["bn1.num_batches_tracked"] == 3
    assert not torch.equal(average["bn1.running_mean"], model.bn1.running_mean)


def test_ema__invalid_decay_is_refused():
    with pytest.raises(ConfigError, match=r"decay=1.0: must be"):
        EMA(decay=1.0)
