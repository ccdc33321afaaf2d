"""Export a run: `python src/export.py ckpt=<run directory> to=safetensors|timm|hub|onnx|torch_export`."""

from omegaconf import DictConfig

from cli import entry_point


@entry_point("export")
def main(config: DictConfig) -> None:
    """Write weights, names of the classes, normalisation and a model card; load them back and compare."""
    from vitrail.run.export import export

    export(config)


if __name__ == "__main__":
    main()
