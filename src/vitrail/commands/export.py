"""Export a run's network to formats that other programs can load."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from vitrail.errors import ConfigError
from vitrail.models.factory import has_fixed_size
from vitrail.models.licences import PERMISSIVE
from vitrail.runs.keys import check_choices, check_keys
from vitrail.runs.logs import set_up_logging
from vitrail.runs.outputs import predicts_masks
from vitrail.runs.trained import load_run
from vitrail.runs.trained_model import TrainedModel

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest allowed difference between the logits of a run's network and of its export, in standard deviations."""

_METRICS = {"top1": "Top-1", "mIoU": "mIoU"}

# Keys of a model config that programs which load the export do not need: vitrail's own, and those of training.
_NOT_EXPORTED = {
    *("_target_", "name", "num_classes", "pretrained", "token_head", "pool", "constant_drop_path"),
    *("drop_path_rate", "drop_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate"),
    *("drop_block_rate", "weight_init", "fix_init", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"),
}


class Exported(NamedTuple):
    """A network to export, and what is needed to use it."""

    model: nn.Module
    name: str
    """Name in timm."""
    arguments: dict[str, Any]
    """Arguments of timm.create_model, except number of classes and image size."""
    size: tuple[int, int]
    """Image height and width in pixels."""
    input: dict[str, Any]
    """Input settings under timm's names: input_size, mean, std, interpolation, crop_pct, crop_mode."""
    classes: list[str]
    """Class names in the order of the logits."""
    card: str
    """Model card, in Markdown."""
    more: dict[str, Any]
    """Further entries of config.json, for vitrail only."""
    target: str | None = None
    """Function of vitrail that builds the network, if timm cannot: those of segmentation."""


def export(config: DictConfig) -> Path:
    """Export the network that `config` describes, check the export against it, and return the folder.

    Raises:
        ConfigError: a setting is invalid, or the checkpoint is not from a run.
    """
    set_up_logging()
    check_keys(config, "export")
    check_choices(config, {"to": tuple(_WRITERS), "weights": ("best", "ema", "raw")})
    trained = load_run(config.ckpt, config.weights)
    exported = describe_export(trained)
    out = Path(config.out).expanduser() if config.out else _run_directory(trained) / "export" / config.to
    out.parent.mkdir(parents=True, exist_ok=True)
    # First in a temporary folder, so that an export that differs from the network leaves nothing behind.
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / out.name  # with the usual permissions, unlike the temporary folder
        folder.mkdir()
        load = _WRITERS[config.to](exported, folder)
        difference = compare(exported, load)
        card = exported.card + _use(config.to, exported, out.name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.copytree(folder, out, dirs_exist_ok=True)
    log.info("%s: logits differ by %.1e of their standard deviation", out, difference)
    return out


def _run_directory(trained: TrainedModel) -> Path:
    assert trained.path is not None
    folder = trained.path.parent
    return folder.parent if folder.name == "checkpoints" else folder


def describe_export(trained: TrainedModel) -> Exported:
    """Collect the metadata of a trained network for the exported files."""
    node, spec = trained.config["model"], trained.input
    more: dict[str, Any] = {} if spec.value_range is None else {"value_range": list(spec.value_range)}
    fed = {
        "input_size": [3, *spec.size],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "crop_mode": spec.crop_mode,
    }
    arguments = {key: value for key, value in node.items() if key not in _NOT_EXPORTED and value is not None}
    classes = trained.class_names
    card = _card(trained, classes, fed)
    if trained.licence:
        fed["license"] = trained.licence
    target = str(node["_target_"]) if predicts_masks(trained.model) else None
    more |= {} if target is None else {"vitrail_target": target, "inference": trained.inference_settings}
    return Exported(trained.model, trained.name, arguments, spec.size, fed, classes, card, more, target)


def _card(trained: TrainedModel, classes: list[str], fed: dict[str, Any]) -> str:
    """Return a model card: architecture, input settings and accuracy."""
    results = _run_directory(trained) / "results.json"
    reached = json.loads(results.read_text()) if results.is_file() else {}
    masks = predicts_masks(trained.model)
    metric, library, task = ("mIoU", "vitrail", "segmentation") if masks else ("top1", "timm", "classification")
    best = reached.get(f"val/{metric}_ema" if trained.weights == "ema" else f"val/{metric}")
    epochs = f" for {trained.config['epochs']} epochs" if "epochs" in trained.config else ""
    licence = trained.licence
    lines = [
        *("---", f"library_name: {library}", f"pipeline_tag: image-{task}", f"tags: [image-{task}, {library}]"),
        *(_licence_tags(licence) if licence else ()),
        *("---", f"# {trained.name}", ""),
        *(
            [f"Licence: trained from published weights under `{licence}`, whose terms apply here too."]
            if licence
            else ()
        ),
        f"Trained with vitrail{epochs}, {len(classes)} classes; {trained.weights} weights.",
        "" if best is None else f"{_METRICS[metric]} on its validation images: {best:.2f} % (best epoch).",
        *("", "| Images | |", "|---|---|"),
        *(f"| {key} | {value} |" for key, value in fed.items()),
        *("", f"Classes: {', '.join(classes[:20])}{', ...' if len(classes) > 20 else ''}.", ""),
    ]
    return "\n".join(lines)


def _licence_tags(licence: str) -> list[str]:
    """Return the licence as the Hugging Face Hub's metadata of a model card."""
    known = licence in PERMISSIVE or licence.startswith("cc-")
    return [f"license: {licence}"] if known else ["license: other", f"license_name: {licence}"]


def compare(exported: Exported, load: Callable[[], Callable[[Tensor], Tensor]]) -> float:
    """Return the largest difference of logits for three random images, in standard deviations of the logits.

    Args:
        exported: network as it was before the export.
        load: loads the exported network, which maps images (B, 3, H, W) to logits (B, C).

    Raises:
        ConfigError: the difference exceeds `TOLERANCE`.
    """
    images = torch.randn(3, 3, *exported.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = exported.model(images), load()(images)
    difference = float((expected - found).abs().max() / expected.std())
    if not difference < TOLERANCE:
        raise ConfigError(
            f"to: the exported network's logits differ by {difference:.1e} standard deviations; to=onnx and"
            " to=torch_export support any network."
        )
    return difference


def _write_config(exported: Exported, out: Path) -> None:
    description = {
        "architecture": exported.name,
        "num_classes": len(exported.classes),
        "label_names": exported.classes,
        "model_args": _arguments(exported),
        "pretrained_cfg": {**exported.input, "num_classes": len(exported.classes)},
        **exported.more,
    }
    (out / "config.json").write_text(json.dumps(description, indent=1))


def _arguments(exported: Exported) -> dict[str, Any]:
    """Return timm's arguments of the network, with the image size if its weights depend on it.

    Raises:
        ConfigError: timm does not have this network.
    """
    if not timm.is_model(exported.name):
        raise ConfigError(
            f"model: {exported.name} is not a network of timm; to=onnx and to=torch_export support any network."
        )
    return exported.arguments | ({"img_size": list(exported.size)} if has_fixed_size(exported.name) else {})


def _rebuilt(exported: Exported, **kwargs: Any) -> nn.Module:
    """Build the network with timm alone, or one of segmentation as `load_run` does.

    Raises:
        ConfigError: timm cannot build it with these arguments.
    """
    if exported.target is not None:
        return load_run(Path(kwargs["checkpoint_path"]).parent).model
    try:
        return timm.create_model(
            exported.name, num_classes=len(exported.classes), **_arguments(exported), **kwargs
        ).eval()
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"model.name={exported.name}: timm cannot load it with the run's arguments ({str(error).splitlines()[0]});"
            " to=onnx and to=torch_export support any network."
        ) from error


def _write_safetensors(exported: Exported, out: Path) -> Callable[[], nn.Module]:
    path = out / "model.safetensors"
    save_file({key: value.contiguous() for key, value in exported.model.state_dict().items()}, path)
    _write_config(exported, out)
    return lambda: _rebuilt(exported, checkpoint_path=str(path))


def _write_timm(exported: Exported, out: Path) -> Callable[[], nn.Module]:
    path = out / f"{exported.name}.pth"
    torch.save(exported.model.state_dict(), path)
    _write_config(exported, out)
    return lambda: _rebuilt(exported, checkpoint_path=str(path))


def _write_hub(exported: Exported, out: Path) -> Callable[[], nn.Module]:
    if exported.target is not None:  # timm does not know it
        return _write_safetensors(exported, out)
    arguments = _arguments(exported)
    more = {"num_classes": len(exported.classes), "label_names": exported.classes, "pretrained_cfg": exported.input}
    more |= exported.more
    # Both formats, as in timm's hub repositories: older versions of timm cannot read safetensors from a folder.
    save_for_hf(exported.model, str(out), model_config=more, model_args=arguments, safe_serialization="both")
    # timm repeats the number of classes among the arguments, which transformers refuses.
    path = out / "config.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["model_args"].pop("num_classes", None)
    path.write_text(json.dumps(described, indent=2), encoding="utf-8")

    def load() -> nn.Module:
        try:
            return timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        except RuntimeError as error:
            raise ConfigError(
                f"to=hub: timm cannot load {exported.name} with the run's arguments ({str(error).splitlines()[0]});"
                " to=onnx and to=torch_export support any network."
            ) from error

    return load


def _write_onnx(exported: Exported, out: Path) -> Callable[[], Callable[[Tensor], Tensor]]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # PyTorch's exporter needs it
    except ModuleNotFoundError as error:
        raise ConfigError("to=onnx: not installed; run pip install 'vitrail[export]'.") from error
    path = out / "model.onnx"
    program = torch.onnx.export(
        exported.model,
        (torch.zeros(2, 3, *exported.size),),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    for key, value in {"classes": json.dumps(exported.classes), **exported.input}.items():
        program.model.metadata_props[key] = str(value)
    program.save(str(path))

    def load() -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(np.asarray(session.run(None, {"images": images.numpy()})[0]))

    return load


def _write_torch_export(exported: Exported, out: Path) -> Callable[[], Callable[[Tensor], Tensor]]:
    path = out / "model.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(exported.model, (torch.zeros(2, 3, *exported.size),), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"classes.json": json.dumps(exported.classes)})
    return lambda: torch.export.load(path).module()


_WRITERS: dict[str, Callable[[Exported, Path], Callable[[], Callable[[Tensor], Tensor]]]] = {
    "safetensors": _write_safetensors,
    "timm": _write_timm,
    "hub": _write_hub,
    "onnx": _write_onnx,
    "torch_export": _write_torch_export,
}

_USES = {
    "safetensors": "model = timm.create_model({name!r}, checkpoint_path='model.safetensors', **arguments)",
    "timm": "model = timm.create_model({name!r}, checkpoint_path='{name}.pth', **arguments)",
    "hub": "model = timm.create_model('local-dir:{folder}', pretrained=True)",
    "onnx": "logits = onnxruntime.InferenceSession('model.onnx').run(None, {{'images': images}})[0]",
    "torch_export": "model = torch.export.load('model.pt2').module()",
}


def _use(to: str, exported: Exported, folder: str) -> str:
    """Return Python code, in Markdown, that loads the export."""
    name = exported.name
    if exported.target is not None and to in ("safetensors", "timm", "hub"):
        return f"\n```python\nimport vitrail  # pip install vitrail\nmodel = vitrail.load_run({folder!r}).model\n```\n"
    code = _USES[to].format(name=name, folder=folder)
    own = timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("vitrail")
    timm_needs = (
        "import timm\nimport vitrail  # registers this network with timm: pip install vitrail" if own else "import timm"
    )
    library = {"onnx": "import onnxruntime", "torch_export": "import torch"}.get(to, timm_needs)
    more = "\narguments = {...}  # num_classes and model_args of config.json" if "**arguments" in code else ""
    return f"\n```python\n{library}{more}\n{code}\n```\n"
