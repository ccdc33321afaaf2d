"""Measure what dropping tokens saves in evaluation: `python benchmarks/pruning.py`, in a minute on two cores.

Images per second of DeiT-S, of DynamicViT-DeiT-S at a keep ratio of 0.7, and of Evo-ViT-S (stage-wise), on a GPU if
there is one, otherwise with two threads; and of a DeiT-S that merely drops half of the tokens where Evo-ViT first
selects (`dropping`), which tells what the selection costs. The networks take turns, so that drift affects all alike,
and the fastest round of each counts, because other programs only make a round slower. Weights are random, which does
not change the speed: every image keeps the same number of tokens.
"""

import argparse
import time
from typing import Any

import timm
import torch
from figures import add_json, write_figures
from torch import nn

import vitrail  # noqa: F401

NETWORKS = {
    "dense": ("deit_small_patch16_224", {}),
    "dynamicvit": ("dynamicvit_deit_small", {"keep_ratio": 0.7}),
    "evovit": ("evo_deit_small_patch16_224", {}),
}


class Dropping(nn.Module):
    """DeiT that drops half of the patch tokens, the last ones, before its fifth block, as many as Evo-ViT."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (B, 3, H, W) to the logits (B, C) of the class token."""
        x = self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(images)))
        x = self.model.blocks[:4](x)
        x = self.model.blocks[4:](x[:, : 1 + x.shape[1] // 2].contiguous())
        return self.model.forward_head(self.model.norm(x))


def build(name: str, arguments: dict[str, float], device: str) -> nn.Module:
    """Build a network for evaluation."""
    model = timm.create_model(name, **arguments).eval().to(device)
    if hasattr(model, "stage_wise_prune"):
        model.stage_wise_prune = True  # as at the end of the published training
    return model


@torch.inference_mode()
def seconds(model: nn.Module, images: torch.Tensor) -> float:
    """Return the time of one forward pass of images (B, 3, 224, 224)."""
    if images.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Run the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images per forward pass")
    parser.add_argument("--rounds", type=int, default=15, help="forward passes of each network")
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add_json(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    images = torch.randn(options.batch, 3, 224, 224, device=options.device)
    models = {kind: build(*network, options.device) for kind, network in NETWORKS.items()}
    models["dropping"] = Dropping(models["dense"])
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for number in range(options.rounds + 1):
        for kind, model in models.items():
            spent = seconds(model, images)
            if number:  # the first round warms up
                times[kind].append(spent)
    speed = {kind: options.batch / min(values) for kind, values in times.items()}
    figures = {f"{kind}_images_per_second": value for kind, value in speed.items()}
    figures |= {f"{kind}_over_dense": speed[kind] / speed["dense"] for kind in speed if kind != "dense"}
    for name, value in figures.items():
        print(f"{name}: {value:.2f}")
    write_figures(options.json, figures)


if __name__ == "__main__":
    main()
