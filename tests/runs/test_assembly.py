"""Objects are built from a config, or an error names the key that is wrong."""

import re

import pytest

from assembly import assemble
from vitrail.errors import ConfigError


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["data.image_size='64'"], "data.image_size=64: must be an integer"),
        (["data.image_size=[3,64,64]"], "data.image_size=[3, 64, 64]: must be"),
        (["schedule.warmup_epochs=-3"], "schedule.warmup_epochs=-3: must be a number of at least 0."),
        (["augment.auto_augment=rand-foo"], "augment.auto_augment=rand-foo: not a policy of timm"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: must be a number of at least 0."),
        (["model.drop_path_rate=2"], "model.drop_path_rate=2: must be a number of at least 0 and below 1"),
        (["callbacks.ema.decay=x"], "callbacks.ema.decay=x: must be a number"),
        (["model=vit_nano", "+model.depth=abc"], "(model.depth=abc)"),
        (["+model.in_chans=1"], "model.in_chans=1: all images have three channels"),
        (
            [
                "+callbacks.swa._target_=lightning.pytorch.callbacks.StochasticWeightAveraging",
                "+callbacks.swa.swa_lrs=0.01",
            ],
            "callbacks.swa: StochasticWeightAveraging replaces the schedule",
        ),
    ],
)
def test_value__of_the_wrong_type_or_range_names_its_key(arguments, sentence, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        assemble(tmp_path, *arguments)


def test_strategy_auto__on_several_devices_has_the_options_of_ddp(tmp_path):
    two = ("trainer=cpu", "trainer.devices=2", "model=vit_nano")
    auto, ddp = (assemble(tmp_path, *two, f"strategy={name}")[0].strategy._ddp_kwargs for name in ("auto", "ddp"))
    false = {"find_unused_parameters": False, "static_graph": False}  # DDP's defaults
    assert false | auto == false | ddp
