"""Import and export of the published format of label maps."""

import os
import zipfile

import numpy as np
import pytest
import torch

from vitrail.data.label_maps import LabelMapStore
from vitrail.errors import ConfigError


@pytest.fixture
def official(tmp_path):
    """Write six files in the format of the official generator."""
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((6, 5, 4, 4)).astype(np.float16)
    classes = rng.integers(0, 1000, scores.shape)
    for i in range(6):
        target = tmp_path / "label_top5" / f"n{i % 2}" / f"n{i % 2}_{i}.pt"
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(np.stack((scores[i], classes[i].astype(np.float16)))), target)
    return tmp_path / "label_top5", scores, classes


def zipped(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.pt")):
            archive.write(file, f"{folder.name}/{file.relative_to(folder)}")
    return path


@pytest.mark.parametrize("pack", [lambda folder: folder, zipped])
def test_import__folder_or_zip(official, pack, tmp_path):
    folder, scores, classes = official
    store = LabelMapStore.import_official(pack(folder), tmp_path / "maps", annotator="nfnet_f6")
    assert [bytes(key).decode() for key in store.keys] == [
        "n0/n0_0",
        "n0/n0_2",
        "n0/n0_4",
        "n1/n1_1",
        "n1/n1_3",
        "n1/n1_5",
    ]
    for i in range(6):
        np.testing.assert_array_equal(store[f"n{i % 2}/n{i % 2}_{i}"][0], scores[i])
        np.testing.assert_array_equal(store[f"n{i % 2}/n{i % 2}_{i}"][1], classes[i])
    assert store.about == {"source": "official", "coverage": "center square", "annotator": "nfnet_f6"}


def test_export__equals_the_imported_files(official, tmp_path):
    folder, _, _ = official
    LabelMapStore.import_official(folder, tmp_path / "maps").export_official(tmp_path / "again")
    for file in folder.rglob("*.pt"):
        again = torch.load(tmp_path / "again" / file.relative_to(folder), weights_only=True)
        torch.testing.assert_close(again, torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    ("tensor", "save"),
    [
        (torch.zeros(2, 5, 4, 4, dtype=torch.float16), {"_use_new_zipfile_serialization": False}),
        (torch.zeros(2, 4, 4, 5, dtype=torch.float16).permute(0, 3, 1, 2), {}),  # not contiguous
        (torch.zeros(3, 5, 4, 4, dtype=torch.float16)[1:], {}),  # a view of a larger tensor
    ],
)
def test_import__unusual_files(official, tensor, save, tmp_path):
    folder, scores, _ = official
    tensor[0] += torch.arange(80).reshape(5, 4, 4)
    torch.save(tensor, folder / "n0" / "n0_2.pt", **save)
    store = LabelMapStore.import_official(folder, tmp_path / "maps")
    np.testing.assert_array_equal(store["n0/n0_2"][0], np.arange(80).reshape(5, 4, 4))
    np.testing.assert_array_equal(store["n0/n0_4"][0], scores[4])


class ExecutesCode:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda file: torch.save(ExecutesCode(), file), "n0_2.pt contains no tensor"),
        (lambda file: torch.save([torch.zeros(2), ExecutesCode()], file), "n0_2.pt cannot be read safely"),
        (lambda file: torch.save(torch.zeros(2, 5, 4, 4), file), r"n0_2.pt contains torch.float32 \(2, 5, 4, 4\)"),
        (lambda file: torch.save(torch.zeros(2, 5, 3, 3).half(), file), r"n0_2.pt has shape \(5, 3, 3\), the others"),
        (
            lambda file: torch.save(torch.full((2, 5, 4, 4), 1.5).half(), file),
            "n0_2.pt contains class 1.5, which is not in",
        ),
        (
            lambda file: torch.save(torch.full((2, 5, 4, 4), 1000).half(), file),
            "n0_2.pt contains class 1000, which is not in",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "n0_2.pt cannot be read safely"),
        (lambda file: file.write_bytes(b""), "n0_2.pt cannot be read safely"),
    ],
)
def test_import__error_names_the_file(official, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, _, _ = official
    content(folder / "n0" / "n0_2.pt")
    with pytest.raises(ConfigError, match=message):
        LabelMapStore.import_official(folder, tmp_path / "maps")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ConfigError):
        LabelMapStore.open(tmp_path / "maps")


def test_import__damaged_zip(official, tmp_path):
    path = zipped(official[0])
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("label_top5/n0/n0_4.pt")
    data[info.header_offset + 30 + len(info.filename) + 400] ^= 255
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"member label_top5/n0/n0_4.pt is damaged"):
        LabelMapStore.import_official(path, tmp_path / "maps")
    path.write_bytes(data[:-100])
    with pytest.raises(ConfigError, match=r"contains no .pt files, or is truncated"):
        LabelMapStore.import_official(path, tmp_path / "more")


def test_import__path_outside_the_archive(official, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.write(official[0] / "n0" / "n0_0.pt", "../../n0_0.pt")
    with pytest.raises(ConfigError, match=r"a path with '..'"):
        LabelMapStore.import_official(tmp_path / "evil.zip", tmp_path / "maps")


def test_import__no_files(tmp_path):
    with pytest.raises(ConfigError, match=r"contains no .pt files"):
        LabelMapStore.import_official(tmp_path, tmp_path / "maps")
    with pytest.raises(ConfigError, match="no such folder or zip"):
        LabelMapStore.import_official(tmp_path / "x.zip", tmp_path / "maps")
