"""A network that runs out of memory in training steps of more than 16 images, for tests of programs."""

from pathlib import Path

LIMIT = 16

_CODE = f"""
import torch
from torch import nn

class Greedy(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = nn.Linear(3, num_classes)

    def set_grad_checkpointing(self, enable=True):
        pass

    def forward(self, images):
        if self.training and len(images) > {LIMIT}:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.layer(images.mean((2, 3)))
"""


def write_greedy(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write the network's package, and return the arguments and the environment that select it."""
    (folder / "greedy.py").write_text(_CODE)
    (folder / "conf" / "model").mkdir(parents=True)
    (folder / "conf" / "model" / "greedy.yaml").write_text("_target_: greedy.Greedy\n")
    return ["--config-dir", str(folder / "conf"), "--allow", "greedy", "model=greedy"], {"PYTHONPATH": str(folder)}
