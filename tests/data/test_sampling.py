import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitrail.data.sampling import EpochSampler, sample_of


@given(length=st.integers(0, 200), world=st.integers(1, 9))
def test_in_order__every_sample_once_and_equal_lengths(length, world):
    ranks = [list(EpochSampler(length, 0, False, rank, world, batch_size=7)) for rank in range(world)]
    assert len({len(draws) for draws in ranks}) == 1
    counted = sorted(draw.sample for draws in ranks for draw in draws if not draw.padding)
    assert counted == list(range(length))


@given(length=st.integers(1, 300), world=st.integers(1, 5), batch=st.integers(1, 16), epoch=st.integers(0, 3))
def test_shuffled__all_processes_together_equal_one_process(length, world, batch, epoch):
    def draws(rank, world_size, batch_size):
        sampler = EpochSampler(length, 3, True, rank, world_size, batch_size)
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
        return [draw.sample for draw in sampler]

    one = draws(0, 1, batch * world)
    ranks = [draws(rank, world, batch) for rank in range(world)]
    assert len(one) == length // (batch * world) * batch * world
    assert len(set(one)) == len(one)
    for step in range(len(one) // (batch * world)):
        together = {index for rank in ranks for index in rank[step * batch : (step + 1) * batch]}
        assert together == set(one[step * batch * world : (step + 1) * batch * world])


def test_shuffled__order_differs_by_epoch_and_seed():
    orders = set()
    for seed in (0, 1):
        for epoch in (0, 1):
            sampler = EpochSampler(50, seed, True)
            sampler.set_epoch(epoch)
            orders.add(tuple(draw.sample for draw in sampler))
            assert {draw.epoch for draw in sampler} == {epoch}
    assert len(orders) == 4


def test_len__counts_the_draws_of_one_process():
    assert len(EpochSampler(10, 0, False, 1, 4)) == 3
    assert len(EpochSampler(10, 0, True, 1, 2, batch_size=4)) == 4
    with pytest.raises(StopIteration):
        next(iter(EpochSampler(3, 0, True, batch_size=4)))


def test_repeated__views_of_an_image_are_spread_over_processes():
    """Repeated augmentation as in DeiT: 3 views, 4 processes; an epoch draws a third of the images three times each."""
    samplers = [EpochSampler(100, 5, True, rank, 4, batch_size=6, repeats=3) for rank in range(4)]
    ranks = [list(sampler) for sampler in samplers]
    assert [len(draws) for draws in ranks] == [24] * 4
    together = [draw for step in zip(*ranks, strict=True) for draw in step]
    assert [draw.repeat for draw in together[:6]] == [0, 1, 2, 0, 1, 2]
    images = [draw.sample for draw in together]
    assert images[::3] == images[1::3] == images[2::3]
    assert len(set(images)) == 32
    once = [draw.sample for draw in EpochSampler(100, 5, True, batch_size=24)]
    assert images[::3] == once[:32]


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [(10, 4, [0, 3, 6, 9]), (3, 256, [0, 1, 2]), (5, 1, [0]), (0, 8, [])],
)
def test_sample__is_evenly_spread(count, size, expected):
    assert sample_of(count, size).tolist() == expected
