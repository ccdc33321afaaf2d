"""An untrained teacher for runs of the digits."""

import torch

from vitrail.models import create_model


def untrained_teacher(folder, name):
    """Return the options of a teacher, the backbone `name` at 64 pixels, that has the digits in another order."""
    torch.save(create_model(name, 10, 64).state_dict(), folder / "teacher.pth")
    classes = ",".join(f"'{digit}'" for digit in reversed(range(10)))
    options = ("teacher=timm", f"teacher.name={name}", "teacher.image_size=64", f"teacher.classes=[{classes}]")
    return (*options, f"teacher.weights={folder}/teacher.pth", "teacher.num_classes=10")
