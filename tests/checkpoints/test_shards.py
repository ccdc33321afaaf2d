"""Tensors in rows over several files, written and read by any number of processes, simulated one after the other."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from vitrail.checkpoints.shards import as_sharded, join_shards, local, rows_of, shard_like, split_shards, write_shard
from vitrail.errors import ConfigError

COUNTS = (0, 1, 2, 3, 7, 8, 9, 64, 100)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("count", COUNTS)
def test_rows__every_row_is_on_one_process_as_torch_chunks_them(count, world_size):
    bounds = [rows_of(rank, world_size)(count) for rank in range(world_size)]
    assert [row for first, end in bounds for row in range(first, end)] == list(range(count))
    chunks = [chunk.tolist() for chunk in torch.arange(count).chunk(world_size)]
    chunks += [[]] * (world_size - len(chunks))
    assert [list(range(first, end)) for first, end in bounds] == chunks


@contextmanager
def process(rank, world_size):
    """Be one of several processes, whose collective calls do nothing; yield their device mesh."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def sharded(tensor, rank, world_size, mesh):
    first, end = rows_of(rank, world_size)(len(tensor))
    return as_sharded(tensor[first:end].clone(), tensor.shape, mesh)


@pytest.mark.parametrize(("rank", "rows"), [(0, [0, 1]), (1, [2, 3]), (2, [4])])
def test_cut_like__keeps_the_rows_of_this_process(rank, rows):
    whole = torch.arange(10.0).reshape(5, 2)
    with process(rank, 3) as mesh:
        cut = shard_like(whole, sharded(torch.zeros(5, 2), rank, 3, mesh))
        assert isinstance(cut, DTensor)
        assert cut.shape == (5, 2)
        assert local(cut).tolist() == whole[rows].tolist()
        assert shard_like(cut, cut) is cut
        other_shape = torch.zeros(4, 2)
        assert shard_like(other_shape, cut) is other_shape


def test_cut_like__whole_tensors_stay_whole():
    whole = torch.zeros(3)
    assert shard_like(whole, torch.ones(3)) is whole
    assert local(whole) is whole


# 5 rows on 3 processes: the last has one. `short` has fewer rows than processes, `bias` is on all of them.
WHOLE = {
    "state_dict": {"weight": torch.arange(10.0).reshape(5, 2), "short": torch.tensor([[1.5], [2.5]])},
    "optimizer_states": [{"exp_avg": torch.arange(5, dtype=torch.bfloat16)}],
}
PLAIN = {"state_dict": {"bias": torch.tensor([3.0])}, "epoch": 7, "names": ("a", "b")}


def write(path, world_size):
    """Write the shards of `WHOLE` next to `path` by so many processes; return the content of the checkpoint file."""
    folder = path.with_name("last.ckpt.shards-1")
    for rank in range(world_size):
        with process(rank, world_size) as mesh:
            weights = {name: sharded(value, rank, world_size, mesh) for name, value in WHOLE["state_dict"].items()}
            moment = sharded(WHOLE["optimizer_states"][0]["exp_avg"], rank, world_size, mesh)
            tree = {
                **PLAIN,
                "state_dict": {**weights, **PLAIN["state_dict"]},
                "optimizer_states": [{"exp_avg": moment}],
            }
            content, parts = split_shards(tree)
            assert set(parts) == {"/state_dict/weight", "/state_dict/short", "/optimizer_states/0/exp_avg"}
        write_shard(folder, rank, parts)
    return {**content, "shards": {"folder": folder.name, "count": world_size}}


def test_take_out__leaves_shapes_and_plain_values(tmp_path):
    content = write(tmp_path / "last.ckpt", 3)
    assert content["state_dict"]["weight"].is_meta
    assert content["state_dict"]["weight"].shape == (5, 2)
    assert content["optimizer_states"][0]["exp_avg"].dtype == torch.bfloat16
    assert content["state_dict"]["bias"] is PLAIN["state_dict"]["bias"]
    assert (content["epoch"], content["names"]) == (7, ("a", "b"))
    assert not any(isinstance(value, DTensor) for value in content["state_dict"].values())


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_round_trip__whole_tensors_from_any_number_of_processes(world_size, tmp_path):
    content = write(tmp_path / "last.ckpt", world_size)
    read = join_shards(content, tmp_path / "last.ckpt")
    for name, value in {**WHOLE["state_dict"], **PLAIN["state_dict"]}.items():
        assert torch.equal(read["state_dict"][name], value), name
    assert torch.equal(read["optimizer_states"][0]["exp_avg"], WHOLE["optimizer_states"][0]["exp_avg"])
    assert (read["epoch"], read["names"]) == (7, ("a", "b"))


@pytest.mark.parametrize(("written", "read"), [(3, 2), (2, 3), (1, 4), (6, 1)])
def test_round_trip__rows_for_another_number_of_processes(written, read, tmp_path):
    content = write(tmp_path / "last.ckpt", written)
    for rank in range(read):
        with process(rank, read) as mesh:
            found = join_shards(content, tmp_path / "last.ckpt", rows_of(rank, read), mesh)["state_dict"]
            for name, value in WHOLE["state_dict"].items():
                first, end = rows_of(rank, read)(len(value))
                assert found[name].shape == value.shape
                assert torch.equal(local(found[name]), value[first:end]), (rank, name)


def test_put_back__checkpoint_without_shards_is_unchanged(tmp_path):
    content = {"state_dict": {"x": torch.ones(2)}}
    assert join_shards(content, tmp_path / "last.ckpt") is content


def test_put_back__missing_file_is_named(tmp_path):
    content = write(tmp_path / "last.ckpt", 3)
    missing = tmp_path / "last.ckpt.shards-1" / "00001.safetensors"
    missing.unlink()
    with pytest.raises(ConfigError, match=rf"ckpt={tmp_path}/last.ckpt: .*{missing}"):
        join_shards(content, tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda content, _: content["state_dict"].update(weight=torch.empty(6, 2, device="meta")),
            "/state_dict/weight",
        ),
        (lambda content, _: content["state_dict"].update(new=torch.empty(2, device="meta")), "/state_dict/new"),
        (lambda _, folder: (folder / "00000.safetensors").write_bytes(b"damaged"), "last.ckpt.shards-1"),
        (lambda content, _: content["shards"].update(count=1), "rows"),
    ],
    ids=("other number of rows", "other tensor", "damaged file", "fewer files"),
)
def test_put_back__shards_of_another_checkpoint_are_refused(change, text, tmp_path):
    content = write(tmp_path / "last.ckpt", 3)
    change(content, tmp_path / "last.ckpt.shards-1")
    with pytest.raises(ConfigError, match=rf"ckpt={tmp_path}/last.ckpt: .*{text}"):
        join_shards(content, tmp_path / "last.ckpt")


def test_shards__must_be_next_to_their_checkpoint(tmp_path):
    """A malicious checkpoint cannot refer to files elsewhere."""
    checkpoint = {"shards": {"folder": "../../etc", "count": 1}, "state_dict": {"x": torch.empty(2, device="meta")}}
    with pytest.raises(ValueError, match=rf"{tmp_path}/etc/00000.safetensors is missing"):
        join_shards(checkpoint, tmp_path / "last.ckpt")
