"""Training images that are held out."""

import pytest

from vitrail.data.held_out import hold_out
from vitrail.data.sources import Digits
from vitrail.errors import ConfigError


def test_hold_out__divides_the_training_images():
    split = Digits().open("train")
    kept, held = hold_out(split, 0.1, 7, "probe.held_out")
    assert (len(kept), len(held)) == (1294, 144)
    assert sorted([*kept.keys(), *held.keys()]) == split.keys()
    for part in (kept, held):
        assert [part[index].label for index in range(5)] == part.labels[:5].tolist()
        assert part[3].key == part.keys()[3]
    assert set(held.labels.tolist()) == set(range(10))
    assert hold_out(split, 0.1, 7, "")[1].indices == held.indices != hold_out(split, 0.1, 8, "")[1].indices


@pytest.mark.parametrize(("share", "count"), [(0.0001, 0), (0.9999, 1438)])
def test_hold_out__refuses_an_empty_part(share, count):
    with pytest.raises(ConfigError, match=rf"probe.held_out={share}: holds out {count} of 1438 training images"):
        hold_out(Digits().open("train"), share, 0, "probe.held_out")
