import io

import pytest
from rich.console import Console

from annotating import COMMANDS
from vitrail.commands import pack as pack_command


@pytest.fixture
def terminal(monkeypatch):
    """Output of annotate, doctor and pack, wide enough that no table cell wraps."""
    console = Console(file=io.StringIO(), width=250)
    for module in (*COMMANDS, pack_command):
        monkeypatch.setattr(module, "get_console", lambda: console)
    return console.file


@pytest.fixture
def imagenet_tree(image_tree):
    """The image tree with the folder names of two classes of ImageNet: daisy and monastery."""
    for split in ("train", "val"):
        for name, wnid in (("flower", "n11939491"), ("pagoda", "n03781244")):
            (image_tree / split / name).rename(image_tree / split / wnid)
    return image_tree
