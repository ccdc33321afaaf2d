"""Measure the data path against timm's: what a loader core does for one image, and what rendering costs the device.

All loaders read the same 500 x 375 JPEGs, cut from scikit-image's photographs, with DeiT's augmentation (RandAugment,
random erasing). A figure named `*_over_timm` is the throughput of one core relative to timm's float pipeline (its
transform and PyTorch's collate), in process time; the pipelines take turns, so that drift affects all alike.

Figures:
- `loader_over_timm`: folder, rendered in the loader with Pillow.
- `device_over_timm`: folder, what a loader core does if the device renders.
- `packed_original_over_timm`, `packed_256_over_timm`, `packed_raw_over_timm`: packs (encoded files; JPEGs of 256
  pixels; pixels of 256 pixels), rendered on the device. `packed_raw_original_over_timm`: pixels of the original size.
- `render_share_of_step`: operations of rendering over those of a training step of DeiT-S, counted.
- `bytes_per_image`: from loader to device, if the device renders; `bytes_per_image_float` otherwise.
- `timm_images_per_second`, `loader_images_per_second`, `device_images_per_second`: whole DataLoaders with two workers;
  the last one only loads, without rendering.
- On a GPU also `render_over_step` (time of rendering 256 images over that of a compiled DeiT-S step in bf16) and
  `end_to_end_over_synthetic` (throughput of such steps on packed pixels from four loader processes, over steps on one
  batch).

Command: python benchmarks/data_path.py [--images 256] [--rounds 5] [--json FILE]
`--csv src/vitrail/reporting/loader_speed.csv` renews the figures that `plan=true` uses.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from figures import add_json, write_figures
from jpegs import write_images
from PIL import Image, ImageOps
from timm.data import create_transform
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.flop_counter import FlopCounterMode

from vitrail.data import Augmentation, ImageDataModule
from vitrail.data.dataset import collate
from vitrail.data.render import DeviceLoader, DeviceRenderer, device_renderer, plan_batch
from vitrail.data.sampling import Draw
from vitrail.data.sources import ImageFolder, Packed
from vitrail.data.sources.packed import PackOptions, PackWriter
from vitrail.models import create_model

BATCH = 64
REPORTED = {
    "loader": "files,loader",
    "device": "files,device",
    "packed_original": "packed,device",
    "packed_256": "packed_256,device",
    "packed_raw": "packed_raw,device",
    "packed_raw_original": "packed_raw_original,device",
}
DEIT = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "auto_augment": "rand-m9-mstd0.5-inc1"}


def write_pack(out: Path, source: ImageFolder, options: PackOptions) -> Packed:
    """Write a pack of the images."""
    writer = PackWriter(out, source, options)
    writer.begin(None)
    for shard in writer.shards():
        writer.write(shard)
    writer.finish()
    return Packed(str(out))


class TimmDataset(Dataset[Any]):
    """timm's way: Pillow's image, then timm's transform to a normalised float tensor."""

    def __init__(self, root: Path) -> None:
        self.paths = sorted((root / "train").rglob("*.jpg"))
        self.transform = create_transform(
            224, is_training=True, color_jitter=None, interpolation="bicubic", re_prob=0.25, re_mode="pixel", **DEIT
        )
        for stage in self.transform.transforms:
            for operation in getattr(stage, "ops", ()):
                if operation.name.startswith("Posterize"):  # recent versions of Pillow refuse timm's 0 bits
                    operation.aug_fn = lambda image, bits, **_: ImageOps.posterize(image, max(bits, 1))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with self.paths[index].open("rb") as file:
            image = Image.open(file).convert("RGB")
        return self.transform(image), int(self.paths[index].parent.name)


def data_module(source: Any, render: str, **options: Any) -> ImageDataModule:
    """Return the data module of a source with DeiT's augmentation."""
    augment = Augmentation(erase_prob=0.25, **DEIT)
    data = ImageDataModule(source, augment, image_size=224, batch_size=BATCH, render=render, **options)
    data.setup("fit")
    return data


def seconds_per_image(pipelines: dict[str, Callable[[int], Any]], count: int, rounds: int) -> dict[str, list[float]]:
    """Return the process seconds per image of each pipeline, which maps a round to its batches; one list per name."""
    seconds: dict[str, list[float]] = {name: [] for name in pipelines}
    for round_ in range(-1, rounds):  # the first round warms up
        for name, run in pipelines.items():
            started = time.process_time()
            run(round_)
            if round_ >= 0:
                seconds[name].append((time.process_time() - started) / count)
    return seconds


def loading(data: ImageDataModule, count: int) -> Callable[[int], Any]:
    """Return what one loader core does for `count` images of an epoch."""
    collate = data.train_dataloader().collate_fn

    def run(epoch: int) -> None:
        for start in range(0, count, BATCH):
            indices = range(start, min(start + BATCH, count))
            collate(data.train.__getitems__([Draw(index, epoch + 1, False) for index in indices]))

    return run


def timms_loading(data: TimmDataset, count: int) -> Callable[[int], Any]:
    """Return what one loader core does for `count` images, timm's way."""

    def run(_: int) -> None:
        for start in range(0, count, BATCH):
            default_collate([data[index] for index in range(start, min(start + BATCH, count))])

    return run


class ElementCounter(TorchDispatchMode):
    """Counts the elements that operations other than matrix products return: one operation each."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the elements of its result."""
        result = function(*args, **(kwargs or {}))
        name = function.name().partition(":")[2].partition(".")[0]
        if isinstance(result, torch.Tensor) and name not in _NO_ARITHMETIC:
            self.elements += result.numel()
        return result


_NO_ARITHMETIC = {"bmm", "mm", "view", "_unsafe_view", "expand", "slice", "select", "permute", "transpose", "unsqueeze"}
_NO_ARITHMETIC |= {"t", "clone", "_to_copy", "detach", "empty", "alias", "copy_", "unbind", "lift_fresh", "squeeze"}


def render_share(data: ImageDataModule, count: int) -> float:
    """Return the operations of rendering over those of a training step of DeiT-S, for the same images."""
    shipped = [item.image for item in data.train.__getitems__([Draw(index, 0, False) for index in range(count)])]
    renderer = DeviceRenderer(data.input, torch.device("cpu"), data.augment.erase_mode)
    elements = ElementCounter()
    with FlopCounterMode(display=False) as products, elements:
        for start in range(0, count, BATCH):
            renderer(plan_batch(shipped[start : start + BATCH]))
    with torch.device("meta"), FlopCounterMode(display=False) as forward:
        create_model("deit_small_patch16_224", 1000)(torch.empty(1, 3, 224, 224))
    return (products.get_total_flops() + elements.elements) / count / (3 * forward.get_total_flops())


def bytes_of(batch: Any) -> int:
    """Return the bytes of all tensors in nested tuples."""
    if isinstance(batch, torch.Tensor):
        return batch.numel() * batch.element_size()
    return sum(map(bytes_of, batch)) if isinstance(batch, tuple) else 0


def images_per_second(loader: DataLoader[Any], count: int) -> float:
    """Return the throughput of a loader with workers, after its first batch."""
    batches = iter(loader)
    next(batches)
    started = time.perf_counter()
    for _ in batches:
        pass
    return (count - BATCH) / (time.perf_counter() - started)


def loader_figures(root: Path, folder: ImageFolder, count: int) -> dict[str, float]:
    """Return the throughput of whole loaders with two workers, and the bytes of an image on its way."""
    timms = DataLoader(TimmDataset(root), BATCH, shuffle=True, num_workers=2, drop_last=True)
    here = data_module(folder, "loader", num_workers=2).train_dataloader()
    there = data_module(folder, "device", num_workers=2).train_dataloader()
    plain = DataLoader.__iter__(there)  # the batches as they leave the workers
    plan = next(plain)
    started = time.perf_counter()
    for _ in plain:
        pass
    usable = count // BATCH * BATCH
    return {
        "bytes_per_image": bytes_of(tuple(plan)) / BATCH,
        "bytes_per_image_float": float(3 * 224 * 224 * 4),
        "device_images_per_second": (usable - BATCH) / (time.perf_counter() - started),
        "loader_images_per_second": images_per_second(here, usable),
        "timm_images_per_second": images_per_second(timms, usable),
    }


WARM_UP = 10


class Batches(Dataset[Any]):
    """Whole batches of a data module, as its loader processes make them."""

    def __init__(self, data: ImageDataModule, batch: int, count: int) -> None:
        self.data, self.batch, self.count = data, batch, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        size = len(self.data.train)
        indices = range(number * self.batch, (number + 1) * self.batch)
        return collate(self.data.train.__getitems__([Draw(index % size, index // size, False) for index in indices]))


def gpu_figures(raw: Packed, batch: int = 256, steps: int = 60) -> dict[str, float]:
    """Return the time of rendering over that of a compiled DeiT-S step in bf16, and the end-to-end throughput."""
    device = torch.device("cuda")
    data = data_module(raw, "device", num_workers=0)
    renderer = device_renderer(data.input, device, data.augment.erase_mode)
    model = torch.compile(create_model("deit_small_patch16_224", 1000).to(device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    labels = torch.randint(1000, (batch,), device=device)

    def step(images: torch.Tensor) -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def milliseconds(batches: Iterable[Any], run: Callable[[Any], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for number, item in enumerate(batches):
            if number == WARM_UP:
                start.record()
            run(item)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / (number + 1 - WARM_UP)

    loader = DeviceLoader(
        renderer, Batches(data, batch, WARM_UP + steps), batch_size=None, num_workers=4, pin_memory=True
    )
    plan = next(iter(Batches(data, batch, 1))).image
    plan = plan._replace(pixels=plan.pixels.to(device))
    images = renderer(plan)
    repeated = range(WARM_UP + steps)
    training = milliseconds(repeated, lambda _: step(images))
    rendering = milliseconds(repeated, lambda _: renderer(plan))
    both = milliseconds(loader, lambda made: step(made.image))
    return {
        "step_milliseconds": training,
        "render_over_step": rendering / training,
        "end_to_end_over_synthetic": training / both,
    }


def measure(images: int, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return all figures, measured on `images` images, and the images per second by storage and renderer."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_images(root / "images", images)
        folder = ImageFolder(str(root / "images"))
        packs = {
            "packed": PackOptions(),
            "packed_256": PackOptions(256),
            "packed_raw": PackOptions(256, "raw"),
            "packed_raw_original": PackOptions(None, "raw"),
        }
        packed = {name: write_pack(root / name, folder, options) for name, options in packs.items()}
        sources = {"files": folder, **packed}
        pipelines = {"timm": timms_loading(TimmDataset(root / "images"), images)}
        for (name, source), render in itertools.product(sources.items(), ("loader", "device")):
            pipelines[f"{name},{render}"] = loading(data_module(source, render, num_workers=0), images)
        seconds = seconds_per_image(pipelines, images, rounds)
        figures = {"timm_milliseconds": 1e3 * statistics.median(seconds["timm"])}
        for name, pipeline in REPORTED.items():
            ratios = [timms / ours for timms, ours in zip(seconds["timm"], seconds[pipeline], strict=True)]
            figures[f"{name}_over_timm"] = statistics.median(ratios)
        speeds = {name: 1 / statistics.median(times) for name, times in seconds.items() if name != "timm"}
        device = data_module(folder, "device", num_workers=0)
        figures["render_share_of_step"] = render_share(device, min(images, BATCH))
        figures |= loader_figures(root / "images", folder, images)
        if torch.cuda.is_available():
            figures |= gpu_figures(packed["packed_raw"])
    return figures, speeds


def main() -> None:
    """Measure and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="number of images, at least 256")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each pipeline; the median is reported")
    parser.add_argument("--csv", type=Path, help="file of images per second by storage and renderer, for plan=true")
    add_json(parser)
    options = parser.parse_args()
    figures, speeds = measure(options.images, options.rounds)
    for name, value in figures.items():
        print(f"{name:32} {value:12.4g}")
    write_figures(options.json, figures)
    if options.csv is not None:
        rows = [f"{name},{speed:.0f}\n" for name, speed in speeds.items()]
        options.csv.write_text("data,render,images_per_second\n" + "".join(rows))


if __name__ == "__main__":
    main()
